"""What the benchmarks print: where they ran, Markdown tables, and pages that hold such tables between markers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

PACKAGES = ("torch", "numpy", "scikit-learn", "pillow")


def processor() -> str:
    """The name of the processor, as far as the system knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").split("\n") if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment() -> str:
    """One line: the processor or the GPU, its threads, and the versions of what computes."""
    device = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, {device}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"{device}; Python {platform.python_version()}, {versions}"


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    """Rows with the same keys as a Markdown table, columns aligned for reading as plain text."""
    columns = list(rows[0])
    cells = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    # words to the left, numbers to the right
    right = [all(line[i][:1] in "0123456789-" for line in cells[1:]) for i in range(len(columns))]

    def written(line: list[str]) -> str:
        padded = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right))
        return f"| {' | '.join(padded)} |"

    rule = [("-" * (w - 1) + ":") if r else "-" * w for w, r in zip(widths, right)]
    return "\n".join([written(cells[0]), written(rule), *map(written, cells[1:])])


def fill(page: str, name: str, text: str) -> str:
    """The page with `text` between its lines `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises:
        ValueError: the page has not exactly one such pair, in this order.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if page.count(first) != 1 or page.count(last) != 1 or page.index(first) > page.index(last):
        raise ValueError(f"the page needs one line {first.strip()} and after it one line {last}")
    before, _, rest = page.partition(first)
    return f"{before}{first}\n{text}\n\n{last}{rest.partition(last)[2]}"
