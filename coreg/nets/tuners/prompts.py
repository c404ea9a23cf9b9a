"""Learned prompts for models of the CLIP family: context vectors in the place of a template's words.

CoOp (Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022) trains M vectors V of the text side's word
embeddings and nothing else. A prompt reads V_1 .. V_M, the class name and a full stop; the name may stand after the
vectors, before them, or in their middle.

The prompts are real texts with a placeholder word where the vectors go, and a hook on the token embedding puts the vectors
there. So the model's own tokenizer decides about special tokens and its own forward about masks and about which token's
feature counts, whatever the text tower is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

from coreg.data.keyed import keyed_generator
from coreg.errors import UserError

Position = Literal["end", "middle", "front"]
Tokens = dict[str, Tensor]
PLACEHOLDERS = ("a", "x", "i", "the", "of", "in")  # words that tokenizers are likely to write as one token
CONTEXT_STD = 0.02  # of random context vectors


@dataclass
class PromptTokens:
    """C prompts as a text tower reads them."""

    tokens: Tokens  # `input_ids` int64 (C, L) and whatever else the text side reads
    slots: Tensor  # bool (C, L), where the context vectors go, M in each row, in order


def _words_before(count: int, position: Position) -> int:
    return {"end": count, "middle": count // 2, "front": 0}[position]


def prompt_texts(class_names: Sequence[str], context: Sequence[str], position: Position) -> list[str]:
    """One prompt a class: the words of `context` around its name, whose underscores become spaces, and a full stop."""
    before = _words_before(len(context), position)
    names = [name.replace("_", " ") for name in class_names]
    return [" ".join([*context[:before], name, *context[before:]]) + "." for name in names]


def _bare(class_names: Sequence[str], words_before: int) -> list[str]:
    """The prompts without a context; a name with words before it keeps its space, which some tokenizers read with it."""
    return [" " * bool(words_before) + text for text in prompt_texts(class_names, [], "end")]


def lay_out(
    tokenize: Callable[[list[str]], Tokens], class_names: Sequence[str], count: int, position: Position
) -> PromptTokens:
    """Prompts with `count` places for context vectors.

    Args:
        tokenize: list of m texts -> `input_ids` int64 (m, L) and others with one row a text.

    Raises:
        UserError: there is no room for so many, or the tokenizer splits every placeholder word.
    """
    laid_out = _fit(tokenize, class_names, count, position)
    if laid_out is not None:
        return laid_out
    most = next((fewer for fewer in range(count - 1, 0, -1) if _fit(tokenize, class_names, fewer, position)), 0)
    if most:
        raise UserError(
            f"{count} context tokens and the longest class name do not fit into what the model reads; "
            f"give --context_tokens {most} or less"
        )
    raise UserError(
        f"the model's tokenizer leaves no room for context vectors beside class names such as "
        f"{max(class_names, key=len)!r}; choose another model with --vlm"
    )


def _fit(
    tokenize: Callable[[list[str]], Tokens], class_names: Sequence[str], count: int, position: Position
) -> PromptTokens | None:
    """The layout, or None where the tokenizer does not give one that is whole.

    Prompts that differ in nothing but the placeholder word differ in the slots and nowhere else; and without the slots
    they are the prompts without a context, which shows that nothing was cut off at the end.
    """
    texts = [prompt_texts(class_names, [word] * count, position) for word in PLACEHOLDERS]
    bare = _bare(class_names, _words_before(count, position))
    tokens = tokenize([*(text for part in texts for text in part), *bare, ""])
    *rows, empty = tokens["input_ids"].split([len(class_names)] * (len(texts) + 1) + [1])
    kept = rows[0].shape[1] - count
    whole = rows.pop()
    if kept < 1 or (whole[:, kept:] != empty[0, -1]).any():
        return None
    for (first, one), (_, other) in combinations(enumerate(rows), 2):
        slots = one != other
        if (slots.sum(1) == count).all() and torch.equal(one[~slots].view(-1, kept), whole[:, :kept]):
            start = first * len(class_names)
            return PromptTokens({name: value[start : start + len(one)] for name, value in tokens.items()}, slots)
    return None


def text_ids(tokenize: Callable[[list[str]], Tokens], text: str, class_names: Sequence[str]) -> Tensor:
    """Token ids int64 (M,) of words that stand before a class name, without special tokens.

    Raises:
        UserError: they cannot be told apart from the name after them, or leave no room for it.
    """
    name = class_names[:1]
    bare, ids, empty = tokenize([*_bare(name, 1), *prompt_texts(name, [text], "end"), ""])["input_ids"]
    first = int((bare == empty).long().cumprod(0).sum())  # after the tokens with which every text begins
    count = int((bare == empty[-1]).sum()) - int((ids == empty[-1]).sum())
    rest = torch.cat([ids[:first], ids[first + max(count, 0) :]])
    if count > 0 and torch.equal(rest, bare[: len(rest)]):
        return ids[first : first + count]
    raise UserError(f"--context_init {text!r} cannot stand before {name[0]!r}; give other words, or fewer")


def token_embedding(network: nn.Module, encode: Callable[[Tokens], Tensor], tokens: Tokens) -> nn.Embedding:
    """The table in which a text tower looks up its tokens, known by watching it read.

    Raises:
        UserError: it has none.
    """
    tables: list[nn.Embedding] = []

    def note_table(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if arguments and torch.equal(arguments[0], tokens["input_ids"]):
            tables.append(module)

    hooks = [part.register_forward_pre_hook(note_table) for part in network.modules() if isinstance(part, nn.Embedding)]
    try:
        with torch.no_grad():
            encode(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    if len(tables) != 1:
        raise UserError(
            f"the text side of this {type(network).__name__} looks up its tokens in no plain embedding table, so there is "
            "no place for context vectors; choose another model with --vlm"
        )
    return tables[0]


def random_context(shape: tuple[int, ...], seed: int) -> Tensor:
    """Context vectors float32 of any shape (.., M, D) from N(0, 0.02^2)."""
    return torch.from_numpy(keyed_generator(seed, "context").normal(0, CONTEXT_STD, shape)).float()


class PromptLearner(nn.Module):
    """Text features of all classes as a function of the context vectors, the only parameter.

    The text tower is held as something foreign, not as a submodule: it is neither trained, nor moved, nor saved here.
    """

    def __init__(
        self,
        prompts: PromptTokens,
        context: Tensor,
        table: nn.Embedding,
        encode: Callable[[Tokens], Tensor],
    ) -> None:
        """Make the context trainable and leave the text tower as it is.

        Args:
            prompts: the layout.
            context: (M, D) shared by all classes, or (C, M, D) for each its own.
            table: the text tower's token embedding, with vectors of length D.
            encode: prompts as `tokens` -> features (C, E), through `table`, with gradient.
        """
        super().__init__()
        self.context = nn.Parameter(context)
        self._prompts, self._frozen = prompts, (table, encode)

    def forward(self) -> Tensor:
        """(C, E) text features of length 1."""
        table, encode = self._frozen
        hook = table.register_forward_hook(self._put)
        try:
            return nn.functional.normalize(encode(self._prompts.tokens), dim=-1)
        finally:
            hook.remove()

    def _put(self, table: nn.Module, arguments: tuple[Tensor, ...], looked_up: Tensor) -> Tensor:
        slots = self._prompts.slots
        vectors = self.context.expand(len(slots), -1, -1).flatten(0, 1)
        return looked_up.masked_scatter(slots.unsqueeze(-1), vectors.to(looked_up.dtype))
