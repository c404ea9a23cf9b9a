"""Numbers for people: accuracies with intervals, and what can be said about a run without any label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp

from coreg.learn.division import Division, Predicted

MOST_CURVES = 50  # classes with a curve each
FLOOR = 1e-5  # smallest accuracy of a class in the harmonic and the geometric mean, which one class at 0 would make 0
MANY, FEW = 100, 20  # training images a class: more than `MANY`, fewer than `FEW`, and medium between them
BINS = 15  # of the expected calibration error
# name in report.json -> in words
METRICS = {
    "macro_f1": "macro F1",
    "worst_class": "worst class",
    "harmonic_mean": "harmonic mean of classes",
    "geometric_mean": "geometric mean of classes",
    "many": "classes of many images",
    "medium": "classes of medium size",
    "few": "classes of few images",
    "nll": "NLL",
    "ece": "ECE",
}
_ROWS = 1 << 14  # judged at a time, so that memory is not another table of float64 logits


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float | None:
    """Share of rows with a known label (>= 0) that were predicted right; None where no label is known."""
    known = labels >= 0
    return float((predictions[known] == labels[known]).mean()) if known.any() else None


def per_class_accuracy(predictions: np.ndarray, labels: np.ndarray, n_classes: int) -> list[float | None]:
    """Recall of each class; None for a class without a labelled row."""
    return [accuracy(predictions[labels == c], labels[labels == c]) for c in range(n_classes)]


def class_metrics(
    predictions: np.ndarray, labels: np.ndarray, n_classes: int, counts: np.ndarray | None = None
) -> dict[str, float]:
    """How a classifier fares over the classes, as the literature of long tails reports it; nothing without labels.

    Args:
        predictions: int64 (n,), -1 for none. labels: int64 (n,), -1 unknown. n_classes: C.
        counts: int64 (C,), training images of each class, where they are known.

    Returns:
        `macro_f1`, mean F1 over the classes that are true or named somewhere; of the recalls of the classes that have
        labelled images `worst_class`, and `harmonic_mean` and `geometric_mean` with `FLOOR`; and the mean recall of the
        classes with `many`, `medium` and `few` training images (Liu et al., "Large-scale long-tailed recognition in an open
        world", CVPR 2019), where the classes are not all in one of these groups.
    """
    known = labels >= 0
    if not known.any():
        return {}
    named, truth = predictions[known], labels[known]
    right = np.bincount(truth[named == truth], minlength=n_classes)
    there, called = np.bincount(truth, minlength=n_classes), np.bincount(named[named >= 0], minlength=n_classes)
    seen = there + called > 0
    recall = right[there > 0] / there[there > 0]
    floored = np.maximum(recall, FLOOR)
    metrics = {
        "macro_f1": (2 * right[seen] / (there + called)[seen]).mean(),
        "worst_class": recall.min(),
        "harmonic_mean": 1 / (1 / floored).mean(),
        "geometric_mean": np.exp(np.log(floored).mean()),
    }
    if counts is not None:
        shown = counts[there > 0]
        groups = {"many": shown > MANY, "medium": (shown >= FEW) & (shown <= MANY), "few": shown < FEW}
        filled = {name: recall[group].mean() for name, group in groups.items() if group.any()}
        metrics |= filled if len(filled) > 1 else {}
    return {name: float(value) for name, value in metrics.items()}


def calibration_metrics(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> dict[str, float]:
    """How right the probabilities softmax(logits) are; nothing without labels.

    Args:
        logits: float (n, C). labels: int64 (n,), -1 unknown.

    Returns:
        `nll`, the mean of -log p(label), where p is 2.2e-16 at least, as in scikit-learn; and `ece`, the expected
        calibration error: the mean over the images of |accuracy - confidence| of the bin of confidences that an image is
        in, of equally wide bins (Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3).
    """
    rows = np.flatnonzero(labels >= 0)
    if not len(rows):
        return {}
    nll, gaps = 0.0, np.zeros(bins)
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        log_p, truth = log_softmax(logits[some].astype(np.float64), axis=1), labels[some]
        # an annotator's probabilities are float16, and may be 0
        nll -= np.maximum(log_p[np.arange(len(some)), truth], np.log(np.finfo(np.float64).eps)).sum()
        confidence, right = np.exp(log_p.max(axis=1)), log_p.argmax(axis=1) == truth
        place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
        gaps += np.bincount(place, weights=right - confidence, minlength=bins)
    return {"nll": float(nll / len(rows)), "ece": float(np.abs(gaps).sum() / len(rows))}


def written(metric: str, value: float) -> str:
    """A number of `METRICS` for people: shares in percent, the negative log-likelihood in nats."""
    return f"{value:.3f}" if metric == "nll" else f"{value:.1%}"


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share observed in n draws (95 % at z = 1.96)."""
    if n == 0:
        return 0.0, 1.0
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def entropy(mean: np.ndarray) -> float:
    """Entropy of a mean prediction (C,), divided by log C: 1 is balanced, 0 is collapse to one class."""
    return float(-(mean * np.log(np.maximum(mean, 1e-300))).sum() / math.log(len(mean)))


def consensus(networks: Sequence[Predicted]) -> float:
    """How good two networks look without any label: a score in 0..1 by which an epoch is chosen.

    The share of images on which both name the same class, which estimates their accuracy as long as they err
    independently, times the entropy of their mean prediction, so that collapse to one class does not win.

    Args:
        networks: what both networks predict of the training images.
    """
    first, second = (network.classes for network in networks)
    return float((first == second).mean() * np.mean([entropy(network.mean) for network in networks]))


def covering_rate(predictions: np.ndarray, candidates: np.ndarray) -> float:
    """Share of images whose predicted class is among their candidates ("covering rate" of PLENCH, Wang et al. 2025).

    Args:
        predictions: int64 (n,), -1 for none, which is never covered; n >= 1. candidates: bool (n, C).
    """
    return float(((predictions >= 0) & candidates[np.arange(len(predictions)), predictions]).mean())


def approximated_accuracy(log_p: np.ndarray, predictions: np.ndarray, candidates: np.ndarray) -> float:
    """How sure predictions are of their class among the candidates ("approximated accuracy" of PLENCH, Wang et al. 2025).

    1 minus the mean over the images of the probability, normalised within the candidate set, that is not on the predicted
    class: all of it where that is no candidate. So it is never above `covering_rate`.

    Args:
        log_p: (n, C) log probabilities, up to a number a row, n >= 1. predictions, candidates: see `covering_rate`.
    """
    rows = np.arange(len(log_p))
    within = np.where(candidates, log_p.astype(np.float64), -np.inf)
    covered = (predictions >= 0) & candidates[rows, predictions]
    ratio = within[covered] - within[rows, predictions][covered, None]
    return float(np.exp(-logsumexp(ratio, axis=1)).sum() / len(log_p))


def label_free_scores(
    candidates: dict[str, np.ndarray],
    predictions: dict[str, np.ndarray],
    log_p: dict[str, np.ndarray] | None = None,
    networks: Sequence[np.ndarray] = (),
) -> dict[str, Any]:
    """What can be said of a method without any label, for comparing runs.

    Args:
        candidates: for `train` and `test` bool (n, C), the annotator's own sets, whatever was made of them for training.
        predictions: for `train` and `test` int64 (n,), -1 for none. log_p: (n, C) where there are probabilities.
        networks: (N, C) log probabilities of each network for the training images; `consensus` is of two.

    Returns:
        `covering_rate` and `approximated_accuracy` by split, and `consensus`; what cannot be had is left out.
    """
    filled = [split for split, predicted in predictions.items() if len(predicted)]
    scores: dict[str, Any] = {"covering_rate": {s: covering_rate(predictions[s], candidates[s]) for s in filled}}
    if log_p is not None:
        approximated = {s: approximated_accuracy(log_p[s], predictions[s], candidates[s]) for s in filled}
        scores["approximated_accuracy"] = approximated
    return scores | ({"consensus": consensus([Predicted.of(log_p) for log_p in networks])} if len(networks) == 2 else {})


LEAST_COVERED = 0.75  # of the covering rate of the run that covers most


def pick(covering: Sequence[float], agreement: Sequence[float]) -> int:
    """Which of several runs on the same images is best as far as can be known without labels: its number among them.

    The largest consensus among those that cover at least three quarters as many images as the one that covers most.

    Args:
        covering: `covering_rate` of each, of test images where there are some; one or more. agreement: `consensus` of each.
    """
    least = LEAST_COVERED * max(covering) - 1e-9  # rounded shares that are just enough are enough
    allowed = [number for number, rate in enumerate(covering) if rate >= least]
    return max(allowed, key=lambda number: agreement[number])


def mean_confidence(logits: np.ndarray, predictions: np.ndarray) -> float:
    """Mean over the images of softmax(logits) at the predicted class, 0 where none is predicted.

    Args:
        logits: float (n, C), n >= 1. predictions: int64 (n,), -1 for none.
    """
    total = 0.0
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        some, named = log_softmax(logits[rows].astype(np.float64), axis=1), predictions[rows]
        total += float((np.exp(some[np.arange(len(some)), named]) * (named >= 0)).sum())
    return total / len(logits)


def division_health(
    divisions: Sequence[Division],
    networks: Sequence[Predicted],
    candidates: np.ndarray,
    annotator: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
) -> dict[str, float]:
    """How a division looks, mostly without ground truth: what a person watches to see whether a run is sound.

    Args:
        divisions, networks: of both networks, and what they predict, before alignment.
        candidates: bool (N, C). annotator: int64 (N,), its predictions. labels: int64 (N,), -1 unknown.
        class_names: C names.

    Returns:
        Scalars by name: size of P, the mixtures, agreement of the networks with each other and with the annotator,
        entropy of the mean prediction, images that each class is given (mean of both networks; the classes themselves
        are left out where there are more than 50); with labels also accuracies inside P and U.
    """
    predictions = [network.classes for network in networks]
    counts = np.stack([np.bincount(p, minlength=len(class_names)) for p in predictions])
    health = {
        "division/trusted": float(np.mean([d.trusted.mean() for d in divisions])),
        "division/agreement_of_nets": float((predictions[0] == predictions[1]).mean()),
        "division/agreement_with_annotator": float(np.mean([(p == annotator).mean() for p in predictions])),
        "division/entropy_of_mean_prediction": float(np.mean([entropy(network.mean) for network in networks])),
        "division/rarest_pseudo_label": float(counts.min()),
    }
    if len(class_names) <= MOST_CURVES:
        health |= {f"pseudo_labels/{name}": float(n) for name, n in zip(class_names, counts.mean(axis=0))}
    for number, division in enumerate(divisions, start=1):
        components = {"mean": division.means, "share": division.shares, "deviation": division.deviations}
        for name, values in components.items():
            for size, value in zip(("small", "large"), values):
                if math.isfinite(value):
                    health[f"gmm/net{number}_{name}_{size}"] = value
    known = labels >= 0
    if known.any():
        inside = candidates[np.arange(len(labels)), np.maximum(labels, 0)]
        for name, rows in (("P", [d.trusted & known for d in divisions]), ("U", [~d.trusted & known for d in divisions])):
            filled = [(p, r) for p, r in zip(predictions, rows) if r.any()]
            if filled:
                health[f"truth/accuracy_in_{name}"] = float(np.mean([(p[r] == labels[r]).mean() for p, r in filled]))
                health[f"truth/candidate_coverage_in_{name}"] = float(np.mean([inside[r].mean() for _, r in filled]))
    return health


def prototype_health(prototypes: np.ndarray) -> dict[str, float]:
    """Whether the prototypes of classes stay apart: 1 and 1 where all have become the same direction.

    Args:
        prototypes: (C, D), of length 1, or zero for a class that was never seen.

    Returns:
        `prototypes/mean_cosine` of different classes, and `prototypes/effective_rank`, exp of the entropy of the squared
        singular values' shares (after Roy and Vetterli, "The Effective Rank", EUSIPCO 2007); nothing before two classes
        were seen.
    """
    seen = prototypes[prototypes.any(axis=1)].astype(np.float64)
    n = len(seen)
    if n < 2:
        return {}
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    total = seen.sum(axis=0)
    shares = np.linalg.svd(seen, compute_uv=False) ** 2 / n
    entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum()
    mean_cosine = (total @ total - n) / (n * (n - 1))
    return {"prototypes/mean_cosine": float(mean_cosine), "prototypes/effective_rank": float(np.exp(entropy))}


def few_shot_warnings(known: np.ndarray, per_class: int, class_names: list[str]) -> list[str]:
    """In words, which classes gave fewer labelled images than asked for. known: int64 (N,), -1 unknown."""
    counts = np.bincount(known[known >= 0], minlength=len(class_names))
    short = [f"{count} of {name}" for name, count in zip(class_names, counts) if count < per_class]
    named = ", ".join(short[:5]) + (", …" if len(short) > 5 else "")
    return [f"{per_class} labels a class were asked for, and there are only {named}"] if short else []


def collapse_warnings(predictions: np.ndarray, class_names: list[str]) -> list[str]:
    """Plain words about classes that the trained networks hardly ever name on the training images; empty when all is well.

    A class counts as lost below a tenth of an even share, and predictions as collapsed when one class takes half of them
    although there are more than three.

    Args:
        predictions: int64 (N,).
    """
    counts = np.bincount(predictions, minlength=len(class_names))
    lost = [name for name, count in zip(class_names, counts) if count < len(predictions) / len(class_names) / 10]
    warnings = []
    if lost:
        named = ", ".join(lost[:5]) + (", …" if len(lost) > 5 else "")
        warnings.append(f"{len(lost)} of {len(class_names)} classes are hardly ever predicted ({named})")
    if len(class_names) > 3 and counts.max() > len(predictions) / 2:
        warnings.append(f"more than half of all images are called {class_names[counts.argmax()]}")
    if warnings:
        warnings.append(
            "unless your images are like that, the labels have collapsed: look at what the annotator names, then try "
            "other templates or class names, or give a few true labels with --labels"
        )
    return warnings
