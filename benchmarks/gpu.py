"""What a GPU gives: one command that measures within minutes, writes at once what it has, and fills docs/benchmarks.md.

    python -m benchmarks.gpu --output gpu.json --page docs/benchmarks.md          # on a machine with a GPU, in 8 minutes
    python -m benchmarks.gpu --pack data/cifar10 --images cifar10.zip             # before: real images, under 56 MB
    python -m benchmarks.gpu --images cifar10.zip --output gpu.json               # trains on them in the time that is left
    python -m benchmarks.gpu --dry_run --output gpu.json                          # all calls, tiny, on a CPU

Every part runs in a process of its own (in a rehearsal all of them in one) under a limit, so that one that fails or hangs
takes nothing with it, and the JSON file is written after each: cut off at any point, it has what was measured by then.
Nothing is downloaded. `--tables` makes the tables of a file that is there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import as_markdown, environment, fill
from coreg.errors import UserError, exits_with_one_line
from coreg.files import write_atomically
from coreg.records import read_record

# in the order of what is wanted most, with the seconds after which a part is given up
PARTS = {
    "card": 60,
    "step_fp32": 90,
    "step_bf16": 60,
    "step_compiled": 150,
    "epoch": 150,
    "tests": 120,
    "annotation": 120,
    "views": 60,
    "tables": 90,
}
STEPS = {"step_fp32": "float32", "step_bf16": "bf16", "step_compiled": "bf16, compiled"}
ACCURACY = "accuracy"  # last, for as long as there is time


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def in_process(name: str, output: Path, limit: float, options: Sequence[str]) -> dict[str, Any]:
    """Run a part as a process of its own; gives what it wrote, and one line under `error` if it failed or took too long."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--output", f"{output}", *options]
    # a group of its own, so that what a part has started ends with it
    part = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    problem = {}
    try:
        _, printed = part.communicate(timeout=limit)
        if part.returncode:
            problem["error"] = printed.strip().split("\n")[-1] or f"it ended with status {part.returncode}"
    except subprocess.TimeoutExpired:
        problem["error"] = f"not finished after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(part.pid, signal.SIGKILL)
        part.wait()
    written = read_record(output) if output.exists() else {}
    output.unlink(missing_ok=True)
    return written | problem


def run_part(name: str, dry_run: bool, images: Path | None, output: Path) -> dict[str, Any]:
    """The numbers of a part."""
    from benchmarks import gpu_parts

    scale = gpu_parts.DRY if dry_run else gpu_parts.CARD
    if name == ACCURACY:
        return gpu_parts.accuracy(scale, images, output)
    return getattr(gpu_parts, name)(scale)


def measure(output: Path, minutes: float, dry_run: bool, images: Path | None, only: Sequence[str]) -> dict[str, Any]:
    """Run the parts one after another while there is time; the file is written after each."""
    end, record = time.monotonic() + 60 * minutes, {"environment": environment(), "dry_run": dry_run, "parts": {}}
    scratch = output.with_suffix(".part.json")
    for name in only:
        left, start = end - time.monotonic(), time.monotonic()
        if name == ACCURACY and images is None:
            continue
        if left < 5:
            numbers = {"error": "no time was left"}
        elif dry_run and name != ACCURACY:
            numbers = run_part(name, dry_run, images, scratch)
        else:
            options = [*(["--images", f"{images}"] if images else []), *(["--dry_run"] if dry_run else [])]
            numbers = in_process(name, scratch, min(left, PARTS.get(name, left)), options)
        record["parts"][name] = numbers
        write_json(output, record)
        print(f"{name}: {numbers.get('error', 'done')} ({time.monotonic() - start:.0f} s)", flush=True)
    return record


# ---- tables ----------------------------------------------------------------------------------------------------------


def step_rows(parts: dict[str, Any]) -> list[dict[str, str]]:
    """One row for each side of a step that was measured."""
    rows = []
    plain = parts.get("step_fp32", {}).get("seconds", {}).get("plain")
    rates = parts.get("card", {}).get("rates", {})
    for part, title in STEPS.items():
        numbers = parts.get(part, {})
        for side, seconds in numbers.get("seconds", {}).items():
            rate = rates.get("fp32" if part == "step_fp32" else "bf16")
            of_card = "-" if rate is None or side == "plain" else f"{numbers['flop'] / seconds / rate:.1%}"
            rows.append(
                {
                    "step": f"{side}, {title}",
                    "images/s": f"{numbers['images'] / seconds:,.0f}",
                    "ms": f"{1000 * seconds:.1f}",
                    "times plain": "-" if plain is None else f"{plain / seconds:.2f}",
                    "time / passes": f"{numbers['to_passes'][side]:.3f}",
                    "of the card's rate": of_card,
                    "peak MB": f"{numbers['peak_bytes'][side] / 1e6:,.0f}",
                }
            )
    return rows


def made_of(parts: dict[str, Any]) -> str:
    """The tables and lines of what was measured, as Markdown."""
    blocks = []
    if rates := parts.get("card", {}).get("rates"):
        measured = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in rates.items())
        blocks.append(f"One large 3x3 convolution, forward and backward: {measured} TFLOP/s.")
    if rows := step_rows(parts):
        blocks.append(as_markdown(rows))
    for part, title in STEPS.items():
        if "launches" in (numbers := parts.get(part, {})):
            waits = ", ".join(f"{name} {count:.1f}" for name, count in numbers["waits"].items()) or "none"
            counted = f"{numbers['launches']:.0f} launches, {numbers['device_ms']:.1f} ms of the device"
            top = [(f"`{row['kernel']}`".replace("|", "/"), f"{row['share']:.1%}") for row in numbers["top"]]
            blocks.append(f"A step, {title}: {counted}; waits for it: {waits}. The kernels that take the most time:")
            blocks.append(as_markdown([{"kernel": kernel, "share": share} for kernel, share in top]))
    if "networks" in (numbers := parts.get("epoch", {})):
        ours = numbers["networks"] + numbers["division"]
        blocks.append(
            f"An epoch of both networks, bf16, compiled: {ours:.1f} s, {numbers['division']:.1f} of them for the division; "
            f"plain, {numbers['steps']} steps: {numbers['plain']:.1f} s, {numbers['plain'] / ours:.1f} times as long."
        )
    if "share" in (numbers := parts.get("annotation", {})):
        blocks.append(
            f"Annotation, ViT-B/16, bf16: {numbers['whole']:,.0f} images/s from files to blocks, {numbers['share']:.2f} of "
            f"the bare tower's {numbers['bare']:,.0f}."
        )
    if rates := {name: rate for name, rate in parts.get("views", {}).items() if name != "error"}:
        blocks.append(
            as_markdown([{"views on the device": name, "images/s": f"{rate:,.0f}"} for name, rate in rates.items()])
        )
    if seconds := parts.get("tables", {}).get("seconds"):
        head = f"{parts['tables']['images']:,} images, on the CPU"
        blocks.append(as_markdown([{head: name, "seconds": f"{taken:.2f}"} for name, taken in seconds.items()]))
    trained = {name: row for name, row in parts.get(ACCURACY, {}).items() if isinstance(row, dict) and "accuracy" in row}
    if trained:
        measured = {name: {"test": f"{row['accuracy']:.1%}", "s": f"{row['seconds']:.0f}"} for name, row in trained.items()}
        blocks.append(as_markdown([{"training": name} | row for name, row in measured.items()]))
    if summary := parts.get("tests", {}).get("summary"):
        blocks.append(f"`pytest -m gpu`: {summary.strip('= ')}.")
    failed = [f"- {name}: {numbers['error']}" for name, numbers in parts.items() if "error" in numbers]
    return "\n\n".join([*blocks, *(["Not measured:\n\n" + "\n".join(failed)] if failed else [])])


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, print; exit status 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="JSON file of all numbers")
    parser.add_argument("--page", type=Path, help="page whose part between <!-- gpu --> lines is replaced")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins or goes on after so long")
    parser.add_argument("--only", nargs="+", choices=(*PARTS, ACCURACY), default=[*PARTS, ACCURACY], help="parts to run")
    parser.add_argument("--images", type=Path, help="zip file of real images to train on; --pack writes it")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="folder with train/CLASS/ and test/CLASS/")
    parser.add_argument("--megabytes", type=float, default=56.0, help="size of the zip file at most")
    parser.add_argument("--dry_run", action="store_true", help="all calls on tiny data, with or without a GPU")
    parser.add_argument("--tables", action="store_true", help="make the tables of --output and measure nothing")
    parser.add_argument("--part", choices=(*PARTS, ACCURACY), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.images is not None and not args.pack and not args.images.is_file():
        raise UserError(f"--images {args.images} is no file; --pack FOLDER --images {args.images} writes it")
    if args.part:
        write_json(args.output, run_part(args.part, args.dry_run, args.images, args.output))
        return 0
    if args.pack:
        from benchmarks.gpu_parts import pack

        archive = args.images or Path("images.zip")
        print(f"{archive}: all test images and {pack(args.pack, archive, args.megabytes)} training images a class")
        return 0
    if args.tables:
        record = read_record(args.output)
    else:
        import torch

        if not (args.dry_run or torch.cuda.is_available()):
            raise UserError("there is no GPU here; --dry_run goes through all calls on the CPU")
        record = measure(args.output, args.minutes, args.dry_run, args.images, args.only)
    text = f"{record['environment']}\n\n{made_of(record['parts'])}"
    print(f"\n{text}")
    if args.page:
        write_atomically(args.page, fill(args.page.read_text(encoding="utf-8"), "gpu", text))
    return int(any(numbers.get("error") or numbers.get("status") for numbers in record["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
