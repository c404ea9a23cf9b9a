"""How many predictions are right, estimated without labels: a number with an interval, and in words what it is worth."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

MARGIN = 0.1  # what the scores' range is widened by on both sides; chosen on runs with known truth (docs/method.md)
COVERED = 0.99  # share of predictions among the annotator's candidates from which on a method only repeats it
FEWEST = 100  # images, with fewer the scores themselves are a matter of chance
KINDS = {"train": "the training images", "test": "the test images (not seen in training)"}


def estimate(scores: Mapping[str, float]) -> dict[str, Any] | None:
    """An estimate of accuracy from scores that each come near it where their own assumption holds.

    Args:
        scores: of `confidence`, `consensus` and `approximated_accuracy` those that there are, each in 0..1.

    Returns:
        `accuracy`, their median; `interval`, from the smallest less `MARGIN` to the largest and `MARGIN` more, within 0..1;
        and `scores`. None with fewer than two, because one alone says nothing of how wrong it may be.
    """
    if len(scores) < 2:
        return None
    values = list(scores.values())
    interval = [max(0.0, min(values) - MARGIN), min(1.0, max(values) + MARGIN)]
    return {"accuracy": statistics.median(values), "interval": interval, "scores": dict(scores)}


def estimates(
    confidence: Mapping[str, float], label_free: Mapping[str, Any], images: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """An `estimate` for each split of at least `FEWEST` images whose predictions do not merely repeat the annotator.

    Args:
        confidence: mean calibrated probability of the predicted labels, by split. label_free: as
            `coreg.report.metrics.label_free_scores` gives it. images: their number, by split.
    """
    made = {}
    for split, share in confidence.items():
        scores = {
            "confidence": share,
            "consensus": label_free.get("consensus"),
            "approximated_accuracy": label_free.get("approximated_accuracy", {}).get(split),
        }
        one = estimate({name: score for name, score in scores.items() if score is not None})
        repeats = label_free.get("covering_rate", {}).get(split, 0) >= COVERED
        if one is not None and images[split] >= FEWEST and not repeats:
            made[split] = one
    return made


def estimate_lines(report: Mapping[str, Any]) -> list[str]:
    """The estimates in sentences; none where there are none."""
    lines = []
    for split, one in (report.get("estimate") or {}).items():
        low, high = one["interval"]
        lines.append(
            f"Estimated without labels: {one['accuracy']:.0%} of {KINDS.get(split, split)} are named rightly, probably "
            f"between {low:.0%} and {high:.0%}."
        )
    if lines:
        lines.append("This is of images like these and no others; what all networks get wrong alike it cannot see.")
    return lines
