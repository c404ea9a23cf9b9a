"""What SoLar, RECORDS and HTC share: a part of the images selected, views mixed within the step.

What is mixed may depend on the network's outputs, so batches do not bring it. It is drawn for the global batch, and images
of other processes are gathered where they are partners.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coreg.learn.collective import gather_rows, my_slice
from coreg.learn.partial.method import PartialBatch
from coreg.learn.pseudo import draw_mixup, mix


def smallest(losses: Tensor, classes: Tensor, quota: Tensor) -> Tensor:
    """bool (n,), the images whose losses are the smallest of their class: its quota of them, rounded up, one at least.

    Args:
        losses: (n,). classes: int64 (n,). quota: (C,).
    """
    order = losses.argsort(stable=True)
    member = nn.functional.one_hot(classes[order], len(quota))
    rank = (member.cumsum(dim=0) * member).sum(dim=1)  # from 1 on
    kept = rank <= quota.ceil().clamp_min(1)[classes[order]]
    return torch.zeros_like(kept).scatter_(0, order, kept)


def draw_partners(batch: PartialBatch, alpha: float, name: str, among: Tensor | None = None) -> tuple[float, Tensor]:
    """MixUp's lambda, and a partner for every row of the global batch: int64 (n,), places in it.

    Args:
        name: of the draw, where there are several in a step. among: bool (n,), rows that are mixed among themselves.
    """
    kept, drawn = draw_mixup(alpha, batch.size, (*batch.draws, name))
    order = torch.from_numpy(drawn).to(batch.index.device, non_blocking=True)
    if among is None:
        return kept, order
    others = (~among).to(torch.uint8)
    # these rows first, in the order that was drawn and in their own
    shuffled, places = order[others[order].argsort(stable=True)], others.argsort(stable=True)
    return kept, torch.empty_like(order).scatter_(0, places, shuffled)


def mixed_view(view: Tensor, n: int, partner: Tensor, share_kept: float) -> Tensor:
    """(l, c, H, W), this process's rows of a view mixed with their partners, int64 (n,) places in the global batch."""
    return mix(view, gather_rows(view, n)[partner[my_slice(n)]], share_kept)
