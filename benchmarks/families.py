"""One architecture of every family in timm: can Co-Reg train it, and export what it trained?

    python -m benchmarks.families [--output families.md] [NAME ...]

Random weights, five classes, images of the size that the architecture was made for. Some minutes on two cores; the table is
in docs/backbones.md.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.models._registry import _model_to_module

import coreg.nets  # noqa: F401  registers the PreAct ResNets
from coreg.errors import UserError
from coreg.nets.model import check_network

CLASSES = 5
# smallest first: what architectures call their sizes
SIZES = "zepto atto femto pico nano micro tiny mini xxtiny xxsmall xxs xsmall xs n small s base large".split()
MOST_PARAMETERS = 400e6


def smallest_first(name: str) -> tuple[int, list[int], int]:
    """A key that sorts architectures of one family roughly by size, without building them."""
    sizes = [SIZES.index(word) for word in re.split(r"[_\d]+", name) if word in SIZES]
    return min(sizes, default=len(SIZES)), [int(digits) for digits in re.findall(r"\d+", name)], len(name)


def families() -> dict[tuple[str, str], str]:
    """One architecture for each of timm's modules and each first word of a name in it; distilled ones are a family."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in timm.list_models():
        word = re.match("[a-z]+", name)[0] + (" distilled" if "distilled" in name else "")
        groups.setdefault((_model_to_module[name], word), []).append(name)
    return {family: min(names, key=smallest_first) for family, names in sorted(groups.items())}


def outcome(name: str) -> tuple[float, int, str]:
    """Parameters in millions, side of the images, and what came of it."""
    channels, _, size = timm.get_pretrained_cfg(name).input_size
    with torch.device("meta"):
        millions = sum(weight.numel() for weight in timm.create_model(name, num_classes=CLASSES).parameters()) / 1e6
    if millions * 1e6 > MOST_PARAMETERS:
        return millions, size, "not tried: too large for this table"
    try:
        check_network(name, CLASSES, size, channels, {})
    except UserError as error:
        return millions, size, str(error)
    return millions, size, "works"


def rows(names: dict[tuple[str, str], str]) -> Iterator[str]:
    """The lines of the table."""
    yield "| module of timm | family | architecture | M parameters | pixels | |"
    yield "|---|---|---|---|---|---|"
    for (module, word), name in names.items():
        try:
            millions, size, result = outcome(name)
            yield f"| {module} | {word} | {name} | {millions:.1f} | {size} | {result} |"
        except Exception as error:  # one family's trouble is a row of the table
            yield f"| {module} | {word} | {name} | | | {type(error).__name__}: {error} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; default: one of every family")
    parser.add_argument("--output", type=Path, help="Markdown file to write the table to as well")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    chosen = {("", name): name for name in options.names} or families()
    lines, begun = [], time.perf_counter()
    for line in rows(chosen):
        lines.append(line)
        print(line, flush=True)
    works = sum(line.endswith("| works |") for line in lines)
    lines += ["", f"{works} of {len(chosen)} work; {time.perf_counter() - begun:.0f} s."]
    print(lines[-1])
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
