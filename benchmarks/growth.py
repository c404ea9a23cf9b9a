"""How time and memory grow with the number of images N and of classes C, outside the networks.

    python -m benchmarks.growth [--largest 1000000] [--classes 10] [--only WORK ...]

Every point is measured in a process of its own, on one thread: seconds of the processor, and the largest resident memory
above that of the inputs, for the most images. The exponent is the slope of log time over log N (three values) or over
log C (10, 100 and 1000, N = 10,000).
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.tables import as_markdown, environment
from coreg.learn.division import Predicted, divide
from coreg.learn.tables import predicted
from coreg.report.metrics import per_class_accuracy
from coreg.run import checkpoint
from coreg.views.order import ShuffledRows
from coreg.weak.mixture import Setting, fit_mixture
from coreg.weak.rules import candidates_of
from train_coreg import losses_and_targets

FEWEST_IMAGES, CLASSES, TEMPLATES = 10_000, (10, 100, 1000), 27


def sure_logits(n: int, c: int, rng: np.random.Generator) -> torch.Tensor:
    """float32 (n, c), of a network that is sure of two thirds of the images."""
    logits = rng.standard_normal((n, c), dtype=np.float32)
    logits[np.arange(n), rng.integers(0, c, n)] += np.where(rng.random(n) < 0.67, 12.0, 2.0)
    return torch.from_numpy(logits)


def drawn_sets(n: int, c: int, rng: np.random.Generator) -> np.ndarray:
    """bool (n, c), candidate sets of about three classes, none of them empty."""
    sets = rng.random((n, c), dtype=np.float32) < 2 / c
    sets[:, 0] = True
    return sets


def evidence(n: int, c: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Votes int16 (n, TEMPLATES) and probabilities float16 (n, c), as an annotation store has them."""
    probs = rng.dirichlet(np.full(c, 0.3), n).astype(np.float16)
    return rng.integers(-1, c, (n, TEMPLATES)).astype(np.int16), probs


def save_and_load(state: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), 1, state)
        checkpoint.load(Path(folder), checkpoint.latest(Path(folder)))


def _candidate_rule(rule: str) -> Callable[[int, int, np.random.Generator], Callable[[], Any]]:
    def prepare(n: int, c: int, rng: np.random.Generator) -> Callable[[], Any]:
        votes, probs = evidence(n, c, rng)
        return lambda: candidates_of(votes, probs, rule)

    return prepare


def _predicted(n: int, c: int, rng: np.random.Generator) -> Callable[[], Any]:
    logits = sure_logits(n, c, rng)
    return lambda: predicted(logits)


def _targets(n: int, c: int, rng: np.random.Generator) -> Callable[[], Any]:
    logits, sets = sure_logits(n, c, rng), drawn_sets(n, c, rng)
    task = SimpleNamespace(
        weak=SimpleNamespace(table=sets), method=SimpleNamespace(alignment="uniform"), prior=np.full(c, 1 / c)
    )
    network = Predicted(np.zeros(0, dtype=np.int64), np.full(c, 1 / c))
    return lambda: losses_and_targets(task, logits, network)


def _divide(n: int, c: int, rng: np.random.Generator) -> Callable[[], Any]:
    # five epochs of losses whose two components overlap: the fit takes all of its ten iterations
    history = np.where(rng.random(n) < 0.6, rng.gamma(2.0, 0.4, (5, n)), rng.normal(2.0, 0.8, (5, n)).clip(0))
    return lambda: divide(list(history), np.ones(n, dtype=bool), seed=0)


def _order(n: int, c: int, rng: np.random.Generator) -> Callable[[], Any]:
    def whole_epoch() -> None:
        rows = ShuffledRows(np.arange(n), 256, (0, "growth"))
        for step in range(rows.per_round):
            rows.batch(step)

    return whole_epoch


def _checkpoint(n: int, c: int, rng: np.random.Generator) -> Callable[[], Any]:
    verdict = {"weight": torch.rand(n), "targets": torch.rand(n, c), "trusted": torch.ones(n, dtype=torch.bool)}
    state = {"verdicts": [verdict, verdict], "losses": [torch.rand(5, n, dtype=torch.float64) for _ in range(2)]}
    return lambda: save_and_load(state)


def _per_class(n: int, c: int, rng: np.random.Generator) -> Callable[[], Any]:
    predictions, labels = rng.integers(0, c, n), rng.integers(0, c, n)
    return lambda: per_class_accuracy(predictions, labels, c)


def _refine(n: int, c: int, rng: np.random.Generator) -> Callable[[], Any]:
    """One round of the mixture, balancing included; ten are made."""
    probs = rng.dirichlet(np.full(c, 0.3), n).astype(np.float16)
    z = rng.normal(size=(n, 64)).astype(np.float32)
    z[:, : min(c, 64)] += probs[:, :64]
    return lambda: fit_mixture(z, probs, Setting(0.5, "uniform"), rounds=1)


# what is measured -> makes its inputs for (N, C) and gives the work
WORK: dict[str, Callable[[int, int, np.random.Generator], Callable[[], Any]]] = {
    "division: mixture of two": _divide,
    "division: what is predicted": _predicted,
    "division: losses and targets": _targets,
    "order of an epoch": _order,
    "candidates: union": _candidate_rule("union"),
    "candidates: votes:2": _candidate_rule("votes:2"),
    "candidates: topk:3": _candidate_rule("topk:3"),
    "candidates: prob:0.1": _candidate_rule("prob:0.1"),
    "candidates: ratio:0.5": _candidate_rule("ratio:0.5"),
    "candidates: cumulative:0.9": _candidate_rule("cumulative:0.9"),
    "refinement: a round": _refine,
    "checkpoint, saved and loaded": _checkpoint,
    "accuracy of every class": _per_class,
}
IN_N_ALONE = ("division: mixture of two", "order of an epoch")
# of training, what grows with the number of images; measured for ten million
IN_TRAINING = (
    "division: mixture of two",
    "division: what is predicted",
    "division: losses and targets",
    "order of an epoch",
    "checkpoint, saved and loaded",
)


def resident() -> tuple[int, int]:
    """Resident memory now and at most since it was last reset, bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(status[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return now, most


def point(name: str, n: int, c: int) -> tuple[float, float]:
    """Seconds of the processor and megabytes above the inputs, for one piece of work."""
    torch.set_num_threads(1)
    with threadpool_limits(1):
        work = WORK[name](n, c, np.random.default_rng(0))
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the inputs
        before, _ = resident()
        start = time.process_time()
        work()
        seconds = time.process_time() - start
    return seconds, max(0.0, (resident()[1] - before) / 1e6)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the straight line that fits log values over log sizes best (least squares)."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    middle = sum(x) / len(x), sum(y) / len(y)
    along = sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y))
    return along / sum((a - middle[0]) ** 2 for a in x)


def measure(largest: int, names: Sequence[str] = tuple(WORK), classes: int = CLASSES[0]) -> list[dict[str, str]]:
    """One row for each of these pieces of work, of so many classes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_coreg", "coreg.report.metrics", "coreg.run.checkpoint"])

    def at(name: str, n: int, c: int) -> tuple[float, float]:
        with context.Pool(1) as pool:
            return pool.apply(point, (name, n, c))

    rows, images = [], (largest // 100, largest // 10, largest)
    for name in names:
        by_images = [at(name, n, classes) for n in images]
        seconds, megabytes = by_images[-1]
        row = {"work": name, "seconds": f"{seconds:.2f}", "MB": f"{megabytes:,.0f}"}
        row["exponent in N"] = f"{exponent(images, [seconds for seconds, _ in by_images]):.2f}"
        row["exponent in C"] = "-"
        if name not in IN_N_ALONE:
            by_classes = [at(name, FEWEST_IMAGES, c)[0] for c in CLASSES]
            row["exponent in C"] = f"{exponent(CLASSES, by_classes):.2f}"
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=1_000_000, help="images at most")
    parser.add_argument("--classes", type=int, default=CLASSES[0], help="classes while images grow")
    parser.add_argument("--only", nargs="+", choices=tuple(WORK), default=list(WORK), help="pieces of work")
    args = parser.parse_args(argv)
    print(f"{environment()}\n\n{args.largest:,} images, {args.classes} classes, {TEMPLATES} templates\n")
    print(as_markdown(measure(args.largest, args.only, args.classes)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
