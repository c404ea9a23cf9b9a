"""A co-training step beside a plain implementation of it and beside the bare passes through the networks.

    python -m benchmarks.step [--networks demo papers] [--seconds 60] [--mixed_precision bf16] [--compile]
    torchrun --nproc_per_node 2 -m benchmarks.step --parts                 # where the time goes, over two processes

All sides take the same images and the same networks, with every loss switched on and a full queue, and are timed in turns,
because other programs come and go: a ratio is the median over the rounds of the ratio within a round.

ours       as `train_coreg.py` trains: views, passes, losses, prototypes, queue, momentum encoder, SGD.
plain      `benchmarks.plain`, with views made by Pillow one by one, in float32.
passes     forward and backward passes on data that is there already, and nothing else: 14 B forward and 6 B backward for a
           batch of B images of P and B of U; 8 B and 6 B under `--preset fast`, which predicts weak views once an epoch.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.sides import CASES, Bench
from benchmarks.tables import as_markdown, environment
from benchmarks.turns import in_turns, ratio
from coreg.learn import coreg as coreg_step
from coreg.process import build_accelerator
from coreg.settings import JobConfig

# ---- where the time goes ---------------------------------------------------------------------------------------------


class Clock:
    """Seconds spent in parts of a step. Parts may lie in each other: a second counts for the innermost one."""

    def __init__(self, read: Callable[[], float], wait: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self.read, self.wait, self.open, self.mark = read, wait, ["losses"], 0.0

    def _charge(self) -> None:
        self.wait()
        now = self.read()
        self.seconds[self.open[-1]] = self.seconds.get(self.open[-1], 0.0) + now - self.mark
        self.mark = now

    def start(self) -> None:
        self.wait()
        self.mark = self.read()

    @contextmanager
    def part(self, name: str) -> Any:
        self._charge()
        self.open.append(name)
        yield
        self._charge()
        self.open.pop()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return wrapped


def parts_of_a_step(bench: Bench, preset: str, steps: int) -> dict[str, float]:
    """Share of the time of our step by part: augmentation, passes, losses, bookkeeping, communication.

    The networks' outputs are cut off from the losses, whose backward pass is thus timed apart from the networks' own.
    Communication is the gathering of rows and the averaging of gradients, which training lets run beside the backward
    pass, and waiting for the other processes: its share here is what it costs at most.
    """
    training, world = bench.training(preset), bench.accelerator.num_processes
    # who waits for another process does nothing meanwhile, which only the clock on the wall shows
    clock = Clock(bench.clock if world == 1 else time.perf_counter, bench.wait)
    learner, optimizer, net = training.learners[0], training.optimizers[0], training.nets[0]
    cut: list[tuple[Tensor, Tensor]] = []

    def forward(images: Tensor) -> tuple[Tensor, ...]:
        with clock.part("passes"):
            outputs = type(net).forward(net, images)
        if not torch.is_grad_enabled():
            return outputs
        leaves = tuple(output.detach().requires_grad_() for output in outputs)
        cut.extend(zip(outputs, leaves))
        return leaves

    def average_gradients() -> None:
        gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(whole)
        for gradient, part in zip(gradients, whole.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(part.view_as(gradient) / world)

    net.forward = forward
    for other in (learner.key_net, learner._peer[0]):
        other.forward = clock.timed("passes", other.forward)
    learner._average = clock.timed("bookkeeping", learner._average)
    learner.prototypes.update = clock.timed("bookkeeping", learner.prototypes.update)
    learner.queue.enqueue = clock.timed("bookkeeping", learner.queue.enqueue)
    gather = coreg_step.gather_rows
    coreg_step.gather_rows = clock.timed("communication", gather)
    training.nets[1].eval()
    try:
        for step in range(steps + 1):
            if step == 1:
                clock.seconds.clear()  # the first one warms up
            cut.clear()
            clock.start()
            with clock.part("augmentation"):
                batch = bench.made(preset, step)
            loss = learner(batch)["loss"] * world  # gradients are averaged
            loss.backward()
            with clock.part("passes"):
                used = [(output, leaf.grad) for output, leaf in cut if leaf.grad is not None]
                torch.autograd.backward(*zip(*used))
            if world > 1:
                with clock.part("communication"):
                    average_gradients()
            with clock.part("bookkeeping"):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    finally:
        coreg_step.gather_rows = gather
    whole = sum(clock.seconds.values())
    return {name: clock.seconds.get(name, 0.0) / whole for name in PARTS}


PARTS = ("augmentation", "passes", "losses", "bookkeeping", "communication")


# ---- memory ----------------------------------------------------------------------------------------------------------


def peak_megabytes(name: str, side: str | None) -> float:
    """Largest memory of a process that trains two steps of a side: on the GPU where there is one, else resident."""
    bench = Bench(CASES[name], build_accelerator(), JobConfig())
    cuda = bench.accelerator.device.type == "cuda"
    if side is not None:
        step = bench.sides()[side]()
        for number in range(2):
            step(number)
    return (torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e6


def peaks(name: str, sides: Sequence[str]) -> dict[str, float]:
    """Peak megabytes of every side above a process that holds the images alone, each in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["coreg.run.training"])
    megabytes = {}
    for side in (None, *sides):
        with context.Pool(1) as pool:
            megabytes[side] = pool.apply(peak_megabytes, (name, side))
    return {side: megabytes[side] - megabytes[None] for side in sides}


# ---- the program -----------------------------------------------------------------------------------------------------


def measure(name: str, seconds: float, job: JobConfig) -> list[dict[str, Any]]:
    """One row for each side: images/s, times the rate of `plain`, time by that of the bare passes, peak memory."""
    bench = Bench(CASES[name], build_accelerator(job.mixed_precision), job)
    sides = {side: make() for side, make in bench.sides().items()}
    rounds = in_turns(sides, seconds, bench.clock, bench.wait)
    memory = peaks(name, list(sides))
    rows = []
    for side in sides:
        floor = "passes, fast" if side.endswith("fast") else "passes"
        rate = 2 * bench.case.batch / statistics.median(times[side] for times in rounds)
        rows.append(
            {
                "network": name,
                "step": side,
                "images/s": f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
                "times plain": f"{ratio(rounds, 'plain', side):.2f}",
                "time / passes": f"{ratio(rounds, side, floor):.3f}",
                "peak MB": f"{memory[side]:,.0f}",
                "rounds": str(len(rounds)),
            }
        )
    return rows


def parts(name: str, job: JobConfig) -> list[dict[str, Any]]:
    """One row for each preset: share of time by part."""
    bench = Bench(CASES[name], build_accelerator(job.mixed_precision), job)
    rows = []
    for preset in ("reference", "fast"):
        shares = parts_of_a_step(bench, preset, 20 if name == "demo" else 2)
        row = {"network": name, "processes": str(bench.accelerator.num_processes), "preset": preset}
        rows.append(row | {part: f"{share:.1%}" for part, share in shares.items()})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, default=60.0, help="for the rounds of each network")
    parser.add_argument("--parts", action="store_true", help="only where the time goes")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    args = parser.parse_args(argv)
    job = JobConfig(mixed_precision=args.mixed_precision, compile=args.compile)
    accelerator = build_accelerator(job.mixed_precision)
    if accelerator.is_main_process:
        print(environment())
    tables = [parts] if args.parts else [functools.partial(measure, seconds=args.seconds), parts]
    for table in tables:
        rows = [row for name in args.networks for row in table(name, job=job)]
        if accelerator.is_main_process:
            print("\n" + as_markdown(rows), flush=True)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
