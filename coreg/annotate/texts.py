"""Class names that a text tower cannot tell apart: the first of them would win every vote, and nothing would say so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from coreg.errors import UserError

SHOWN = 5  # of the groups or names in a message


def same_rows(rows: Tensor, tolerance: float = 0.0) -> Tensor:
    """Which rows are equal: int64 (C,), the same number for rows that agree within `tolerance` in every place.

    Args:
        rows: (C, L), features or token ids.

    Rows are compared with their neighbours along a fixed random direction, so that 10,000 classes take no 10^8 comparisons.
    """
    rows = rows.cpu().double()
    along = rows @ torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = along.argsort(stable=True)
    new = (rows[order[1:]] - rows[order[:-1]]).abs().amax(dim=1) > tolerance
    numbers = torch.empty(len(rows), dtype=torch.int64)
    numbers[order] = torch.cat([new.new_zeros(1), new]).cumsum(0)
    return numbers


def groups_of(numbers: Tensor) -> list[list[int]]:
    """The rows that share a number, int64 (C,) or (C, T), two or more a group, in ascending order."""
    _, inverse, counts = torch.unique(numbers, dim=0, return_inverse=True, return_counts=True)
    return sorted((inverse == number).nonzero()[:, 0].tolist() for number in (counts > 1).nonzero()[:, 0].tolist())


def refuse_same(numbers: Tensor, class_names: Sequence[str], model: str) -> None:
    """Refuse classes that are the same to a model.

    Args:
        numbers: int64 (C,) or (C, T) of `same_rows`, a column a template. model: its spelling.

    Raises:
        UserError: two classes have the same numbers.
    """
    if groups := groups_of(numbers):
        raise UserError(
            f"{model} reads the same in {_named(groups, class_names)} and cannot tell them apart; write class names that "
            f"differ in letters or words, within what the model reads of a text"
        )


def _named(groups: list[list[int]], class_names: Sequence[str]) -> str:
    shown = [" and ".join(repr(class_names[c]) for c in group[:3]) + " …" * (len(group) > 3) for group in groups[:SHOWN]]
    return "; ".join(shown) + f"; and {len(groups) - SHOWN} more groups" * (len(groups) > SHOWN)


def compare_texts(
    features: Tensor, cut: Tensor, templates: Sequence[str], class_names: Sequence[str], model: str, tolerance: float
) -> list[str]:
    """Look for texts that are cut off, and for classes with the same text features.

    Args:
        features: (T*C, D), template by template. cut: bool (C,), classes with a text longer than what the model reads.
        tolerance: up to which features count as equal.

    Returns:
        What a person should know, one line each: names that are cut off, and classes that are the same in some templates.

    Raises:
        UserError: two classes are the same in every template.
    """
    shape = (len(templates), len(class_names))
    numbers = torch.stack([same_rows(text, tolerance) for text in features.view(*shape, -1)], dim=1)
    refuse_same(numbers, class_names, model)
    notes = []
    if long := cut.nonzero()[:, 0].tolist():
        names = ", ".join(repr(class_names[c]) for c in long[:SHOWN]) + " …" * (len(long) > SHOWN)
        notes.append(
            f"{model} does not read to the end of the texts of {len(long)} of {len(class_names)} classes ({names}); "
            f"shorter names are read whole"
        )
    for template, column in zip(templates, numbers.T):
        if groups := groups_of(column):
            notes.append(f"the template {template!r} is the same text for {_named(groups, class_names)}")
    return notes[: SHOWN + 1]
