"""Tables with a row for each of the N training images: whole on every process, or on each the rows that it owns.

A process owns the rows of `my_slice(N)`, which are also those that it predicts. Float64 copies of a table are made a few
rows at a time: that of a million images and a thousand classes would take 8 GB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from coreg.learn.collective import gather_rows, my_slice, rank_and_world
from coreg.learn.division import Predicted

PIECE = 1 << 18  # entries of a table that are held in float64, or sent to one process, at a time: a cache has room for them


@dataclass
class OwnedRows:
    """A table (N, ...) of which each process holds the rows that it owns."""

    rows: Tensor  # (n, ...), rows `my_slice(N)`
    count: int  # N

    def share(self, batch: np.ndarray) -> Tensor:
        """Rows of this process's share of the global batch int64 (b,), sent by their owners; all processes take part."""
        rank, world = rank_and_world()
        starts = np.array([my_slice(self.count, process).start for process in range(world)])
        owner = np.searchsorted(starts, batch, side="right") - 1  # of empty shares that start there too the last one
        shares = [my_slice(len(batch), process) for process in range(world)]
        sent = [batch[share][owner[share] == rank] - starts[rank] for share in shares]
        mine = owner[shares[rank]]
        rows = self.rows[torch.from_numpy(np.concatenate(sent)).to(self.rows.device, non_blocking=True)]
        if world > 1:
            whole = rows.contiguous().view(torch.uint8) if rows.dtype == torch.bool else rows.contiguous()
            taken = whole.new_empty((len(mine), *whole.shape[1:]))
            dist.all_to_all_single(taken, whole, np.bincount(mine, minlength=world).tolist(), [len(part) for part in sent])
            rows = taken.view(rows.dtype)
        # they come owner by owner
        place = np.argsort(np.argsort(mine, kind="stable"), kind="stable")
        return rows[torch.from_numpy(place).to(rows.device, non_blocking=True)]

    def gathered(self) -> Tensor | None:
        """(N, ...) in the memory of process 0, None on the others; all processes take part."""
        rank, world = rank_and_world()
        if world == 1:
            return self.rows.cpu()
        whole = torch.empty((self.count, *self.rows.shape[1:]), dtype=self.rows.dtype) if rank == 0 else None
        step = max(1, PIECE // max(1, math.prod(self.rows.shape[1:])))
        for process in range(world):
            part = my_slice(self.count, process)
            for start in range(part.start, part.stop, step):
                stop = min(start + step, part.stop)
                some = self.rows.new_empty((stop - start, *self.rows.shape[1:]))
                if process == rank:
                    some = self.rows[start - part.start : stop - part.start].contiguous()
                dist.broadcast(some, process)
                if whole is not None:
                    whole[start:stop] = some.cpu()
        return whole


Table = Tensor | OwnedRows


def rows_here(table: Table) -> slice:
    """Which of the N rows this process holds."""
    return my_slice(table.count) if isinstance(table, OwnedRows) else slice(0, len(table))


def held(table: Table) -> Tensor:
    """The rows that this process holds."""
    return table.rows if isinstance(table, OwnedRows) else table


def rows_like(table: Table, rows: Tensor) -> Table:
    """These rows (n, ...) as a table whose rows lie where those of `table` do."""
    return OwnedRows(rows, table.count) if isinstance(table, OwnedRows) else rows


def owned(table: Tensor, device: torch.device) -> OwnedRows:
    """The rows of a whole table (N, ...) that this process owns, copied to the device."""
    return OwnedRows(table[my_slice(len(table))].clone().to(device), len(table))


def share(table: Table, batch: np.ndarray) -> Tensor:
    """The rows of this process's share (`my_slice`) of the global batch int64 (b,); all processes have to call it."""
    if isinstance(table, OwnedRows):
        return table.share(batch)
    return table[torch.from_numpy(batch[my_slice(len(batch))]).to(table.device, non_blocking=True)]


def log_probabilities(logits: Table) -> Iterator[tuple[slice, np.ndarray]]:
    """Log probabilities, float64 (k, C), of some of the rows here after the others, and where they stand among those."""
    rows = held(logits)
    step = max(1, PIECE // rows.shape[1])
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        yield part, torch.log_softmax(rows[part].double(), dim=1).cpu().numpy()


def every_row(values: np.ndarray, table: Table) -> np.ndarray:
    """(N,) of `values` (n,) for the rows of `table` that are here; all processes have to call it."""
    if not isinstance(table, OwnedRows):
        return values
    return gather_rows(torch.from_numpy(values).to(table.rows.device), table.count).cpu().numpy()


def predicted(logits: Table) -> Predicted:
    """What these logits (N, C) predict, in short; all processes have to call it."""
    n, n_classes = held(logits).shape
    classes, sums, strange = np.zeros(n, dtype=np.int64), np.zeros((0, n_classes)), 0
    for part, log_p in log_probabilities(logits):
        classes[part] = log_p.argmax(axis=1)
        strange += np.count_nonzero(~np.isfinite(log_p))
        # one row after another, as the sum of the whole table would be: in every bit the same
        sums = np.concatenate([sums, np.exp(log_p)]).sum(axis=0, keepdims=True)
    count = n
    if isinstance(logits, OwnedRows):
        count, mine = logits.count, np.zeros((1, n_classes + 1))
        mine[0, :-1], mine[0, -1] = sums.sum(axis=0), strange
        every = gather_rows(torch.from_numpy(mine).to(logits.rows.device), rank_and_world()[1]).cpu().numpy()
        sums, strange = every[:, :-1].sum(axis=0, keepdims=True), every[:, -1].sum()
    return Predicted(every_row(classes, logits), sums[0] / count, not strange)
