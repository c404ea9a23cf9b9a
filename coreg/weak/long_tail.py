"""Long tails: a choice of images by which classes shrink exponentially, as in CIFAR-LT."""

from __future__ import annotations

import numpy as np


def tail_counts(n: int, n_classes: int, imbalance: float) -> np.ndarray:
    """Images of each class, int64 (C,): int(n / C r^(k / (C - 1))) of class k, r = 1 / imbalance (Cao et al., "Learning
    imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019).

    Args:
        n: images in all before. n_classes: C >= 2. imbalance: images of the first class for one of the last, >= 1.
    """
    # Python's own powers, as in public code: numpy's differ in the last bit from version to version, and int() shows it
    shares = [(1 / imbalance) ** (k / (n_classes - 1)) for k in range(n_classes)]
    return np.array([int(n / n_classes * share) for share in shares])


def long_tail(labels: np.ndarray, n_classes: int, imbalance: float, seed: int) -> np.ndarray:
    """Positions int64 of the images that stay, class by class: of each the first of a shuffle of its images in order.

    The shuffles are those of numpy's legacy generator, so that with seed 0 the images of CIFAR-10 and CIFAR-100 are those
    of the literature. A class with fewer images than `tail_counts` keeps all of them.

    Args:
        labels: int64 (N,), in [0, C). n_classes, imbalance: as of `tail_counts`. seed: of the shuffles.
    """
    generator, chosen = np.random.RandomState(seed), []
    for index, count in enumerate(tail_counts(len(labels), n_classes, imbalance)):
        places = np.flatnonzero(labels == index)
        generator.shuffle(places)
        chosen.append(places[:count])
    return np.concatenate(chosen)
