"""What every optimisation that was kept is worth: time with it by time without it.

    python -m benchmarks.kept [--networks demo] [--seconds 20]

Predicted is what counting says: passes through a network, a backward pass as two forward ones; `-` where counting says
nothing. Measured is the median of ratios taken in turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from benchmarks.augment import pil_batch
from benchmarks.plain import VIEWS
from benchmarks.sides import CASES, Bench
from benchmarks.tables import as_markdown, environment
from benchmarks.turns import in_turns, ratio
from coreg.learn.losses import contrastive_loss
from coreg.learn.memory import Prototypes
from coreg.process import build_accelerator
from coreg.settings import JobConfig

# what is compared: (optimisation, side with it, side without it, predicted ratio)
KEPT = (
    ("views of a batch at once, as tensors", "views", "views, Pillow", "-"),
    ("images and weights in channels_last order", "passes", "passes, contiguous", "-"),
    (
        "no contrastive passes before their gate opens",
        "passes before the gate",
        "all before the gate",
        "18 / 22 = 0.82",
    ),
    ("fast: weak views predicted once an epoch", "passes, fast", "passes", "20 / 26 = 0.77"),
    ("prototypes moved in closed form", "prototypes", "prototypes, one by one", "-"),
    ("contrastive loss without loops, integer labels in the queue", "contrast", "contrast, row by row", "-"),
)


def sides_of(bench: Bench) -> dict[str, Callable[[int], object]]:
    """All that `KEPT` names, for one network."""
    case, side = bench.case, bench.plain_learner()
    generator = torch.Generator().manual_seed(1)

    def spread(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(bench.accelerator.device)

    b = 2 * case.batch
    features, targets = F.normalize(spread(b, 128), dim=1), spread(b, case.classes).softmax(1)
    queries = F.normalize(spread(b, 128), dim=1).requires_grad_()
    labels, marks = targets.argmax(1), torch.arange(b, device=targets.device) < case.batch
    prototypes = Prototypes(case.classes, 128).to(targets.device)
    learner, position = bench.training("reference").learners[0], torch.arange(b, device=targets.device)

    def pillow(step: int) -> None:
        pixels = dict(zip("xu", (bench.pixels[rows] for rows in bench.rows(step))))
        for name in VIEWS:
            pil_batch(pixels[name[0]], case.size // 8, name[2] == "s", bench.rng)

    def contrast(step: int) -> None:
        keys, queue_labels, queue_marks = learner.queue.rows()
        contrastive_loss(
            queries,
            torch.cat([queries, features, keys]),
            labels,
            marks,
            torch.cat([labels, labels, queue_labels]),
            torch.cat([marks, marks, queue_marks]),
            self_position=position,
            key_position=b + position,
        ).mean().backward()
        learner.queue.enqueue(features, labels, marks)

    half = case.batch
    return {
        "views": lambda step: bench.made("reference", step),
        "views, Pillow": pillow,
        "passes": bench.passes(),
        "passes, contiguous": bench.passes(layout=torch.contiguous_format),
        "passes before the gate": bench.passes(queries="none", keys=False),
        "all before the gate": bench.passes(queries="made"),
        "passes, fast": bench.passes(predicted=False),
        "prototypes": lambda step: prototypes.update(features[:half], labels[:half], 0.999),
        "prototypes, one by one": lambda step: side.move_prototypes(features[:half], targets[:half]),
        "contrast": contrast,
        "contrast, row by row": lambda step: side.contrastive_loss(queries, features, targets, half).backward(),
    }


def measure(name: str, seconds: float) -> list[dict[str, str]]:
    """One row for each optimisation."""
    bench = Bench(CASES[name], build_accelerator(), JobConfig())
    rounds = in_turns(sides_of(bench), seconds, bench.clock, bench.wait)
    return [
        {
            "network": name,
            "optimisation": what,
            "predicted": predicted,
            "measured": f"{ratio(rounds, with_it, without):.2f}",
        }
        for what, with_it, without, predicted in KEPT
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(CASES), default=["demo"])
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of each network")
    args = parser.parse_args(argv)
    rows = [row for name in args.networks for row in measure(name, args.seconds)]
    print(f"{environment()}\n\n{as_markdown(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
