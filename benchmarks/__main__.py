"""Every benchmark, printed and written into the page that explains them.

    python -m benchmarks [--only step growth] [--page docs/benchmarks.md]

Takes about half an hour on two cores, half of it `mended`. Ratios hold on a busy machine too, because what is compared
runs in turns; images/s and seconds do not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import annotate, augment, growth, kept, memory, mended, pixels, start, step, tuners
from benchmarks.sides import CASES
from benchmarks.tables import as_markdown, environment, fill
from coreg.settings import JobConfig

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


def _parts() -> str:
    """In one process, and over two on one machine."""
    alone = as_markdown([row for name in CASES for row in step.parts(name, JobConfig())])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "benchmarks.step", "--networks", "demo", "--parts"]
    printed = subprocess.run(command, cwd=PAGE.parent.parent, capture_output=True, text=True, check=True).stdout
    return alone + "\n\n" + "\n".join(line for line in printed.split("\n") if line.startswith("|"))


TABLES: dict[str, Callable[[], str]] = {
    "start": lambda: as_markdown(start.measure()),
    "augment": lambda: as_markdown(augment.measure(32, 256, 10.0)),
    "step": lambda: as_markdown([row for name in CASES for row in step.measure(name, 15.0, JobConfig())]),
    "parts": _parts,
    "kept": lambda: as_markdown(kept.measure("demo", 8.0)),
    "pixels": lambda: as_markdown([row for name in ("small", "vit") for row in pixels.measure(name, 150, 20.0)]),
    "growth": lambda: as_markdown(growth.measure(1_000_000)),
    "tables": lambda: "\n\n".join(
        as_markdown(rows) for rows in (memory.measure(30_000_000), growth.measure(10_000_000, growth.IN_TRAINING))
    ),
    "mended": lambda: as_markdown(mended.measure(1_000_000, 1000)),
    "tuners": lambda: as_markdown(tuners.measure(20.0)),
    "annotate": lambda: annotate.measure(
        ["--images", "48", "--classes", "10", "--seconds", "3", "--rounds", "2", "--rows", "20000"]
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(TABLES), default=list(TABLES))
    parser.add_argument("--page", type=Path, default=PAGE, help="the page whose tables are replaced")
    args = parser.parse_args(argv)
    print(environment())
    for name in args.only:
        text = f"{environment()}\n\n{TABLES[name]()}"
        print(f"\n{name}\n{text.partition(chr(10))[2]}", flush=True)
        args.page.write_text(fill(args.page.read_text(encoding="utf-8"), name, text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
