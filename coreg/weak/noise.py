"""Generators of candidate matrices from true labels, vectorised and keyed: the synthetic noise of the literature.

Every draw is a hash of (seed, rule's step, image), so an image's candidates depend neither on the other images nor on
the machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from coreg.data.keyed import keyed_uniform
from coreg.errors import UserError


def uniforms(seed: int, step: str, rows: np.ndarray, columns: int) -> np.ndarray:
    """The draws of one step of a generator.

    Args:
        seed: of the candidate sets.
        step: `sets` (C columns), `noise` (2 columns: whether, and which class) or, of `pico` and `uss`, `round 0`,
            `round 1` ...
        rows: int64 (n,), row numbers of the images.
        columns: numbers an image.

    Returns:
        float64 (n, columns), uniform in [0, 1).
    """
    return keyed_uniform((seed, "synthetic", step), torch.from_numpy(rows), columns).double().numpy()


def flip(labels: np.ndarray, n_classes: int, q: float, eta: float, seed: int) -> np.ndarray:
    """Random flips, then noise: the procedure of ALIM (Xu et al., 2023), IRNet and Co-Reg.

    A wrong class joins the truth when its draw u < q. Then, when an image's draw u <= eta, one class drawn uniformly
    from outside the set takes the place of the truth; a full set stays. Nothing is drawn again, so that sets may have one
    member, E|S| = 1 + (C-1) q, and the share of sets without the truth is eta but for full sets.

    Args:
        labels: int (N,) true classes in [0, C). n_classes: C >= 2. q, eta: in [0, 1]. seed: of all draws.

    Returns:
        bool (N, C); no row is empty.

    Raises:
        UserError: q or eta out of range.
        ValueError: labels or n_classes out of range.
    """
    truth = _truth(labels, n_classes, q=q, eta=eta)
    return _exchange_truth(truth | _others(truth, seed, q), labels, eta, seed)


def pico(labels: np.ndarray, n_classes: int, q: float, eta: float, seed: int) -> np.ndarray:
    """The variant of PiCO+ (Wang et al., 2022): the truth with probability 1 - eta, others with q, never empty.

    Empty sets are drawn again as a whole, which lowers the noise: P(truth not in S) is
    1 - (1-eta) / (1 - eta (1-q)^(C-1)), below eta. Arguments, result and errors as for `flip`.

    Raises:
        UserError: also when nearly every set would be empty, so that drawing again would not end.
    """
    truth = _truth(labels, n_classes, q=q, eta=eta)
    if eta * (1 - q) ** (n_classes - 1) > 0.99:
        raise UserError(f"with --q {q} and --eta {eta} nearly every candidate set is empty; give a larger --q")
    chance = np.where(truth, 1 - eta, q)
    candidates, empty, number = np.zeros_like(truth), np.arange(len(labels)), 0
    while len(empty):
        drawn = uniforms(seed, f"round {number}", empty, n_classes) < chance[empty]
        candidates[empty] = drawn
        empty, number = empty[~drawn.any(axis=1)], number + 1
    return candidates


def uniform(labels: np.ndarray, n_classes: int, q: float, seed: int) -> np.ndarray:
    """The truth always, every other class with probability q: clean partial labels as in PiCO (Wang et al., ICLR 2022).

    The flipping probability strategy (FPS) of the literature. Arguments, result and errors as for `flip`, of which this is
    the case eta = 0.
    """
    return flip(labels, n_classes, q, 0.0, seed)


def uss(labels: np.ndarray, n_classes: int, seed: int) -> np.ndarray:
    """The uniform sampling strategy (Feng et al., NeurIPS 2020): each set that holds the truth is equally likely, but for
    the full set, which says nothing.

    Every other class joins by its own draw u < 1/2, and full sets are drawn again, so that it is right for any number of
    classes. Arguments, result and errors as for `flip`.
    """
    truth = _truth(labels, n_classes)
    candidates, full, number = truth.copy(), np.arange(len(labels)), 0
    while len(full):
        drawn = truth[full] | (uniforms(seed, f"round {number}", full, n_classes) < 0.5)
        candidates[full] = drawn
        full, number = full[drawn.all(axis=1)], number + 1
    return candidates


def hierarchical(labels: np.ndarray, superclass_of: np.ndarray, q: float, eta: float, seed: int) -> np.ndarray:
    """`flip` with wrong classes from the super-class of the truth alone, as in CIFAR-100H (PiCO).

    A truth is exchanged for a class of its super-class; where the set holds all of them, it stays.

    Args:
        labels: int (N,) true classes in [0, C). superclass_of: int (C,), the super-class of each class. q, eta, seed: as
            for `flip`.

    Returns:
        bool (N, C); no row is empty.

    Raises:
        UserError, ValueError: as `flip`.
    """
    truth = _truth(labels, len(superclass_of), q=q, eta=eta)
    related = superclass_of[labels][:, None] == superclass_of
    return _exchange_truth(truth | (_others(truth, seed, q) & related), labels, eta, seed, related)


def instance(labels: np.ndarray, probs: np.ndarray, rho: float, eta: float, seed: int) -> np.ndarray:
    """Wrong classes by how probable a classifier finds them in this image: VALEN (Xu et al., NeurIPS 2021).

    With the truth's probability set to 0, r = probs * rho / mean(probs), the mean over all C classes and r cut off at 1;
    class j joins when its draw u < r_j. The truth is in. E|S| is about 1 + rho C, less what is cut off; rho is 0.4 for
    sets of 10 classes and 0.04 for CIFAR-100. Then the noise of `flip`.

    Args:
        labels: int (N,) true classes in [0, C).
        probs: float (N, C), probabilities of a classifier in evaluation mode on images normalised as it expects.
        rho: in [0, 1]. eta, seed: as for `flip`.

    Returns:
        bool (N, C); no row is empty.

    Raises:
        UserError: rho or eta out of range. ValueError: labels or the shape of probs out of range.
    """
    truth = _truth(labels, probs.shape[1], rho=rho, eta=eta)
    wrong = np.where(truth, 0.0, probs)
    mean = wrong.mean(axis=1, keepdims=True)
    # a classifier that is certain of the truth says nothing about the others: none of them joins
    chance = np.divide(wrong * rho, mean, out=np.zeros_like(wrong), where=mean > 0)
    return _exchange_truth(truth | _others(truth, seed, chance), labels, eta, seed)


def _truth(labels: np.ndarray, n_classes: int, **shares: float) -> np.ndarray:
    """bool (N, C) with the label alone, after all arguments have been checked."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"--{name} is {value}; give a number from 0 to 1")
    if n_classes < 2 or (len(labels) and not 0 <= labels.min() <= labels.max() < n_classes):
        raise ValueError(f"labels have to lie in [0, {n_classes}) and classes to be at least 2")
    return labels[:, None] == np.arange(n_classes)


def _others(truth: np.ndarray, seed: int, chance: float | np.ndarray) -> np.ndarray:
    """Each class by its own draw u < chance."""
    return uniforms(seed, "sets", np.arange(len(truth)), truth.shape[1]) < chance


def _exchange_truth(
    candidates: np.ndarray, labels: np.ndarray, eta: float, seed: int, related: np.ndarray | None = None
) -> np.ndarray:
    """Exchange the truth for a class outside the set (and in `related`) in the images whose draw u <= eta."""
    draws = uniforms(seed, "noise", np.arange(len(labels)), 2)
    outside = ~candidates if related is None else ~candidates & related
    free = outside.sum(axis=1)
    # u may be exactly 0, which eta = 0 must not count as reached
    rows = np.flatnonzero((draws[:, 0] <= eta) & (eta > 0) & (free > 0))
    place = (draws[rows, 1] * free[rows]).astype(np.int64)
    chosen = (outside[rows].cumsum(axis=1) > place[:, None]).argmax(axis=1)
    candidates[rows, labels[rows]] = False
    candidates[rows, chosen] = True
    return candidates


@dataclass(frozen=True)
class NoiseReport:
    """What candidate sets really are like, all of it counted."""

    partial_accuracy: float  # share of the sets that hold the truth
    eta: float  # 1 - partial_accuracy
    mean_candidates: float  # mean |S|
    q: float  # (mean |S| - 1) / (C - 1), the flip probability that gives sets of this size
    wrong: float  # share of the wrong classes that are candidates; q plus what the exchanged truths bring
    single: float  # share of the sets with one member
    full: float  # share of the sets with all C

    def __str__(self) -> str:
        return (
            f"truth among the candidates {self.partial_accuracy:.2%} (eta {self.eta:.4f}), mean candidates "
            f"{self.mean_candidates:.4f} (q {self.q:.4f}), wrong classes that are candidates {self.wrong:.2%}, "
            f"sets of one {self.single:.2%}, full sets {self.full:.2%}"
        )


def noise_report(candidates: np.ndarray, labels: np.ndarray) -> NoiseReport:
    """The real noise rates of candidate sets bool (N, C) under true labels int (N,), N >= 1 and C >= 2."""
    sizes, n_classes = candidates.sum(axis=1), candidates.shape[1]
    held = float(candidates[np.arange(len(labels)), labels].mean())
    mean = float(sizes.mean())
    return NoiseReport(
        partial_accuracy=held,
        eta=1 - held,
        mean_candidates=mean,
        q=(mean - 1) / (n_classes - 1),
        wrong=(mean - held) / (n_classes - 1),
        single=float((sizes == 1).mean()),
        full=float((sizes == n_classes).mean()),
    )
