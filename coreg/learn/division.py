"""Division of the training set into trusted P and distrusted U by a mixture model over losses.

Everything works on tables of all N training images, so that the result does not depend on how images were shared out.
Source: AAAI eq. 3 and the text below it; distribution alignment, loss history and mixture settings from the reference code.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

LARGEST_LOSS = 50.0  # stands for the -log of a candidate probability that underflowed to 0
SMALLEST_RANGE = 1e-6  # of raw losses: below it there is nothing to divide by
LARGE = 1 << 20  # losses that a mixture is fitted to at most


@dataclass
class Predicted:
    """What a network predicts of the N training images, in short."""

    classes: np.ndarray  # int64 (N,), the most likely ones
    mean: np.ndarray  # (C,), the mean prediction
    finite: bool = True  # whether all log probabilities are numbers

    @classmethod
    def of(cls, log_p: np.ndarray) -> Predicted:
        """That of log probabilities (N, C)."""
        return cls(log_p.argmax(axis=1), np.exp(log_p).mean(axis=0))


def align(log_p: np.ndarray, prior: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Distribution alignment: p * prior / m renormalised, m the mean prediction over all training images.

    m is floored at a millionth of uniform, so that a class that is never predicted cannot blow up.

    Args:
        log_p: (n, C) log probabilities of some training images, or of all. prior: (C,), sums to 1. mean: (C,), m.

    Returns:
        (n, C) aligned log probabilities.
    """
    mean = np.maximum(mean, 1e-6 / log_p.shape[1])
    shifted = log_p + np.log(prior)
    shifted -= np.log(mean)  # in place: the table is the largest one there is
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def division_loss(log_p: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """-log of the largest candidate probability (AAAI eq. 3), at most 50. (N, C), bool (N, C) -> (N,)."""
    best = np.where(candidates, log_p, -np.inf).max(axis=1)
    return np.minimum(-best, LARGEST_LOSS)


def smoothed(history: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over the last K epochs of division losses, each epoch's scaled to 0..1. K of (n,) -> (n,), n >= 1."""
    total = np.zeros(len(history[0]))
    for losses in history:
        low, high = losses.min(), losses.max()
        total += (losses - low) / max(high - low, SMALLEST_RANGE)
    return total / len(history)


def representatives(losses: np.ndarray) -> np.ndarray:
    """At most `LARGE` losses (n,) that stand for all (N,): themselves, or a histogram whose bars hold equally many.

    Of each bar it is the middle loss by rank. The share of losses below any number changes by at most 1 / LARGE, which is a
    millionth, and so does the mean of losses in 0..1.
    """
    if len(losses) <= LARGE:
        return losses
    return np.sort(losses)[(2 * np.arange(LARGE) + 1) * len(losses) // (2 * LARGE)]


@dataclass
class Division:
    """Weights and the split into trusted images P and the rest U, with the mixture fitted to the losses."""

    weight: np.ndarray  # (N,) w, the posterior of the small-loss component
    trusted: np.ndarray  # bool (N,), P
    # of the components, the smaller mean first; NaN where nothing was fitted
    means: list[float] = field(default_factory=lambda: [float("nan")] * 2)
    shares: list[float] = field(default_factory=lambda: [float("nan")] * 2)  # their weights in the mixture, likewise
    deviations: list[float] = field(default_factory=lambda: [float("nan")] * 2)  # their standard deviations, likewise


def divide(
    history: Sequence[np.ndarray],
    usable: np.ndarray,
    seed: int,
    threshold: float = 0.5,
    smallest: int = 1,
    monotone: bool = False,
) -> Division:
    """Fit two Gaussians to the smoothed losses; w is the posterior of the one with the smaller mean (AAAI, below eq. 3).

    Where it cannot be fitted, the behaviour is stated: losses that are all equal put every usable image into P; an
    empty component (scikit-learn reports it with mean 0) the same; fewer than `smallest` images above the threshold
    take the `smallest` smallest losses instead, with w = 1.

    Args:
        history: (N,) division losses of each of the last K epochs, oldest first, raw.
        usable: bool (N,), False for images that no template could name: they are left out and lie in U with w = 0.
        seed: of the mixture's initialisation.
        threshold: w above it is P.
        smallest: the least size of P, as far as there are usable images.
        monotone: for losses outside the two means use the posterior at the nearer mean. The posterior itself falls with
            the loss only between the means: where the variances differ, the broader component takes both tails, so that
            the easiest images can land in U, or the hardest ones in P.
    """
    weight = np.zeros(len(usable))
    if not usable.any():
        return Division(weight, np.zeros_like(usable))
    smooth = smoothed([losses[usable] for losses in history])
    division = Division(weight, np.zeros_like(usable))
    if smooth.max() - smooth.min() < SMALLEST_RANGE:
        weight[usable] = 1.0
    else:
        mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
        with warnings.catch_warnings():
            # ten iterations are the reference's choice, converged or not
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(representatives(smooth)[:, None])
        means = mixture.means_[:, 0]
        small = int(means.argmin())
        order = [small, 1 - small]
        division.means, division.shares = means[order].tolist(), mixture.weights_[order].tolist()
        division.deviations = np.sqrt(mixture.covariances_[order, 0, 0]).tolist()
        if mixture.weights_.min() * min(len(smooth), LARGE) < 1e-3:
            weight[usable] = 1.0
        else:
            at = smooth.clip(means[small], means[1 - small]) if monotone else smooth
            pieces = np.array_split(at[:, None], -(-len(at) // LARGE))
            weight[usable] = np.concatenate([mixture.predict_proba(piece)[:, small] for piece in pieces])
    division.trusted = weight > threshold
    if division.trusted.sum() < smallest:
        rows = np.flatnonzero(usable)[np.argsort(smooth, kind="stable")[:smallest]]
        weight[rows] = 1.0
        division.trusted = weight > threshold
    return division
