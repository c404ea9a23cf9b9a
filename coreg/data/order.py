"""Which rows a step sees: global orders that every process computes alike from keys.

A step's batch is a pure function of (seed, epoch, network, step), so a resumed job needs no sampler state.
"""

from __future__ import annotations

import numpy as np

from coreg.data.keyed import keyed_generator


def n_batches(n: int, batch_size: int) -> int:
    """Batches that cover n rows, the last one possibly smaller."""
    return -(-n // batch_size)


class ShuffledRows:
    """Rows in batches, shuffled anew in every round; a batch is asked for by its number and rounds follow each other."""

    def __init__(self, rows: np.ndarray, batch_size: int, key: tuple[int | str, ...]) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.key = key
        self.per_round = n_batches(len(rows), batch_size)
        self._round, self._order = -1, rows

    def batch(self, step: int) -> np.ndarray:
        """The global batch of a step, int64 (<= batch_size,); empty where there are no rows at all."""
        if not self.per_round:
            return self.rows
        number, place = divmod(step, self.per_round)
        if number != self._round:
            self._order = keyed_generator(*self.key, number).permutation(self.rows)
            self._round = number
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]
