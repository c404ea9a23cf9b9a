"""Memory that tables of the training images take in a process that divides them, measured beside the formula.

    python -m benchmarks.memory [--entries 100000000]

Each case divides N images of C classes twice, as Co-Reg's two networks do, with histories of five epochs, in one process
with whole tables and in two and four with parts of them (`--tables sharded`). Measured is what the largest process has
resident at most above what it had before it had tables; all of it is the processor's memory here, where candidate sets
lie twice, once for the training device. The formula is that of docs/distributed.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from threadpoolctl import threadpool_limits

from benchmarks.growth import drawn_sets, resident, sure_logits
from benchmarks.tables import as_markdown, environment
from coreg.learn.collective import my_slice
from coreg.learn.division import Division, divide
from coreg.learn.tables import OwnedRows, owned, predicted
from coreg.learn.two_nets import Divisions, Verdict
from train_coreg import losses_and_targets

EPOCHS, CLASSES = 5, (10, 100, 1000)
ROWS = 1 << 12  # of inputs that are made at a time


def formula(n: int, c: int, processes: int) -> float:
    """Bytes of the tables and vectors that the busiest of so many processes has."""
    entries, vectors = n * c, n * (2 * EPOCHS * 8 + 2 * (8 + 4 + 1))  # histories; of each network w twice, and P
    # candidate sets; in parts: these once more, logits, and targets of two networks
    return entries + (1 + 4 + 2 * 4) * entries / processes + vectors


def _tables(n: int, c: int, sharded: bool) -> tuple[np.ndarray, torch.Tensor | OwnedRows]:
    """Candidate sets of all images, and logits of the rows that this process is to have."""
    part = my_slice(n) if sharded else slice(0, n)
    sets, logits = np.empty((n, c), dtype=bool), torch.empty(part.stop - part.start, c)
    for start in range(0, n, ROWS):
        sets[start : start + ROWS] = drawn_sets(min(ROWS, n - start), c, np.random.default_rng(start))
    for start in range(0, len(logits), ROWS):
        logits[start : start + ROWS] = sure_logits(min(ROWS, len(logits) - start), c, np.random.default_rng(start))
    return sets, OwnedRows(logits, n) if sharded else logits


def divided(n: int, c: int, rank: int, processes: int, meeting: str) -> float:
    """Bytes that process `rank` of so many has at most for the division of N images of C classes."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
        dist.barrier()
    with threadpool_limits(1):
        divide([np.linspace(0, 1, 1000)], np.ones(1000, dtype=bool), seed=0)  # libraries
        Path("/proc/self/clear_refs").write_text("5")
        before, _ = resident()
        sets, logits = _tables(n, c, processes > 1)
        kept = torch.from_numpy(sets)
        kept = owned(kept, kept.device) if processes > 1 else kept.clone()
        task = SimpleNamespace(
            table=kept,
            weak=SimpleNamespace(table=sets),
            method=SimpleNamespace(alignment="uniform"),
            prior=np.full(c, 1 / c),
        )
        divisions = Divisions([None, None], n, processes > 1)
        for number in (0, 1):
            losses, targets = losses_and_targets(task, logits, predicted(logits))
            for _ in range(EPOCHS):
                history = divisions.remember(number, losses.copy(), EPOCHS)
            answer: list[Division | None] = [None]
            if rank == 0:
                answer = [divide(history, np.ones(n, dtype=bool), seed=0)]
            if processes > 1:
                dist.broadcast_object_list(answer)
            (division,) = answer
            divisions.verdicts.append(Verdict(torch.from_numpy(division.weight).float(), targets, division.trusted))
            divisions.weights.append(division.weight)
    most = float(resident()[1] - before)
    if processes > 1:
        dist.destroy_process_group()
    return most


def measure(entries: int, processes: Sequence[int] = (1, 2, 4)) -> list[dict[str, str]]:
    """One row for each number of classes and of processes; tables have so many entries."""
    context, rows = multiprocessing.get_context("fork"), []
    for c in CLASSES:
        n = entries // c
        for count in processes:
            with tempfile.TemporaryDirectory() as folder, context.Pool(count) as pool:
                jobs = [(n, c, rank, count, f"{folder}/meeting") for rank in range(count)]
                most = max(pool.starmap(divided, jobs, chunksize=1))
            rows.append(
                {
                    "images": f"{n:,}",
                    "classes": str(c),
                    "processes": str(count),
                    "tables": "sharded" if count > 1 else "whole",
                    "MB": f"{most / 1e6:,.0f}",
                    "by formula": f"{formula(n, c, count) / 1e6:,.0f}",
                    "bytes an image": f"{most / n:,.0f}",
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000_000, help="images times classes")
    args = parser.parse_args(argv)
    print(environment() + "\n")
    print(as_markdown(measure(args.entries)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
