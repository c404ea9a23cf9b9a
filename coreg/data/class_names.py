"""Lists of class names as people have them: what is no list of names is refused before a model reads it for one."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from coreg.errors import UserError

MAX_CLASSES = 32_767  # votes are int16
WANTED = "write one class name a line and nothing else"
HEADERS = frozenset(("id", "index", "idx", "label", "name", "class", "classname", "classid", "classindex", "category"))

# lines that count, and from where; "1 person", "2 people" may be names, but whoever begins with 0 counts
NUMBERED = (
    (r"(?P<n>\d{1,6})(\s*[:;,=)|]|\.\s)\s*(?P<name>.+)", (0, 1)),
    (r"(?P<n>\d{1,6})\s+(?P<name>.+)", (0,)),
    (r"(?P<name>.+?)\s*[:;,=|]\s*(?P<n>\d{1,6})", (0, 1)),
)


def read_class_names(path: str) -> list[str]:
    """Read class names, one a line; their order gives the class indices. Blank lines do not count.

    Raises:
        UserError: the file cannot be read, holds fewer than two names, one name twice (also in other case or Unicode form,
            or with invisible characters), or more than names: numbers, quotes, columns, remarks.
    """
    names = lines_of(path, "class names", "one class name a line")
    refuse_markup(path, names)
    if len(names) < 2:
        raise UserError(f"{path} holds one class name, {names[0][1]!r}; write at least two, one a line")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{path} holds {len(names)} class names; leave at most {MAX_CLASSES}")
    return distinct(path, names, "class name", same_name)


def lines_of(path: str, what: str, wanted: str) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, stripped, with their numbers; never empty.

    Raises:
        UserError: it cannot be read, has no such line, or one with control characters.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # an editor's byte order mark is no part of the first name
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8 with {wanted}") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} in {path}: {error.strerror}; write a text file with {wanted}") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise UserError(f"{path} holds no {what}; write {wanted}")
    for number, line in lines:
        if set(line) & (set(map(chr, range(32))) - set(string.whitespace)):
            raise UserError(f"{path} line {number} holds control characters; write {wanted}")
    return lines


def distinct(path: str, lines: list[tuple[int, str]], what: str, key: Callable[[str], str] = str.casefold) -> list[str]:
    """The texts of the lines of `path`, each a `what`.

    Raises:
        UserError: two have the same `key`.
    """
    first: dict[str, tuple[int, str]] = {}
    for number, line in lines:
        before, same = first.setdefault(key(line), (number, line))
        if before != number:
            form = ", but for Unicode form or invisible characters" if line.casefold() != same.casefold() else ""
            raise UserError(
                f"{path} line {number} repeats the {what} {line!r} of line {before}{form}; write every one once"
            )
    return [line for _, line in lines]


def same_name(name: str) -> str:
    """What two names have in common that look alike: case, Unicode form and invisible characters do not count."""
    plain = unicodedata.normalize("NFKC", name).casefold()
    # Cf: zero-width characters, soft hyphens, marks of direction; the others choose between forms of the sign before them
    plain = "".join(c for c in plain if unicodedata.category(c) != "Cf" and not 0xFE00 <= ord(c) <= 0xFE0F)
    return unicodedata.normalize("NFKC", " ".join(plain.split()))


def refuse_markup(path: str, lines: Sequence[tuple[int, str]]) -> None:
    """Make sure that lines are names, and not names with numbers, quotes, columns or remarks about them.

    Args:
        path: the file, for the message.
        lines: line number and text of every line that is not blank; at least one.

    Raises:
        UserError: a line is no plain name; it says which and what was taken for what.
    """
    texts = [text for _, text in lines]

    def refuse(number: int, text: str, what: str, instead: str) -> None:
        raise UserError(f"{path} line {number} is {text!r}, {what}; {WANTED}, here: {instead}")

    for number, text in lines:
        bare = text.rstrip(",")
        if text.startswith(("#", "//")):
            raise UserError(f"{path} line {number} is {text!r}, and a remark would be a class; remove it, {WANTED}")
        if len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "\"'`":
            refuse(number, text, "in quotes", bare[1:-1])
        if "\t" in text:
            name = max(text.split("\t"), key=lambda field: sum(map(str.isalpha, field))).strip()
            refuse(number, text, "which has several columns", name)
    first = [re.sub(r"[\s_-]", "", field).casefold() for field in re.split(r"[,;|]", texts[0])]
    if len(first) > 1 and HEADERS.issuperset(first):
        raise UserError(f"{path} begins with {texts[0]!r}, the header of a table; {WANTED}")
    if all(text.startswith(("- ", "* ")) for text in texts):
        refuse(*lines[0], "an item of a list", texts[0][2:].strip())
    for pattern, starts in NUMBERED:
        matches = [re.fullmatch(pattern, text) for text in texts]
        numbers = [int(match["n"]) for match in matches if match]
        if len(numbers) == len(texts) and numbers[0] in starts and numbers == list(range(numbers[0], numbers[-1] + 1)):
            refuse(*lines[0], "which has a number", matches[0]["name"])
