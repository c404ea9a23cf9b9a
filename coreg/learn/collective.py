"""Rows shared out over processes and brought back in their global order.

Every process knows the global batch, so the shares need no communication, and shares may be uneven or empty.
Without a process group everything is the identity.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_with_grad
from torch import Tensor


def rank_and_world() -> tuple[int, int]:
    """(rank of this process, number of processes); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def my_slice(n: int, rank: int | None = None) -> slice:
    """The rows of a global batch of n that a process holds: contiguous, as even as possible, possibly none."""
    own, world = rank_and_world()
    rank = own if rank is None else rank
    return slice(n * rank // world, n * (rank + 1) // world)


def gather_rows(rows: Tensor, n: int) -> Tensor:
    """All n rows of a batch shared out by `my_slice`, in global order, with gradient where `rows` has one.

    Args:
        rows: (share, ...), the rows of this process. n: rows of the global batch.

    Returns:
        (n, ...), the same on every process. The gradient of a row is the sum over all processes' uses of it.
    """
    _, world = rank_and_world()
    if world == 1:
        return rows
    counts = [(s.stop - s.start) for s in (my_slice(n, r) for r in range(world))]
    longest = max(counts)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    # collectives want equal shapes: pad, gather, cut
    padded = torch.cat([rows, padded[len(rows) :]]).contiguous()
    if rows.requires_grad and torch.is_grad_enabled():
        pieces = dist_with_grad.all_gather(padded)
    else:
        pieces = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(pieces, padded)
    return torch.cat([piece[:count] for piece, count in zip(pieces, counts)])


def my_rows(index: Tensor) -> Tensor:
    """This process's rows of the global batch `index`."""
    return index[my_slice(len(index))]


def write_rows(table: Tensor, index: Tensor, values: Tensor) -> None:
    """Write the values of all processes' rows, (l, ...) each, into the table (N, ...)."""
    table[index] = gather_rows(values, len(index)).to(table.dtype)
