"""Division of the training set into trusted P and distrusted U by a mixture model over losses.

Everything works on tables of all N training images, so that the result does not depend on how images were shared out.
Source: AAAI eq. 3 and the text below it; distribution alignment, loss history and mixture settings from the reference code.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

LARGEST_LOSS = 50.0  # stands for the -log of a candidate probability that underflowed to 0
SMALLEST_RANGE = 1e-6  # of raw losses: below it there is nothing to divide by


def align(log_p: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Distribution alignment: p * prior / m renormalised, m the mean prediction over all rows.

    m is floored at a millionth of uniform, so that a class that is never predicted cannot blow up.

    Args:
        log_p: (N, C) log probabilities of every training image. prior: (C,), sums to 1.

    Returns:
        (N, C) aligned log probabilities.
    """
    mean = np.maximum(np.exp(log_p).mean(axis=0), 1e-6 / log_p.shape[1])
    shifted = log_p + np.log(prior)
    shifted -= np.log(mean)  # in place: the table is the largest one there is
    shifted -= shifted.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def division_loss(log_p: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """-log of the largest candidate probability (AAAI eq. 3), at most 50. (N, C), bool (N, C) -> (N,)."""
    best = np.where(candidates, log_p, -np.inf).max(axis=1)
    return np.minimum(-best, LARGEST_LOSS)


def smoothed(history: np.ndarray) -> np.ndarray:
    """Division losses of the last K epochs, each scaled to 0..1, and their mean over the epochs. (K, n) -> (n,), n >= 1."""
    losses = history.astype(np.float64)
    low, high = losses.min(axis=1, keepdims=True), losses.max(axis=1, keepdims=True)
    return ((losses - low) / np.maximum(high - low, SMALLEST_RANGE)).mean(axis=0)


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
    history: np.ndarray,
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
        history: (K, N) division losses of the last K epochs, oldest first, raw.
        usable: bool (N,), False for images that no template could name: they are left out and lie in U with w = 0.
        seed: of the mixture's initialisation.
        threshold: w above it is P.
        smallest: the least size of P, as far as there are usable images.
        monotone: for losses outside the two means use the posterior at the nearer mean. The posterior itself falls with
            the loss only between the means: where the variances differ, the broader component takes both tails, so that
            the easiest images can land in U, or the hardest ones in P.
    """
    weight = np.zeros(history.shape[1])
    if not usable.any():
        return Division(weight, np.zeros_like(usable))
    smooth = smoothed(history[:, usable])
    division = Division(weight, np.zeros_like(usable))
    if smooth.max() - smooth.min() < SMALLEST_RANGE:
        weight[usable] = 1.0
    else:
        mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=seed)
        with warnings.catch_warnings():
            # ten iterations are the reference's choice, converged or not
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(smooth[:, None])
        means = mixture.means_[:, 0]
        small = int(means.argmin())
        order = [small, 1 - small]
        division.means, division.shares = means[order].tolist(), mixture.weights_[order].tolist()
        division.deviations = np.sqrt(mixture.covariances_[order, 0, 0]).tolist()
        if mixture.weights_.min() * len(smooth) < 1e-3:
            weight[usable] = 1.0
        else:
            at = smooth.clip(means[small], means[1 - small]) if monotone else smooth
            weight[usable] = mixture.predict_proba(at[:, None])[:, small]
    division.trusted = weight > threshold
    if division.trusted.sum() < smallest:
        rows = np.flatnonzero(usable)[np.argsort(smooth, kind="stable")[:smallest]]
        weight[rows] = 1.0
        division.trusted = weight > threshold
    return division
