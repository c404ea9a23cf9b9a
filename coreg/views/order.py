"""Which rows a step sees: global orders that every process computes alike from keys.

A step's batch is a pure function of (seed, epoch, network, step), so a resumed job needs no sampler state.
"""

from __future__ import annotations

import numpy as np
import torch

from coreg.data.keyed import keyed_generator, keyed_order, keyed_uniform

LARGE = 1 << 20  # rows above which an order is computed place by place and never held


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
    rows are computed for each batch by a keyed bijection, which takes no memory.
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
        self._orders: dict[int, np.ndarray] = {}  # by round: the two last asked for, because rows are read ahead

    def batch(self, step: int) -> np.ndarray:
        """The global batch of a step, int64 (< batch_size + smallest,); empty where there are no rows at all."""
        if not self.per_round:
            return self.rows
        number, place = divmod(step, self.per_round)
        start = place * self.batch_size
        stop = len(self.rows) if place + 1 == self.per_round else start + self.batch_size
        if len(self.rows) > LARGE:
            return self.rows[keyed_order((*self.key, number), len(self.rows), np.arange(start, stop))]
        if number not in self._orders:
            last = list(self._orders.items())[-1:]
            self._orders = dict(last) | {number: keyed_generator(*self.key, number).permutation(self.rows)}
        return self._orders[number][start:stop]
