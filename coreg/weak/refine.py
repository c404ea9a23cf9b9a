"""Probabilities mended by features: a mixture of Gaussians whose classes an annotator names, rightly or wrongly.

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

where b balances the classes: q's column means are the prior (Sinkhorn's iteration; none: b = 0). Without a and b the last
line is the linear discriminant that classifies images of which the annotator says nothing.

Nothing is random; parts of the images are drawn by key. Memory is one (N, C) table beside the inputs: float64 as long as it
is small, float16 and sums in float32 where it is large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from coreg.data.keyed import keyed_uniform
from coreg.weak.temperature import fit_temperature

Prior = Literal["uniform", "annotator", "none"]
DIMENSIONS, IMAGES_A_DIMENSION = 64, 10  # of the features; more than that are fitted to too few images
SHRINKAGE, ROUNDS = 0.1, 10
LEAST_PRIOR, LEAST_OBSERVED = 1e-4, 1e-6  # an annotator is never quite sure
BALANCED, MOST_STEPS = 1e-3, 100  # largest relative error of a class's share, and steps a round until it
ENTRIES_IN_FLOAT64 = 1 << 25
ENTRIES_AT_ONCE = 1 << 22
FOLDS = 5
EQUAL_CLASSES = 0.97  # effective number of classes, as a share of C, from which they count as equally frequent
JUDGED_IMAGES = 20_000  # at most, by which settings and temperature are chosen


@dataclass(frozen=True)
class Setting:
    """How evidence is read.

    Attributes:
        weight: w, 1 for a prior, 0 for an observation through a confusion matrix.
        prior: shares of the classes: equal, as in the annotator's mean prediction, or as they come out.
    """

    weight: float
    prior: Prior


WEIGHTS = (0.5, 1.0, 0.0)


# ---- features -------------------------------------------------------------------------------------------------------


@dataclass
class Projection:
    """Standardised features on their principal axes: mean (D,), axes (D, d) with the deviations divided out."""

    mean: np.ndarray
    axes: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, D) of any float type -> (n, d), float64, or float32 for many."""
        n, d = len(features), self.axes.shape[1]
        out = np.empty((n, d), dtype=_precision(n, max(d, features.shape[1])))
        for rows in _blocks(n, features.shape[1]):
            out[rows] = (features[rows].astype(np.float64) - self.mean) @ self.axes
        return out


def fit_projection(features: np.ndarray, dimensions: int = DIMENSIONS) -> Projection:
    """Principal axes of standardised features.

    Args:
        features: (N, D) of any float type, N >= 1; a feature that does not vary counts for nothing.
        dimensions: d at most; never more than N / 10, nor than there are.
    """
    n, width = features.shape
    mean = sum(features[rows].astype(np.float64).sum(axis=0) for rows in _blocks(n, width)) / n
    covariance = np.zeros((width, width))
    for rows in _blocks(n, width):
        centred = features[rows].astype(np.float64) - mean
        covariance += centred.T @ centred / n
    deviation = np.sqrt(np.diagonal(covariance))
    varies = deviation > 1e-6 * np.abs(mean)
    scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
    values, axes = np.linalg.eigh(covariance * scale * scale[:, None])
    d = max(1, min(dimensions, n // IMAGES_A_DIMENSION, width))
    axes = axes[:, np.argsort(-values, kind="stable")[:d]]
    axes *= np.where(axes[np.abs(axes).argmax(axis=0), np.arange(d)] < 0, -1, 1)  # a sign that no library decides
    return Projection(mean, scale[:, None] * axes)


# ---- the mixture ----------------------------------------------------------------------------------------------------


@dataclass
class Mixture:
    """A fitted mixture of C classes in d dimensions.

    Attributes:
        weights: (d, C), S^-1 mu. offset: (C,), 1/2 mu' S^-1 mu.
        confusion: (C, C), Pi; row c says how the annotator names images of class c.
        balance: (C,), b.
        setting: as it was fitted.
    """

    weights: np.ndarray
    offset: np.ndarray
    confusion: np.ndarray
    balance: np.ndarray
    setting: Setting

    def of_view(self, z: np.ndarray) -> np.ndarray:
        """Logits (n, C) of projected features alone."""
        return z @ self.weights.astype(z.dtype) - self.offset.astype(z.dtype)

    def of_both(self, z: np.ndarray, evidence: np.ndarray) -> np.ndarray:
        """Logits (n, C) of projected features and normalised evidence Q (n, C), without balance."""
        w, scores = self.setting.weight, self.of_view(z)
        if w > 0:
            scores += w * np.log(np.maximum(evidence, LEAST_PRIOR))
        if w < 1:
            scores += (1 - w) * np.log(np.maximum(self.observed(evidence), LEAST_OBSERVED))
        return scores

    def observed(self, evidence: np.ndarray) -> np.ndarray:
        """sum_j Pi_cj Q_ij, (n, C): how well each class explains what the annotator named."""
        return evidence @ self.confusion.T.astype(evidence.dtype)


def normalised(probs: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """Rows (n, C) that sum to 1; a row of zeros becomes uniform."""
    rows = probs.astype(dtype)
    total = rows.sum(axis=1, keepdims=True)
    return np.where(total > 0, rows / np.where(total > 0, total, 1), 1 / rows.shape[1])


def fit_mixture(
    z: np.ndarray, probs: np.ndarray, setting: Setting, rounds: int = ROUNDS, shrinkage: float = SHRINKAGE
) -> tuple[Mixture, np.ndarray]:
    """Fit the mixture by `rounds` rounds of EM.

    Args:
        z: (N, d), projected features. probs: (N, C) of any float type, the annotator's, rows of any sum.

    Returns:
        the mixture, and log q (N, C) up to a number a row, with the balance in it: float64, or float16 for large N x C.
    """
    n, classes = probs.shape
    exact = _precision(n, classes)
    logits = np.empty((n, classes), dtype=np.float64 if exact is np.float64 else np.float16)
    z = z.astype(exact, copy=False)
    scatter = sum((z[rows].T @ z[rows]).astype(np.float64) for rows in _blocks(n, classes))
    sums, means = _Sums(classes, z.shape[1]), np.zeros((classes, z.shape[1]))
    for rows in _blocks(n, classes):
        evidence = normalised(probs[rows], exact)
        sums.add(evidence, z[rows], evidence)
    prior = {
        "uniform": np.full(classes, 1 / classes),
        "annotator": (sums.size + 0.5) / (n + 0.5 * classes),
        "none": None,
    }[setting.prior]
    balance = np.zeros(classes)
    for _ in range(rounds):
        mixture, means = _maximise(sums, means, scatter, n, shrinkage, setting)
        for rows in _blocks(n, classes):
            scores = mixture.of_both(z[rows], normalised(probs[rows], exact))
            logits[rows] = scores - scores.max(axis=1, keepdims=True)
        if prior is not None:
            balance = balanced(logits, prior, balance, exact)
        mixture.balance, sums = balance, _Sums(classes, z.shape[1])
        for rows in _blocks(n, classes):
            q = softmax(logits[rows].astype(exact) + balance.astype(exact))
            sums.add(q, z[rows], normalised(probs[rows], exact))
    for rows in _blocks(n, classes):
        scores = logits[rows].astype(exact) + balance.astype(exact)
        logits[rows] = scores - scores.max(axis=1, keepdims=True)
    return mixture, logits


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
    return Mixture(weights, offset, confusion, np.zeros(classes), setting), means


def balanced(logits: np.ndarray, prior: np.ndarray, start: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """b (C,) such that the mean of softmax(logits + b) over the rows is the prior, by Sinkhorn's iteration from `start`.

    Args:
        logits: (N, C), every row's largest near 0. prior: (C,), sums to 1.
    """
    n, classes = logits.shape

    def kernels() -> Iterator[np.ndarray]:
        return (np.exp(logits[rows].astype(dtype)) for rows in _blocks(n, classes))

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
        u = u / ratio
        u = np.maximum(u / u.max(), least)
        if np.abs(ratio - 1).max() < BALANCED:
            break
    return np.log(u)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# ---- without labels: which setting, and how sure --------------------------------------------------------------------


def foretold(z: np.ndarray, probs: np.ndarray, setting: Setting, parts: np.ndarray) -> float:
    """How well the features foretell the annotator, out of fold: the mean of log sum_c p(c|z_i) sum_j Pi_cj Q_ij.

    It compares settings and views of about the same width, not different networks: the annotator's own features always
    foretell the annotator best.

    Args:
        z: (N, d). probs: (N, C). parts: int (N,), the fold that each image is left out of.
    """
    total = 0.0
    for part in np.unique(parts):
        held, kept = parts == part, parts != part
        if not kept.any():  # one image
            kept = held
        mixture, _ = fit_mixture(z[kept], probs[kept], setting)
        explained = mixture.observed(normalised(probs[held]))
        total += np.log((softmax(mixture.of_view(z[held]).astype(np.float64)) * explained).sum(axis=1)).sum()
    return float(total / len(z))


def choose(
    z: np.ndarray, probs: np.ndarray, ids: np.ndarray, prior: Prior | None = None, weight: float | None = None
) -> tuple[Setting, dict[float, float]]:
    """How evidence is best read, without any label, judged on at most `JUDGED_IMAGES` images.

    The prior, where none is given, is uniform if a mixture without one finds classes of nearly equal size (see
    `effective_classes`), and none otherwise: to balance classes that are not equally frequent costs far more than it brings
    where they are, and `foretold` does not see it. Of the weights 1/2, 1 and 0 that one is taken which
    `foretold` ranks first.

    Args:
        z: (N, d). probs: (N, C). ids: int64 (N,), who the images are, for draws.

    Returns:
        the setting, and `foretold` of each weight that was tried.
    """
    rows = drawn(ids, "judged")[:JUDGED_IMAGES]
    z, probs = z[rows], probs[rows]
    if prior is None:
        q = softmax(fit_mixture(z, probs, Setting(0.5, "none"))[1].astype(np.float64))
        prior = "uniform" if effective_classes(q.mean(axis=0)) >= EQUAL_CLASSES * probs.shape[1] else "none"
    if weight is not None:
        return Setting(weight, prior), {}
    parts = np.empty(len(rows), dtype=np.int64)
    parts[drawn(ids[rows], "folds")] = np.arange(len(rows)) * FOLDS // max(len(rows), 1)
    scores = {weight: foretold(z, probs, Setting(weight, prior), parts) for weight in WEIGHTS}
    return Setting(max(scores, key=scores.__getitem__), prior), scores


def effective_classes(shares: np.ndarray) -> float:
    """exp of the entropy of the classes' shares (C,): C where they are equal, 1 where one class has all."""
    return float(np.exp(-(shares * np.log(np.maximum(shares, 1e-300))).sum()))


def fit_two_halves(z: np.ndarray, probs: np.ndarray, setting: Setting, ids: np.ndarray) -> float:
    """A temperature for log q: each half of the images is to be as sure of its class as the other half's mixture agrees.

    The smallest mean of -log softmax(x / T)[argmax y] over the images and both orders, where x and y are the logits of two
    mixtures, each fitted to one half. At least 1: two halves that agree are no reason to be surer than the mixture is.
    """
    rows = drawn(ids, "halves")[:JUDGED_IMAGES]
    if len(rows) < 2:
        return 1.0
    z, probs = z[rows], probs[rows]
    halves = (fit_mixture(z[k::2], probs[k::2], setting)[0] for k in (0, 1))
    x, y = (mixture.of_both(z, normalised(probs)) + mixture.balance for mixture in halves)
    named = np.concatenate([y.argmax(axis=1), x.argmax(axis=1)])
    return max(1.0, fit_temperature(np.concatenate([x, y]), named))


def drawn(ids: np.ndarray, purpose: str) -> np.ndarray:
    """All positions of `ids` in an order that depends on them and on the purpose alone."""
    return np.lexsort((ids, _keys(ids, purpose)))


def _keys(ids: np.ndarray, purpose: str) -> np.ndarray:
    return keyed_uniform(("refine", purpose), torch.from_numpy(np.asarray(ids, dtype=np.int64)), 1)[:, 0].numpy()


def _precision(n: int, classes: int) -> type:
    return np.float64 if n * classes <= ENTRIES_IN_FLOAT64 else np.float32


def _blocks(n: int, width: int) -> Iterator[slice]:
    step = max(1, ENTRIES_AT_ONCE // max(width, 1))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


# ---- all of it ------------------------------------------------------------------------------------------------------


@dataclass
class Refinement:
    """What `refine` gives.

    Attributes:
        probs: (N, C) float16, mended probabilities.
        setting: how evidence was read. scores: `foretold` of every weight tried. temperature: q's.
        classes: effective number of classes of the training images.
        projection, mixture: the classifier of other images.
    """

    probs: np.ndarray
    setting: Setting
    scores: dict[float, float]
    temperature: float
    classes: float
    projection: Projection
    mixture: Mixture


def refine(
    features: np.ndarray,
    probs: np.ndarray,
    train: np.ndarray,
    others: np.ndarray,
    prior: Prior | None = None,
    weight: float | None = None,
) -> Refinement:
    """Mend an annotator's probabilities by features.

    Args:
        features: (N, D) of any float type. probs: (N, C) of any float type, the annotator's; uniform rows where it says
            nothing.
        train: int64, rows that are fitted. others: int64, rows that are classified by their features alone, so that no
            evidence of theirs is used; what is in neither keeps its probabilities.
        prior, weight: see `Setting`; None to choose without labels (`choose`).

    Raises:
        ValueError: there is no training row.
    """
    if not len(train):
        raise ValueError("there are no training rows to fit a mixture to")
    projection = fit_projection(features[train])
    z, evidence = projection(features[train]), probs[train]
    setting, scores = choose(z, evidence, train, prior, weight)
    temperature = fit_two_halves(z, evidence, setting, train)
    mixture, logits = fit_mixture(z, evidence, setting)
    mended, exact, shares = probs.astype(np.float16), _precision(*logits.shape), np.zeros(probs.shape[1])
    for rows in _blocks(*logits.shape):
        mended[train[rows]] = softmax(logits[rows].astype(exact) / exact(temperature))
        shares += softmax(logits[rows].astype(exact)).sum(axis=0) / len(train)
    for rows in _blocks(len(others), probs.shape[1]):
        z = projection(features[others[rows]])
        mended[others[rows]] = softmax(mixture.of_view(z) / exact(temperature))
    return Refinement(mended, setting, scores, temperature, effective_classes(shares), projection, mixture)
