"""Which rows a step sees: global orders that every process computes alike from keys.

A step's batch is a pure function of (seed, epoch, network, step), so a resumed job needs no sampler state.
"""

from __future__ import annotations

import numpy as np
import torch

from coreg.data.keyed import keyed_generator, keyed_order, keyed_uniform

LARGE = 1 << 20  # rows above which an order is computed and never held
PART = 1 << 14  # rows of such an order that are computed at once


def n_batches(n: int, batch_size: int) -> int:
    """Batches that cover n rows, the last one possibly smaller."""
    return -(-n // batch_size)


def drawn_part(rows: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The first `n` of rows int64 (m,) in an order that the seed draws, in increasing order.

    Every row has a key of its own, so that a smaller part lies within a larger one, whatever other rows there are.
    """
    keys = keyed_uniform((seed, "part"), torch.from_numpy(rows), 1)[:, 0].numpy()
    return np.sort(rows[np.lexsort((rows, keys))[:n]])


class ShuffledRows:
    """Rows in batches, shuffled anew in every round; a batch is asked for by its number and rounds follow each other.

    Batch normalisation cannot normalise over one image whose feature map is one pixel. So no batch has fewer than
    `smallest` rows: what is left over at the end of a round joins the batch before it, and where there are fewer rows in
    all, they are repeated. Sizes are those of global batches, the same for any number of processes.

    Orders of at most `LARGE` rows are permutations that are held, as they were before there were larger ones; those of more
    rows are computed some batches at a time by a keyed bijection, and never held.
    """

    def __init__(self, rows: np.ndarray, batch_size: int, key: tuple[int | str, ...], smallest: int = 2) -> None:
        """Prepare endless rounds over `rows`, each in an order of its own.

        Args:
            rows: int64 (n,), possibly none. batch_size: at least `smallest`. key: names the orders.
            smallest: 1 where nothing is normalised over a batch.
        """
        self.rows = np.resize(rows, smallest) if 0 < len(rows) < smallest else rows
        self.batch_size = batch_size
        self.key = key
        joins = len(self.rows) > batch_size and 0 < len(self.rows) % batch_size < smallest
        self.per_round = n_batches(len(self.rows), batch_size) - joins
        # batches whose rows are computed at once: more than are read ahead
        self.per_part = max(16, PART // batch_size) if len(self.rows) > LARGE else max(self.per_round, 1)
        self._parts: dict[
            tuple[int, int], np.ndarray
        ] = {}  # by round and number: the two last, because rows are read ahead

    def batch(self, step: int) -> np.ndarray:
        """The global batch of a step, int64 (< batch_size + smallest,); empty where there are no rows at all."""
        if not self.per_round:
            return self.rows
        number, place = divmod(step, self.per_round)
        part, within = divmod(place, self.per_part)
        if (number, part) not in self._parts:
            last = list(self._parts.items())[-1:]
            self._parts = dict(last) | {(number, part): self._part(number, part)}
        rows = self._parts[number, part]
        stop = len(rows) if place + 1 == self.per_round else (within + 1) * self.batch_size
        return rows[within * self.batch_size : stop]

    def _part(self, number: int, part: int) -> np.ndarray:
        """The rows of `per_part` batches of a round, or of those that are left."""
        if len(self.rows) <= LARGE:
            return keyed_generator(*self.key, number).permutation(self.rows)
        start = part * self.per_part * self.batch_size
        left = (part + 1) * self.per_part >= self.per_round
        places = np.arange(start, len(self.rows) if left else start + self.per_part * self.batch_size)
        return self.rows[keyed_order((*self.key, number), len(self.rows), places)]
