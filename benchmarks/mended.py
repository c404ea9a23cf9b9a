"""What a refinement takes with many classes, step by step.

    python -m benchmarks.mended [--images 1000000] [--classes 1000]

Seconds of the processor on one thread, and the largest resident memory above that of the inputs, with what stays from the
steps before. The steps are those of `coreg.weak.refine.refine`, on the rows that it would take: the prior, the weight and
the temperature are judged by at most 20,000 images, and a mixture of 1,000 classes is fitted to at most 134,217; with more
images only the last step grows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.growth import resident
from benchmarks.tables import as_markdown, environment
from coreg.weak.mixture import Subset, fit_mixture, fit_projection, softmax
from coreg.weak.refine import Refinement, choose, fit_two_halves, fitted_rows

FEATURES, SPREAD, WRONG, SURE = 256, 0.4, 0.4, 6.0
FEW_ROWS = 1 << 12  # at a time


def made(n: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features float16 (n, FEATURES), probabilities float16 (n, C) of an annotator that errs by chance, labels (n,)."""
    rng = np.random.default_rng(0)
    labels, means = rng.integers(0, classes, n), SPREAD * rng.normal(size=(classes, FEATURES))
    features, probs = np.empty((n, FEATURES), np.float16), np.empty((n, classes), np.float16)
    for rows in _parts(n):
        true = labels[rows]
        features[rows] = means[true] + rng.normal(size=(len(true), FEATURES))
        logits = rng.normal(size=(len(true), classes))
        named = np.where(rng.random(len(true)) < WRONG, rng.integers(0, classes, len(true)), true)
        logits[np.arange(len(true)), named] += SURE
        probs[rows] = softmax(logits)
    return features, probs, labels


def _parts(n: int) -> list[slice]:
    return [slice(start, min(start + FEW_ROWS, n)) for start in range(0, n, FEW_ROWS)]


def measure(n: int, classes: int) -> list[dict[str, str]]:
    """One row a step; the last one has the share of right labels before and after, too."""
    torch.set_num_threads(1)
    features, probs, labels = made(n, classes)
    before, rows, ids = resident()[0], [], np.arange(n)
    fitted, slack = fitted_rows(ids, classes)
    evidence = Subset(probs, fitted)

    def timed(step: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak until here
        start = time.process_time()
        result = work()
        seconds, most = time.process_time() - start, (resident()[1] - before) / 1e6
        rows.append({"step": step, "seconds": f"{seconds:,.0f}", "MB": f"{max(most, 0):,.0f}"})
        return result

    def right() -> np.ndarray:
        named = [np.stack([p.argmax(axis=1) for p in (probs[part], refinement.part(part))]) for part in _parts(n)]
        return (np.concatenate(named, axis=1) == labels).mean(axis=1)

    with threadpool_limits(1):
        projection = timed("principal axes", lambda: fit_projection(Subset(features, fitted), classes))
        z = timed("projected features", lambda: projection(Subset(features, fitted)))
        setting, scores = timed("prior and weight chosen", lambda: choose(z, evidence, fitted))
        temperature = timed("temperature, from two halves", lambda: fit_two_halves(z, evidence, setting, fitted))
        mixture = timed("the mixture", lambda: fit_mixture(z, evidence, setting, slack=slack))
        refinement = Refinement(
            setting, scores, temperature, 0.0, projection, mixture, features, probs, np.ones(n, dtype=np.int8)
        )
        annotator, mended = timed("probabilities", right)
    rows[-1]["step"] += f" (labels right: {annotator:.1%} before, {mended:.1%} after)"
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    args = parser.parse_args(argv)
    print(f"{environment()}\n\n{as_markdown(measure(args.images, args.classes))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
