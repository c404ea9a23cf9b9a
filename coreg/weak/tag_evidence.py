"""How probable an annotator holds each label of an image that may have several, by features of the image and its parts.

Nothing is trained and no label is used. Shapes: n images, M parts of each, L labels, D numbers a feature; cosines are of
features and texts of length 1. Results are float64 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

LEAST_SURE = 2.0  # nats of entropy above which a prediction says nothing of a label's bias
OF_PARTS = 0.2  # share of the parts in CCD's labels
# PIAA's numbers, all but the share: one for features of 196 patches an image, of which 512 are hardly any
PART_SCALE, IMAGE_SCALE, KEPT, POSTERIOR_TEMPERATURE, PART_GAIN, OF_IMAGE = 60.0, 80.0, 512, 500.0, 200.0, 0.1
KEPT_SHARE = 0.25


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis, float64."""
    exponents = np.exp(x.astype(np.float64) - x.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def entropy(p: np.ndarray) -> np.ndarray:
    """In nats, over the last axis."""
    return -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(axis=-1)


def image_or_part(image: np.ndarray, parts: np.ndarray, temperature: float) -> np.ndarray:
    """The largest softmax probability of a label in the image or any part of it, (n, L).

    What VLPL suggests by it is what the whole image or any tile suggests, the idea of AEVLP (ICCV 2025).

    Args:
        image: (n, L) cosines. parts: (n, M, L) likewise.
    """
    return np.maximum(softmax(image / temperature), softmax(parts / temperature).max(axis=1))


def class_bias(p: np.ndarray) -> np.ndarray:
    """b_c, (L,): the mean of the largest probability where it is that of label c, over images of entropy <= 2 nats (CCD).

    1 for a label that is nowhere the most probable one. Classification by crops and debiased labels: k0u-id/CCD, CVPR 2025.

    Args:
        p: (n, L), rows that sum to 1.
    """
    sure = entropy(p) <= LEAST_SURE
    best, largest = p[sure].argmax(axis=1), p[sure].max(axis=1)
    sums, counts = (np.bincount(best, weights=weights, minlength=p.shape[1]) for weights in (largest, None))
    return np.where(counts > 0, sums / np.maximum(counts, 1), 1.0)


def debiased(p: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """p_c / b_c, at most 1: a label is certain where it is as probable as where it is the first (CCD)."""
    return np.minimum(p / bias, 1.0)


def probable_labels(p: np.ndarray, kind: str) -> np.ndarray:
    """Evidence by which several labels of an image can be certain, (n, L): what shares 1 among its labels is debiased.

    Args:
        p: (n, L), evidence of the training images. kind: `image`, `tiles`, `ccd` or `piaa`.
    """
    return debiased(p, class_bias(p)) if kind in ("image", "piaa") else p


def with_consistent_parts(image: np.ndarray, parts: np.ndarray, temperature: float, bias: np.ndarray) -> np.ndarray:
    """CCD's labels, 0.8 of the image's and 0.2 of the largest of its parts', each debiased. (n, L).

    CCD's crops lie around what a student attends to; here they are tiles, which need none.

    Args:
        image: (n, L) cosines. parts: (n, M, L) likewise. bias: `class_bias` of the images.
    """
    own, others = (debiased(softmax(cosines / temperature), bias) for cosines in (image, parts))
    return (1 - OF_PARTS) * own + OF_PARTS * others.max(axis=1)


@dataclass(frozen=True)
class Gaussians:
    """A classifier of parts: one Gaussian a label with one covariance for all, and equal priors (PIAA, ICML 2026)."""

    weight: np.ndarray  # (D, L)
    offset: np.ndarray  # (L,)

    def posterior(self, parts: np.ndarray) -> np.ndarray:
        """(..., L), at PIAA's temperature, which leaves it nearly flat."""
        return softmax((parts @ self.weight + self.offset) / POSTERIOR_TEMPERATURE)

    def scores(self, parts: np.ndarray, image: np.ndarray) -> np.ndarray:
        """What PIAA gives an image: 0.1 softmax(80 cos of the image) + 0.9 softmax(200 max over parts). (n, L).

        The 200 is that of VOC; PIAA takes 400 for COCO.

        Args:
            parts: (n, M, D) features. image: (n, L) cosines.
        """
        local = softmax(PART_GAIN * self.posterior(parts).max(axis=1))
        return OF_IMAGE * softmax(IMAGE_SCALE * image) + (1 - OF_IMAGE) * local


def fit_gaussians(blocks: Iterable[np.ndarray], text: np.ndarray) -> Gaussians:
    """PIAA's classifier from parts of training images.

    With p the softmax of 60 times the cosines of a part, each label keeps those of lowest entropy among the parts whose
    most probable label it is: 512, and at most a quarter of them. Its mean is their mean, weighted by p. The inverse
    covariance is D pinv((n - 1) S + tr(S) I), with S the covariance of the n kept parts around the means of their labels. A
    label that wins no part has the mean of the one on which it is most probable.

    Args:
        blocks: features (m, D) of any number of parts each; gone through once. text: (L, D).
    """
    labels, width = text.shape
    # order, p and features of the kept parts of each label
    kept: list[tuple[np.ndarray, ...]] = [(np.zeros(0), np.zeros(0), np.zeros((0, width)))] * labels
    likeliest, wins = list(kept), np.zeros(labels, dtype=np.int64)
    for features in blocks:
        p = softmax(PART_SCALE * (features @ text.T))
        unsure, best = entropy(p), p.argmax(axis=1)
        wins += np.bincount(best, minlength=labels)
        for label in range(labels):
            won = np.flatnonzero(best == label)
            kept[label] = _first(kept[label], unsure[won], p[won, label], features[won])
            likeliest[label] = _first(likeliest[label], -p[:, label], p[:, label], features)
    means, around = [], []
    for label in range(labels):
        count = max(int(KEPT_SHARE * wins[label]), 1)
        _, p, features = kept[label] if wins[label] else likeliest[label]
        weight, some = p[:count, None], features[:count].astype(np.float64)
        means.append((weight * some).sum(axis=0) / weight.sum())
        around.append(some - means[-1])
    mean, rest = np.array(means), np.concatenate(around)
    n = len(rest)
    covariance = np.cov(rest.T) if n > 1 else np.zeros((width, width))
    shrunk = (n - 1) * covariance + np.trace(covariance) * np.eye(width)
    weight = mean @ (width * np.linalg.pinv(shrunk, hermitian=True))
    return Gaussians(weight.T, -(weight * mean).sum(axis=1) / 2)


def _first(kept: tuple[np.ndarray, ...], order: np.ndarray, *more: np.ndarray) -> tuple[np.ndarray, ...]:
    """The `KEPT` rows of lowest `order` among those that are kept and more, in that order."""
    joined = [np.concatenate([old, new]) for old, new in zip(kept, (order, *more))]
    first = np.argsort(joined[0], kind="stable")[:KEPT]
    return tuple(column[first] for column in joined)
