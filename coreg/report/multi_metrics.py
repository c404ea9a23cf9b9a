"""How well labels are predicted where an image has any number of them.

Truth is int8 (N, L): +1 present, -1 absent, 0 unknown, which counts neither way. Scores are float (N, L), larger for more
probable; logits or float64 probabilities, since float32 probabilities near 1 are equal where their logits are not. All
results are shares, and not per cent.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TOP = (1, 3, 5)


def average_precisions(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Average precision of each label: the mean precision at its images, in steps, equal scores taken together.

    Returns:
        float64 (L,); 0 for a label that no image is known to have, as in the published tables.
    """
    return np.array([_average_precision(*_known(scores[:, label], truth[:, label])) for label in range(truth.shape[1])])


def _known(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return scores[truth != 0], truth[truth != 0] > 0


def _average_precision(scores: np.ndarray, present: np.ndarray) -> float:
    """Of one label, scores (n,) and bool (n,)."""
    hits, counts, _ = _cuts(scores, present)
    if not present.any():
        return 0.0
    return float((np.diff(hits, prepend=0) * hits / counts).sum() / present.sum())


def _cuts(scores: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is above each cut between different scores (n,), from the largest down.

    Returns:
        Sum of `expected`, number of images, and score of the last of them, (m,) each.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1) if len(ordered) else np.arange(0)
    return np.cumsum(expected[order], dtype=np.float64)[last], last + 1, ordered[last]


def precision_recall(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of one label at each cut between different scores, from the largest down, (m,) each.

    Args:
        scores: (n,). truth: int8 (n,); some are present, unknown ones do not count.
    """
    known, present = _known(scores, truth)
    hits, counts, _ = _cuts(known, present)
    return hits / counts, hits / present.sum()


def at_top(scores: np.ndarray, truth: np.ndarray, k: int) -> dict[str, float]:
    """What the k labels of largest score of an image are worth, of equal ones the last, as the public code sorts.

    Returns:
        `precision`: share of them that are present; `recall`: share of the present labels among them, a mean over images
        that have any; `hit`: share of images of which one of them is present. Images with unknown labels are left out;
        nothing is returned where none is left, or k exceeds the number of labels.
    """
    known = (truth != 0).all(axis=1)
    if not known.any() or k > truth.shape[1]:
        return {}
    present = truth[known] > 0
    top = np.argsort(scores[known], axis=1, kind="stable")[:, ::-1][:, :k]
    hits, some = np.take_along_axis(present, top, axis=1).sum(axis=1), present.any(axis=1)
    result = {"precision": float(hits.mean() / k), "hit": float((hits > 0).mean())}
    if some.any():
        result["recall"] = float((hits[some] / present[some].sum(axis=1)).mean())
    return result


def of_predictions(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of labels that are predicted or not, bool (N, L).

    Returns:
        `CP`, `CR`: means over the labels, 0 where one is never predicted, or never present; `CF1` = 2 CP CR / (CP + CR);
        `OP`, `OR`, `OF1`: of all cells together; `example_F1`: a mean over images, 1 where nothing is present and nothing
        predicted.
    """
    right, wrong = predicted & (truth > 0), predicted & (truth < 0)
    missed = ~predicted & (truth > 0)
    cp = _ratio(right.sum(axis=0), (right | wrong).sum(axis=0)).mean()
    cr = _ratio(right.sum(axis=0), (right | missed).sum(axis=0)).mean()
    op, our = _ratio(right.sum(), (right | wrong).sum()), _ratio(right.sum(), (right | missed).sum())
    judged = (truth != 0).any(axis=1)
    twice, both = 2 * right[judged].sum(axis=1), (right | wrong)[judged].sum(axis=1) + (truth > 0)[judged].sum(axis=1)
    example = np.where(both == 0, 1.0, _ratio(twice, both))
    values = {"CP": cp, "CR": cr, "CF1": _ratio(2 * cp * cr, cp + cr), "OP": op, "OR": our}
    values |= {"OF1": _ratio(2 * op * our, op + our), "example_F1": example.mean() if len(example) else 0.0}
    return {name: float(value) for name, value in values.items()}


def _ratio(part: np.ndarray | float, whole: np.ndarray | float) -> np.ndarray:
    """part / whole, 0 where the whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def best_threshold(scores: np.ndarray, expected: np.ndarray) -> float:
    """The threshold of the largest expected F1: what has a score >= it is predicted.

    With true labels 0 and 1 in `expected`, as of images put aside for validation, it is the threshold of the largest F1.
    Without any, `expected` are the predicted probabilities themselves: with S the sum of all and s the sum of the k
    largest, k labels have the F1 2 s / (k + S) (Lipton, Elkan and Naryanaswamy, ECML 2014), which is as good as they are
    calibrated.

    Args:
        scores: float (n,), in any order. expected: (n,), true labels or probabilities.

    Returns:
        Half-way between the last score above the cut and the first below it, above all scores where nothing is expected;
        the largest of several that are as good.
    """
    sums, counts, last = _cuts(scores, expected)
    if not len(last) or sums[-1] <= 0:
        return float(np.nextafter(scores.max(initial=0.0), np.inf))
    value = 2 * sums / (counts + sums[-1])
    return _between(last, int(value.argmax()))


def _between(last: np.ndarray, cut: int) -> float:
    """Half-way between the last score above a cut and the first below it; `last` as of `_cuts`."""
    above, below = float(last[cut]), float(last[min(cut + 1, len(last) - 1)])
    middle = (above + below) / 2
    return middle if middle > below else above


def threshold_of_count(scores: np.ndarray, labels_an_image: float) -> float:
    """One threshold for all labels, from which on images have so many labels on average, as nearly as equal scores let.

    It takes the order of the scores alone, and so serves where they are far from probabilities: networks that learn from
    present labels only are too timid (AN) or too bold (EM, ROLE) by far.

    Args:
        scores: float (n, L).
    """
    flat, wanted = scores.ravel(), labels_an_image * len(scores)
    _, counts, last = _cuts(flat, np.ones(flat.shape))
    if not len(last) or wanted < counts[0] / 2:
        return float(np.nextafter(flat.max(initial=0.0), np.inf))
    return _between(last, int(np.abs(counts - wanted).argmin()))


def thresholds(scores: np.ndarray, expected: np.ndarray, per_label: bool = True) -> np.ndarray:
    """`best_threshold` of every label, float64 (L,), or of all labels together.

    Args:
        scores: float (n, L). expected: (n, L), probabilities, or int8 truth, of which unknown cells do not count.
    """
    is_truth = np.issubdtype(expected.dtype, np.integer)
    counted = expected != 0 if is_truth else np.ones(expected.shape, dtype=bool)
    expected = (expected > 0).astype(np.float64) if is_truth else expected
    if not per_label:
        return np.full(scores.shape[1], best_threshold(scores[counted], expected[counted]))
    columns = zip(scores.T, expected.T, counted.T)
    return np.array([best_threshold(score[some], values[some]) for score, values, some in columns])


def thresholds_of_truth(scores: np.ndarray, truth: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
    """Thresholds (L,) of the largest F1 on images whose labels are known.

    A label that is known to be present in none of them, or absent in none, gets that of `otherwise`, (L,).

    Args:
        scores: float (n, L). truth: int8 (n, L), 0 unknown.
    """
    both = (truth > 0).any(axis=0) & (truth < 0).any(axis=0)
    return np.where(both, thresholds(scores, truth), otherwise)


def measure_labels(scores: np.ndarray, truth: np.ndarray, at: np.ndarray | float) -> dict[str, Any]:
    """Everything that tables report of scores (N, L), predicted where they are at least `at`, a number or one a label.

    Returns:
        `mAP`: the mean over all labels, as published; `labels_without_images`: how many labels of them count 0 because no
        image is known to have them; `mAP_of_the_others`, where there are such; `average_precision`: L numbers, None for
        those labels; what `of_predictions` gives; `precision_at_K`, `recall_at_K`, `hit_at_K`.
    """
    average, there = average_precisions(scores, truth), (truth > 0).any(axis=0)
    result: dict[str, Any] = {"mAP": float(average.mean()), "labels_without_images": int((~there).sum())}
    if there.any() and not there.all():
        result["mAP_of_the_others"] = float(average[there].mean())
    result["average_precision"] = [float(value) if some else None for value, some in zip(average, there)]
    result |= of_predictions(scores >= at, truth)
    return result | {f"{name}_at_{k}": value for k in TOP for name, value in at_top(scores, truth, k).items()}
