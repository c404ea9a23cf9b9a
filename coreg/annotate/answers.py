"""From a chat model's answer in words to a class: strict, because a vote that is not certain is worse than none."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence

ABSTAIN = -1
ALIKE = 0.85  # of difflib's ratio of two words: one letter of seven may differ, so a plural or a slip of the pen passes
ARTICLES = {"a", "an", "the"}
DENIALS = {"not", "no", "none", "neither", "nor", "cannot", "isn", "aren", "don", "doesn", "without", "unlike"}


def plain(text: str) -> str:
    """Lower case, without punctuation; what is left is separated by single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[\W_]+", " ", text).split())


class AnswerParser:
    """Finds the one class name that an answer names.

    In this order: the answer is a name (case, punctuation and articles do not count); it contains exactly one name as
    whole words, a longer name hiding the shorter ones inside it, and denies nothing; it is nearly spelled like exactly one
    name, word by word. Otherwise it abstains: an answer with two names, a denial or something else is no vote.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.exact: dict[str, int] = {}
        for index, name in enumerate(class_names):
            key = plain(name)
            # no answer names one of two that are plainly the same
            self.exact[key] = ABSTAIN if key in self.exact else index
        self.exact.pop("", None)
        words = sorted(self.exact, key=len, reverse=True)
        self.inside = re.compile("|".join(map(_as_words, words))) if words else None

    def __call__(self, answer: str) -> int:
        """The class index that `answer` names, -1 for none."""
        text = plain(answer)
        words = text.split()
        while words and words[0] in ARTICLES and text not in self.exact:
            words = words[1:]
            text = " ".join(words)
        if text in self.exact:
            return self.exact[text]
        if not words or self.inside is None or DENIALS & set(words):
            return ABSTAIN
        names = {match.group() for match in self.inside.finditer(text)}
        if names:
            return self.exact[names.pop()] if len(names) == 1 else ABSTAIN
        near = [name for name in self.exact if _alike(words, name.split())]
        return self.exact[near[0]] if len(near) == 1 else ABSTAIN


def _alike(one: list[str], two: list[str]) -> bool:
    """Whether texts agree word by word but for slips; numbers have to be the same."""

    def slip(a: str, b: str) -> bool:
        numbers = any(letter.isdigit() for letter in a + b)
        return a == b or (not numbers and difflib.SequenceMatcher(None, a, b).ratio() >= ALIKE)

    return len(one) == len(two) and all(map(slip, one, two))


def _as_words(name: str) -> str:
    """A pattern for `name` as whole words; in scripts without letter case, such as Chinese, words are not separated."""
    before = r"(?<!\w)" if _separated(name[0]) else ""
    after = r"(?!\w)" if _separated(name[-1]) else ""
    return before + re.escape(name) + after


def _separated(letter: str) -> bool:
    return letter.isascii() or letter.lower() != letter.upper()
