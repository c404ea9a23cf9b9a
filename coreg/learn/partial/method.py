"""The seam between a network and a method that learns from candidate sets.

A method remembers something of every training image in tables (N, ...) among its buffers, so that checkpoints keep them.
`loss` only reads tables, `update` only writes them, and both are handed what the network said. Tables are the same on all
processes: what one process learned about its rows is gathered in the order of the global batch and written everywhere.

Shapes: N training images, C classes, D projected features; a global batch of n rows, of which l are this process's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from coreg.learn.collective import gather_rows, my_slice
from coreg.learn.partial_options import PartialOptions


@dataclass(frozen=True)
class Step:
    """When a step happens: `epoch` epochs out of `epochs` are finished."""

    epoch: int
    epochs: int

    def reached(self, part: float) -> bool:
        """Whether this share of all epochs is over."""
        return self.epoch >= part * self.epochs


@dataclass(frozen=True)
class Passes:
    """What a method wants a step to look at.

    views: kinds of view (`weak`, `strong`) that go through the network with gradient. key: kind of the view that goes
    through the momentum encoder. glance: kind of one more view through the network, without gradient.
    mixup: the first view mixed with those of the same `batch`, or with those of a second pass over the `epoch`.
    """

    views: tuple[str, ...] = ("weak",)
    key: str | None = None
    glance: str | None = None
    mixup: Literal["none", "batch", "epoch"] = "none"


@dataclass
class Mixed:
    """What the network said about mixed views: share_kept x + (1 - share_kept) partner.

    logits: (l, C). partner: (l,) int64, places in the global batch (`batch`) or rows of the training set (`epoch`).
    """

    logits: Tensor
    partner: Tensor
    share_kept: float


@dataclass
class Outputs:
    """What the network said about this process's rows.

    logits, features: (l, C) and (l, D) of each view. keys, glance: (l, D), features of the other two passes.
    """

    logits: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    keys: Tensor | None = None
    glance: Tensor | None = None
    mixed: Mixed | None = None


class PartialMethod(nn.Module):
    """A loss on candidate sets and the state it needs; derived classes say what differs.

    reads_again: `update` gets what the network says about the batch after its weights have moved, not before.
    """

    reads_again = False

    def __init__(self, options: PartialOptions) -> None:
        super().__init__()
        self.options = options

    def init(self, candidates: Tensor, certain: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        """Begin with these candidate sets.

        Args:
            candidates: bool (N, C), at least one True a row. certain: bool (N,), images that a person labelled: their
                candidate sets are never doubted. dtype: of the tables.
        """
        certain = torch.zeros(len(candidates), dtype=torch.bool) if certain is None else certain
        # they come from the annotation store in every start
        self.register_buffer("candidates", candidates.clone(), persistent=False)
        self.register_buffer("certain", certain.clone(), persistent=False)

    def passes(self, step: Step) -> Passes:
        """What this step has to look at."""
        return Passes()

    def loss(self, outputs: Outputs, index: Tensor, step: Step) -> dict[str, Tensor]:
        """The step's `loss` and its parts, scalars: sums over this process's rows divided by global counts.

        Added up over all processes, every one is a mean over the global batch (`reliable` and `guessed` of PiCO+: over its
        rows that are reliable, and that are not).

        Args:
            index: int64 (n,), training rows of the global batch.
        """
        raise NotImplementedError

    def update(self, outputs: Outputs, index: Tensor, step: Step) -> None:
        """Learn from what the network said; called without gradient, on all processes."""

    def finish_epoch(self, step: Step) -> dict[str, float]:
        """Draw conclusions from the epoch that `step` belongs to; gives curves."""
        return {}


def my_rows(index: Tensor) -> Tensor:
    """This process's rows of the global batch `index`."""
    return index[my_slice(len(index))]


def write(table: Tensor, index: Tensor, values: Tensor) -> None:
    """Write what all processes found out about their rows, (l, ...) each, into the table (N, ...)."""
    table[index] = gather_rows(values, len(index)).to(table.dtype)


def uniform(candidates: Tensor, dtype: torch.dtype) -> Tensor:
    """Distributions that are uniform on the candidate sets. bool (N, C) -> (N, C)."""
    return candidates.to(dtype) / candidates.sum(dim=1, keepdim=True)


def within(log_scores: Tensor, members: Tensor) -> Tensor:
    """Softmax over the members of each row alone, zero elsewhere; a row without members is zero. (n, C), bool (n, C)."""
    some = members.any(dim=1, keepdim=True)
    masked = log_scores.masked_fill(~members & some, -torch.inf)
    return torch.softmax(masked, dim=1) * some
