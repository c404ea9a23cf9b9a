"""How long a command takes to say what is wrong with its options.

    python -m benchmarks.start

Each command is started three times as a process of its own; the fastest start counts, because other programs come and go.
Beside it stands the time that importing PyTorch alone takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.tables import as_markdown, environment

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "train_coreg.py --help": ("train_coreg.py", "--help"),
    "train_coreg.py --epoch 3": ("train_coreg.py", "--epoch", "3"),
    "train_coreg.py --epochs 0": ("train_coreg.py", "--epochs", "0"),
    "annotate_vlm.py --help": ("annotate_vlm.py", "--help"),
    "annotate_vlm.py --image photos": ("annotate_vlm.py", "--image", "photos"),
    "import torch": ("-c", "import torch"),
}


def seconds_of(arguments: tuple[str, ...]) -> tuple[float, float]:
    """Seconds on the clock and seconds of the processor, of one start of Python with these arguments."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(child.pid, 0)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def measure() -> list[dict[str, str]]:
    """One row for each command."""
    rows = []
    for name, arguments in COMMANDS.items():
        times = [seconds_of(arguments) for _ in range(3)]
        clock, processor = (min(column) for column in zip(*times))
        rows.append({"command": name, "seconds": f"{clock:.2f}", "of the processor": f"{processor:.2f}"})
    return rows


if __name__ == "__main__":
    print(f"{environment()}\n\n{as_markdown(measure())}")
