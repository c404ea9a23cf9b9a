"""What is known of labels where an image has any number of them: drawn from true labels, from a person, or nothing.

Labels of N images are int8 (N, L): +1 present, -1 absent, 0 unknown, of true and of observed labels alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from coreg.data.keyed import keyed_uniform
from coreg.errors import UserError

PUBLISHED_SEED = 1200


def published_draw(truth: np.ndarray, positives: int = 1, negatives: int = 0, seed: int = PUBLISHED_SEED) -> np.ndarray:
    """Observed labels as the public code draws them, bit for bit (Cole et al., CVPR 2021; so in VLPL, Xing et al., 2024).

    Row after row, the present labels are shuffled and the first ones kept, then the absent ones, which are shuffled too
    where none is kept. It is drawn on all of the official training set, before images are put aside for validation.

    Args:
        truth: int8 (N, L). positives, negatives: how many an image keeps, all where it has fewer; -1 for all.

    Returns:
        int8 (N, L).
    """
    generator, observed = np.random.RandomState(seed), np.zeros_like(truth)
    for row, labels in enumerate(truth):
        for state, count in ((1, positives), (-1, negatives)):
            (places,) = np.nonzero(labels == state)
            generator.shuffle(places)
            observed[row, places[: count if count >= 0 else None]] = state
    return observed


def published_split(n: int, share: float = 0.2, seed: int = PUBLISHED_SEED) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows for validation, of n, as the public code splits them; int64, each in increasing order."""
    order = np.random.RandomState(seed).permutation(n)
    kept = n - round(share * n)
    return np.sort(order[:kept]), np.sort(order[kept:])


def keyed_draw(truth: np.ndarray, positives: int, negatives: int, seed: int, rows: np.ndarray | None = None) -> np.ndarray:
    """As `published_draw`, but what an image keeps depends on the seed and on the image alone.

    A larger number adds to what a smaller one keeps.

    Args:
        truth: int8 (N, L). positives, negatives: how many an image keeps, all where it has fewer; -1 for all.
        rows: int64 (N,), rows of the image list; 0 ... N-1 by default.

    Returns:
        int8 (N, L).
    """
    draws, observed = _draws(truth, seed, rows), np.zeros_like(truth)
    for state, count in ((1, positives), (-1, negatives)):
        rank = np.where(truth == state, draws, 2).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        observed[(truth == state) & ((rank < count) | (count < 0))] = state
    return observed


def share_draw(
    truth: np.ndarray, positives: float, negatives: float, seed: int, rows: np.ndarray | None = None
) -> np.ndarray:
    """Every present label is observed with one probability and every absent label with another.

    A larger share adds to what a smaller one keeps. Arguments and result as for `keyed_draw`.

    Raises:
        UserError: a share out of [0, 1].
    """
    for name, value in (("positives", positives), ("negatives", negatives)):
        if not 0 <= value <= 1:
            raise UserError(f"--{name} is {value}; give a share from 0 to 1")
    kept = _draws(truth, seed, rows) < np.where(truth == 1, positives, negatives)
    return np.where(kept, truth, 0).astype(truth.dtype)


def _draws(truth: np.ndarray, seed: int, rows: np.ndarray | None) -> np.ndarray:
    """float32 (N, L), uniform in [0, 1)."""
    rows = np.arange(len(truth)) if rows is None else rows
    return keyed_uniform((seed, "observed labels"), torch.from_numpy(rows), truth.shape[1]).numpy()


def suggestions(probabilities: np.ndarray, threshold: float, absent_share: float = 0.0) -> np.ndarray:
    """What an annotator's probabilities suggest (VLPL, Xing et al., CVPR workshops 2024, eq. 3).

    Labels above the threshold are suggested to be present, so fewer than 1 / threshold of an image where they add up to 1,
    and the floor(absent_share L) smallest to be absent.

    Args:
        probabilities: float64 (N, L); in the paper the softmax over the labels of similarity / temperature. The public code
            takes 0.01 for a temperature whatever the data set is; the paper's numbers need one of each
            (`coreg.learn.multi_options`).

    Returns:
        int8 (N, L).
    """
    rank = probabilities.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    # 0.29 of 100 labels are 29, not the 28.999... of binary numbers
    absent = np.floor(absent_share * probabilities.shape[1] + 1e-9)
    suggested = np.where(rank < absent, -1, 0)
    return np.where(probabilities > threshold, 1, suggested).astype(np.int8)


@dataclass(frozen=True)
class ObservedLabels:
    """What is known of L labels of N images."""

    table: np.ndarray  # int8 (N, L), observed labels
    samples: np.ndarray  # int64 (N,), rows of the image list
    truth: np.ndarray  # int8 (N, L), true labels; for reports alone
    source: dict[str, Any]  # plain values: how the observed labels were drawn, or where they come from
    evidence: np.ndarray | None = None  # float64 (N, L), how probable an annotator holds each label, where there is one

    @classmethod
    def from_truth(
        cls, truth: np.ndarray, samples: np.ndarray, generator: str, positives: float, negatives: float, seed: int
    ) -> ObservedLabels:
        """Keep some of the true labels: `published`, whose seed is its own, `numbers` (keyed) or `shares`.

        Args:
            truth: int8 (N, L). samples: int64 (N,), rows of the image list. positives, negatives: as for the draws.

        Raises:
            UserError: numbers that are not whole, or shares out of [0, 1].
        """
        source = {"generator": generator, "positives": positives, "negatives": negatives}
        if generator == "shares":
            table = share_draw(truth, positives, negatives, seed, samples)
        elif positives != int(positives) or negatives != int(negatives):
            raise UserError("--positives and --negatives are no whole numbers; write --observed shares for shares")
        elif generator == "published":
            table, seed = published_draw(truth, int(positives), int(negatives)), PUBLISHED_SEED
        else:
            table = keyed_draw(truth, int(positives), int(negatives), seed, samples)
        return cls(table, samples, truth, source | {"seed": seed})

    def at(self, places: np.ndarray) -> ObservedLabels:
        """The same of some of the images, int64 (n,), numbers in [0, N)."""
        return replace(
            self,
            table=self.table[places],
            samples=self.samples[places],
            truth=self.truth[places],
            evidence=None if self.evidence is None else self.evidence[places],
        )

    def revealed(self) -> ObservedLabels:
        """The true labels in the place of the observed ones."""
        return replace(self, table=self.truth, source=self.source | {"revealed": True})
