"""The pre-filter: which classes a zero-shot classifier takes for possible, before anything is trained on candidate sets.

PartialCLIP keeps the half of the classes that CLIP finds most probable, and leaves adaptive forms open; two are here.
"""

from __future__ import annotations

import math

import numpy as np

from coreg.errors import UserError
from coreg.weak.rules import RULES

SPELLINGS = "none, topk (half of the classes), topk:K, mass:P or conformal:A"
_ROWS = 1 << 14  # judged at a time
# spelling -> the candidate rule that keeps these classes
_AS_RULES = {"topk": "topk", "mass": "cumulative"}


def parse_prefilter(spec: str) -> tuple[str, float | None]:
    """A pre-filter as its name and its number, None for `topk` without one.

    Raises:
        UserError: unknown, or the number is missing or out of range.
    """
    name, _, written = spec.partition(":")
    if spec in ("none", "topk"):
        return spec, None
    if name not in (*_AS_RULES, "conformal"):
        raise UserError(f"unknown --prefilter {spec}; write one of {SPELLINGS}")
    try:
        number = float(int(written)) if name == "topk" else float(written)
    except (ValueError, OverflowError):
        number = math.nan
    if name == "topk" and not number >= 1:
        raise UserError(f"--prefilter {spec} needs a whole number from 1 on after the colon, such as topk:5")
    if name == "mass" and not 0 < number <= 1:
        raise UserError(f"--prefilter {spec} needs a number above 0 and up to 1 after the colon, such as mass:0.95")
    if name == "conformal" and not 0 < number < 1:
        raise UserError(f"--prefilter {spec} needs a number above 0 and below 1 after the colon, such as conformal:0.1")
    return name, number


def likely_classes(probs: np.ndarray, spec: str, known: np.ndarray) -> np.ndarray:
    """The classes that a pre-filter leaves possible, bool (n, C).

    Args:
        probs: float (n, C), of a zero-shot classifier.
        spec: `topk` (the C // 2 most probable classes, as in PartialCLIP), `topk:K` (the K most probable), `mass:P` (the
            fewest most probable classes that together have the share P), or `conformal:A` (classes at least as probable as
            a threshold that leaves the true class in with probability 1 - A: split conformal prediction with the score
            1 - p(class) of Sadinle, Lei and Wasserman, JASA 2019, calibrated on the known classes).
        known: int64 (n,), classes that a person gave, -1 elsewhere.

    Raises:
        UserError: `conformal` without a known class.
    """
    name, number = parse_prefilter(spec)
    if name == "conformal":
        return probs >= conformal_threshold(probs, known, number)
    rule, _ = RULES[_AS_RULES[name]]
    number = max(probs.shape[1] // 2, 1) if number is None else number
    likely, counts = np.empty(probs.shape, dtype=bool), np.zeros((0, probs.shape[1]), dtype=np.int16)
    for start in range(0, len(probs), _ROWS):
        rows = slice(start, start + _ROWS)
        likely[rows] = rule(counts, probs[rows].astype(np.float32), number)
    return likely


def conformal_threshold(probs: np.ndarray, known: np.ndarray, alpha: float) -> float:
    """The probability from which on classes are kept, of split conformal prediction.

    With n known classes it is the ceil((n + 1) (1 - alpha))-th largest of their probabilities, and 0, so that all classes
    are kept, where n is too small for that.

    Raises:
        UserError: no class is known.
    """
    rows = np.flatnonzero(known >= 0)
    if not len(rows):
        raise UserError(
            f"--prefilter conformal:{alpha:g} needs images that a person labelled; give --labels FILE or --few_shot N, or "
            f"write --prefilter topk or mass:0.95"
        )
    ranked = np.sort(probs[rows, known[rows]])[::-1]
    rank = math.ceil((len(rows) + 1) * (1 - alpha))
    return float(ranked[rank - 1]) if rank <= len(rows) else 0.0
