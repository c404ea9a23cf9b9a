"""From evidence to candidate sets: rules that turn an annotation store into a boolean matrix, and their statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from coreg.errors import UserError

if TYPE_CHECKING:  # a rule's spelling is checked before the store's packages are imported
    from coreg.store.store import AnnotationStore

_ROWS = 1 << 14  # judged at a time: ranks and sums of a million rows would need ten times the memory of their evidence


def vote_counts(votes: np.ndarray, classes: int) -> np.ndarray:
    """How many templates name each class: votes int16 (N, T) with -1 = abstention -> int16 (N, classes)."""
    counts = np.zeros((len(votes), classes), dtype=np.int16)
    rows = np.arange(len(votes))
    for named in votes.T:  # a template names at most one class an image, so no index occurs twice
        counts[rows[named >= 0], named[named >= 0]] += 1
    return counts


# Each rule: (votes counted (N, C), probabilities float32 (N, C), parameter) -> bool (N, C).
Rule = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


def _votes(counts: np.ndarray, probs: np.ndarray, least: float) -> np.ndarray:
    # A row in which no class reaches the threshold keeps its most voted one; the probabilities break ties.
    best = (counts + 0.5 * probs).argmax(axis=1)
    return (counts >= least) | _one_hot(best, counts.shape[1])


def _cumulative(counts: np.ndarray, probs: np.ndarray, total: float) -> np.ndarray:
    order = np.argsort(-probs, axis=1, kind="stable")
    ordered = np.take_along_axis(probs, order, axis=1).astype(np.float64)
    before = np.cumsum(ordered, axis=1) - ordered  # a class is needed while those before it do not reach the total
    # float16 rows sum to 1 only up to rounding: the total is a share of what is there; the first class is always needed
    there = ordered.sum(axis=1, keepdims=True)
    needed = before < np.maximum(total * there - 1e-9, np.minimum(there, np.finfo(np.float64).tiny))
    chosen = np.zeros(probs.shape, dtype=bool)
    np.put_along_axis(chosen, order, needed, axis=1)
    return chosen


def _one_hot(index: np.ndarray, classes: int) -> np.ndarray:
    return index[:, None] == np.arange(classes)


# name -> (rule, whether the parameter is a count from 1 on; otherwise it is a share in (0, 1])
RULES: dict[str, tuple[Rule, bool]] = {
    "votes": (_votes, True),
    # rank 0 is the most probable class; equal probabilities rank by class index
    "topk": (lambda _, probs, k: (-probs).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") < k, True),
    "prob": (lambda _, probs, least: (probs >= least) | _one_hot(probs.argmax(axis=1), probs.shape[1]), False),
    "ratio": (lambda _, probs, ratio: probs >= ratio * probs.max(axis=1, keepdims=True), False),
    "cumulative": (_cumulative, False),
}
SPELLINGS = "union, votes:V, topk:K, prob:P, ratio:R, cumulative:P"


def parse_rule(rule: str) -> tuple[Rule, float]:
    """`rule` as (function, parameter).

    Raises:
        UserError: unknown rule, or a parameter that is missing or out of range.
    """
    if rule == "union":
        return lambda counts, *_: counts > 0, 0.0
    name, _, written = rule.partition(":")
    if name not in RULES:
        raise UserError(f"unknown candidate rule {rule!r}; write one of {SPELLINGS}")
    function, is_count = RULES[name]
    try:
        value = float(int(written)) if is_count else float(written)
    except (ValueError, OverflowError):
        value = 0.0
    if not (value >= 1 if is_count else 0 < value <= 1):
        wanted = "a whole number from 1 on" if is_count else "a number above 0 and up to 1"
        raise UserError(f"candidate rule {rule!r} needs {wanted} after the colon, such as {name}:{2 if is_count else 0.5}")
    return function, value


def candidate_sets(store: AnnotationStore, rule: str = "union") -> np.ndarray:
    """The candidate set of every image.

    Args:
        store: votes (N, T) and mean probabilities (N, C).
        rule: `union` (every class that a template names: the papers' rule), `votes:V` (classes named by at least V
            templates, else the most voted one), `topk:K` (the K most probable), `prob:P` (probability at least P, and
            the most probable), `ratio:R` (at least R times the largest probability), `cumulative:P` (the fewest most
            probable classes that together have the share P). Sets that were drawn are what they are.

    Returns:
        bool (N, C); no row is empty, and a row in which every template abstains is the full set.

    Raises:
        UserError: the rule cannot be understood, or the sets were drawn and it is not `union`.
    """
    if rule != "union":
        store.need_annotator("leave out --candidates")
    if store.drawn:
        return store.drawn_sets()
    return candidates_of(store.votes(), store.probs(), rule)


def candidates_of(votes: np.ndarray, probs: np.ndarray, rule: str = "union") -> np.ndarray:
    """As `candidate_sets`, from votes int16 (n, T) and probabilities (n, C) of some of the images."""
    function, value = parse_rule(rule)
    candidates = np.empty(probs.shape, dtype=bool)
    for start in range(0, len(probs), _ROWS):
        rows = slice(start, start + _ROWS)
        counts = vote_counts(votes[rows], probs.shape[1])
        candidates[rows] = function(counts, probs[rows].astype(np.float32), value)
    # where no template says anything, or the probabilities say nothing, every class may be the one
    candidates[(votes < 0).all(axis=1) | ~candidates.any(axis=1)] = True
    return candidates


def partial_accuracy(candidates: np.ndarray, labels: np.ndarray) -> float | None:
    """Share of the labelled images whose candidate set holds the label.

    Args:
        candidates: bool (N, C).
        labels: int (N,), -1 where unknown.

    Returns:
        A fraction, or None when no image is labelled.
    """
    rows = np.flatnonzero(labels >= 0)
    return float(candidates[rows, labels[rows]].mean()) if len(rows) else None


def mean_candidates(candidates: np.ndarray) -> float:
    """Mean size of the candidate sets, bool (N, C)."""
    return float(candidates.sum(axis=1).mean())
