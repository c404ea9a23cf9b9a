"""A mixture of Gaussians whose classes an annotator names, rightly or wrongly.

Images of a class lie together in the features of a network, whatever an annotator calls them. So the classes are Gaussians
that share one covariance, fitted by EM (Dempster, Laird and Rubin, 1977) with the annotator's probabilities as evidence of
each image's class, in the two ways in which such evidence can be read and their mean: as a prior of the image, or as an
observation that depends on the class through a confusion matrix (Dawid and Skene, "Maximum likelihood estimation of
observer error-rates using the EM algorithm", 1979). With features z_i (d,) of N images, Q (N, C) the annotator's
probabilities and q (N, C) the classes' responsibilities, which begin as Q, a round is

    mu_c = sum_i q_ic z_i / sum_i q_ic          S = 1/N (sum_i z_i z_i' - sum_ic q_ic mu_c mu_c')
    S <- (1 - s) S + s tr(S)/d I                Pi_cj = (sum_i q_ic Q_ij + 1/2C) / row sum
    a_ic = w log max(Q_ic, 1e-4) + (1 - w) log max(sum_j Pi_cj Q_ij, 1e-6)
    q_ic ~ exp(a_ic + z_i' S^-1 mu_c - 1/2 mu_c' S^-1 mu_c + b_c)

where b balances the classes: q's column means are the prior (Sinkhorn's iteration). Where the classes' shares are estimated
with the rest there is nothing to balance, and b_c = log((1/2 + sum_i q_ic) / (N + C/2)): the likeliest ones, up to the half
image that keeps a class alive. Without a, and without a b that balances, the last line is the linear discriminant that
classifies images of which the annotator says nothing.

Everything runs over blocks of rows, q of a block being computed anew from the mixture of the round before. Beside the
inputs there is, for b, one table of exponents: float64, as all arithmetic is, while N C is at most 2^25, float16 with
arithmetic in float32 beyond that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import softmax

Prior = Literal["uniform", "annotator", "estimated"]
LEAST_DIMENSIONS = 64  # of the features, or as many as the means of C classes can span, C - 1
IMAGES_A_DIMENSION = 10  # at least; more dimensions would be fitted to too few images
SHRINKAGE, ROUNDS = 0.1, 10
LEAST_PRIOR, LEAST_OBSERVED = 1e-4, 1e-6  # an annotator is never quite sure
BALANCED, MOST_STEPS = 1e-3, 100  # largest relative error of a class's share, and steps a round until it
ENTRIES_IN_FLOAT64 = 1 << 25  # of (N, C)
ENTRIES_AT_ONCE = 1 << 22
LEAST_EXPONENT = -6e4  # a float16; its exponential is 0


@dataclass(frozen=True)
class Setting:
    """How evidence is read."""

    weight: float  # w, 1 for a prior, 0 for an observation through a confusion matrix
    prior: Prior  # shares of the classes: equal, as in the annotator's mean prediction, or estimated with the rest


class Subset:
    """Rows (n,) of a table (N, ...), gathered when they are asked for: what a block needs is copied, the table is not."""

    def __init__(self, table: np.ndarray, rows: np.ndarray) -> None:
        self.table, self.rows, self.shape = table, rows, (len(rows), *table.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self.table[self.rows[rows]]


Table = np.ndarray | Subset


# ---- features -------------------------------------------------------------------------------------------------------


@dataclass
class Projection:
    """Standardised features on their principal axes."""

    mean: np.ndarray  # (D,)
    axes: np.ndarray  # (D, d), with the deviations divided out

    def __call__(self, features: Table) -> np.ndarray:
        """(n, D) of any float type -> (n, d), float64, or float32 for many."""
        n, d = len(features), self.axes.shape[1]
        exact = precision(n, max(d, features.shape[1]))
        out = np.empty((n, d), dtype=exact)
        mean, axes = self.mean.astype(exact), self.axes.astype(exact)
        for rows in blocks(n, features.shape[1]):
            out[rows] = (features[rows].astype(exact) - mean) @ axes
        return out


def fit_projection(features: Table, classes: int) -> Projection:
    """Principal axes of standardised features.

    Args:
        features: (N, D) of any float type, N >= 1; a feature that does not vary counts for nothing.
        classes: C. d is C - 1, at least 64, but never more than N / 10, nor than D.
    """
    n, width = features.shape
    mean = sum(features[rows].astype(np.float64).sum(axis=0) for rows in blocks(n, width)) / n
    covariance = np.zeros((width, width))
    exact = precision(n, width)
    for rows in blocks(n, width):
        centred = features[rows].astype(exact) - mean.astype(exact)
        covariance += (centred.T @ centred).astype(np.float64) / n
    deviation = np.sqrt(np.diagonal(covariance))
    varies = deviation > 1e-6 * np.abs(mean)
    scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
    values, axes = np.linalg.eigh(covariance * scale * scale[:, None])
    d = max(1, min(max(LEAST_DIMENSIONS, classes - 1), n // IMAGES_A_DIMENSION, width))
    axes = axes[:, np.argsort(-values, kind="stable")[:d]]
    axes *= np.where(axes[np.abs(axes).argmax(axis=0), np.arange(d)] < 0, -1, 1)  # a sign that no library decides
    return Projection(mean, scale[:, None] * axes)


# ---- the mixture ----------------------------------------------------------------------------------------------------


@dataclass
class Mixture:
    """A fitted mixture of C classes in d dimensions."""

    weights: np.ndarray  # (d, C), S^-1 mu
    offset: np.ndarray  # (C,), 1/2 mu' S^-1 mu, minus the log of a class's share where that is estimated
    confusion: np.ndarray  # (C, C), Pi; row c is how the annotator names images of class c
    balance: np.ndarray  # (C,), b where it balances, else 0
    shares: np.ndarray  # (C,), mean of q over the images that it was fitted to
    setting: Setting  # as it was fitted

    def of_view(self, z: np.ndarray) -> np.ndarray:
        """Logits (n, C) of projected features alone."""
        return z @ self.weights.astype(z.dtype) - self.offset.astype(z.dtype)

    def of_both(self, z: np.ndarray, evidence: np.ndarray) -> np.ndarray:
        """Logits (n, C) of projected features and normalised evidence Q (n, C), without balance."""
        w, scores = self.setting.weight, self.of_view(z)
        if w > 0:
            scores += _weighted_log(np.maximum(evidence, LEAST_PRIOR), w)
        if w < 1:
            observed = self.observed(evidence)
            scores += _weighted_log(np.maximum(observed, LEAST_OBSERVED, out=observed), 1 - w)
        return scores

    def observed(self, evidence: np.ndarray) -> np.ndarray:
        """sum_j Pi_cj Q_ij, (n, C): how well each class explains what the annotator named."""
        return evidence @ self.confusion.T.astype(evidence.dtype)


def _weighted_log(x: np.ndarray, weight: float) -> np.ndarray:
    """weight log x, in the place of x."""
    np.log(x, out=x)
    x *= weight
    return x


def normalised(probs: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """Rows (n, C) that sum to 1; a row of zeros becomes uniform."""
    rows = probs.astype(dtype)
    total = rows.sum(axis=1, keepdims=True)
    rows /= np.where(total > 0, total, 1)
    rows[total[:, 0] <= 0] = 1 / rows.shape[1]
    return rows


def fit_mixture(
    z: np.ndarray,
    probs: Table,
    setting: Setting,
    rounds: int = ROUNDS,
    shrinkage: float = SHRINKAGE,
    slack: float = 0.0,
) -> Mixture:
    """Fit the mixture by `rounds` rounds of EM.

    Args:
        z: (N, d), projected features. probs: (N, C) of any float type, the annotator's, rows of any sum.
        slack: see `balanced`.

    Returns:
        the mixture; log q of any image is its `of_both` plus its `balance`, up to a number a row.
    """
    n, classes = probs.shape
    exact = precision(n, classes)
    scatter, means = np.zeros((z.shape[1], z.shape[1])), np.zeros((classes, z.shape[1]))
    sums = _Sums(classes, z.shape[1])
    for rows in blocks(n, classes):
        block, evidence = z[rows].astype(exact, copy=False), normalised(probs[rows], exact)
        scatter += block.T @ block
        sums.add(evidence, block, evidence)
    prior = {
        "uniform": np.full(classes, 1 / classes),
        "annotator": (sums.size + 0.5) / (n + 0.5 * classes),
        "estimated": None,
    }[setting.prior]
    balance, logits = np.zeros(classes), None
    if prior is not None:
        logits = np.empty((n, classes), dtype=np.float64 if exact is np.float64 else np.float16)
    for _ in range(rounds):
        mixture, means = _maximise(sums, means, scatter, n, shrinkage, setting)
        if prior is not None:
            for rows in blocks(n, classes):
                scores = mixture.of_both(z[rows].astype(exact, copy=False), normalised(probs[rows], exact))
                logits[rows] = np.maximum(scores - scores.max(axis=1, keepdims=True), LEAST_EXPONENT)
            balance = balanced(logits, prior, balance, exact, slack)
        mixture.balance, sums = balance, _Sums(classes, z.shape[1])
        for rows in blocks(n, classes):
            block, evidence = z[rows].astype(exact, copy=False), normalised(probs[rows], exact)
            scores = mixture.of_both(block, evidence) if logits is None else logits[rows].astype(exact)
            scores += balance.astype(exact)
            sums.add(softmax(scores, axis=1), block, evidence)
        mixture.shares = sums.size / n
    return mixture


class _Sums:
    """What a round needs of the responsibilities: sum q (C,), sum q z (C, d), sum q Q (C, C)."""

    def __init__(self, classes: int, dimensions: int) -> None:
        self.size, self.first, self.named = np.zeros(classes), np.zeros((classes, dimensions)), np.zeros((classes, classes))

    def add(self, q: np.ndarray, z: np.ndarray, evidence: np.ndarray) -> None:
        self.size += q.sum(axis=0)
        self.first += q.T @ z
        self.named += q.T @ evidence


def _maximise(
    sums: _Sums, means: np.ndarray, scatter: np.ndarray, n: int, shrinkage: float, setting: Setting
) -> tuple[Mixture, np.ndarray]:
    """The mixture that the sums make likeliest, and its means (C, d); a class without images keeps its mean of `means`."""
    classes, d = sums.first.shape
    alive = sums.size > 1e-9
    means = np.where(alive[:, None], sums.first / np.where(alive, sums.size, 1)[:, None], means)
    covariance = (scatter - (means * sums.size[:, None]).T @ means) / n
    # clusters without any spread would leave nothing but rounding errors to divide by
    spread = max(np.trace(covariance), 1e-6 * np.trace(scatter) / n) or 1.0
    covariance = (1 - shrinkage) * covariance + shrinkage * spread / d * np.eye(d)
    weights = np.linalg.solve(covariance, means.T)
    confusion = sums.named + 0.5 / classes
    confusion /= confusion.sum(axis=1, keepdims=True)
    offset = 0.5 * (means.T * weights).sum(axis=0)
    if setting.prior == "estimated":
        offset -= np.log((sums.size + 0.5) / (n + 0.5 * classes))
    return Mixture(weights, offset, confusion, np.zeros(classes), np.zeros(classes), setting), means


def balanced(
    logits: np.ndarray, prior: np.ndarray, start: np.ndarray, dtype: type = np.float64, slack: float = 0.0
) -> np.ndarray:
    """b (C,) such that the mean of softmax(logits + b) over the rows is the prior, by Sinkhorn's iteration from `start`.

    Args:
        logits: (N, C), every row's largest near 0. prior: (C,), sums to 1.
        slack: what a class's share may deviate from its prior, as a part of that, without being moved; those that deviate
            more are moved that near.
    """
    n, classes = logits.shape

    def kernels() -> Iterator[np.ndarray]:
        return (np.exp(logits[rows].astype(dtype)) for rows in blocks(n, classes))

    kept = list(kernels()) if dtype is np.float64 else None  # of many images they are made anew for each step
    least = 1e-300 if dtype is np.float64 else 1e-30
    u = np.exp(start - start.max())
    for _ in range(MOST_STEPS):
        mean = np.zeros(classes)
        for kernel in kept or kernels():
            scale = np.maximum(u, least).astype(dtype)
            mean += scale * (kernel.T @ (1 / (kernel @ scale)))
        # a class that is out of the question for every image stays so
        ratio = np.where(mean > 0, mean / n / prior, 1.0)
        ratio /= np.clip(ratio, 1 - slack, 1 + slack)
        u = u / ratio
        u = np.maximum(u / u.max(), least)
        if np.abs(ratio - 1).max() < BALANCED:
            break
    return np.log(u)


def precision(n: int, classes: int) -> type:
    return np.float64 if n * classes <= ENTRIES_IN_FLOAT64 else np.float32


def blocks(n: int, width: int) -> Iterator[slice]:
    step = max(1, ENTRIES_AT_ONCE // max(width, 1))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))
