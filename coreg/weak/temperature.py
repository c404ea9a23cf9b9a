"""One temperature for all classes: how sure a prediction is, fitted to classes that somebody else names."""

from __future__ import annotations

import numpy as np

# outside of these every prediction is certain, or none says anything
COLDEST, HOTTEST = 0.05, 20.0
_ROWS = 4096  # at a time, so that memory is one table of logits


def negative_log_likelihood(logits: np.ndarray, classes: np.ndarray, temperature: float) -> float:
    """Mean of -log softmax(logits / T)[class] over the rows.

    Args:
        logits: float (n, C). classes: int64 (n,).
    """
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(scaled)), classes]).mean())


def fit_temperature(logits: np.ndarray, classes: np.ndarray) -> float:
    """The T in [0.05, 20] with the smallest `negative_log_likelihood`.

    The objective is convex in 1 / T and its slope is the mean of E_p[z] - z_class, so that bisection finds where the slope
    changes sign. Rows that are all right and far apart drive T to 0.05, rows that say nothing to 20.

    Args:
        logits: float (n, C), n at least 1. classes: int64 (n,).
    """
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    wanted, expected = z[np.arange(len(z)), classes], np.empty(len(z))
    low, high = np.log(COLDEST), np.log(HOTTEST)
    for _ in range(40):
        middle = (low + high) / 2
        for start in range(0, len(z), _ROWS):
            rows = z[start : start + _ROWS]
            p = np.exp(rows / np.exp(middle))
            expected[start : start + _ROWS] = (p * rows).sum(axis=1) / p.sum(axis=1)
        # the slope with respect to 1 / T: positive where the predictions are too sure, and T has to grow
        slope = (expected - wanted).mean()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(np.exp((low + high) / 2))
