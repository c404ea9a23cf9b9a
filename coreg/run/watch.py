"""What may interrupt a job: a cluster's signal, the clock, and a process that died; all processes decide together."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from accelerate import Accelerator

EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: give the same command again
GOES_ON, CHECKPOINT, STOP = range(3)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECONDS_TO_ANSWER = 10


class Watch:
    """Asked at every step boundary what is due; every process gets the same answer.

    The answer travels on a group of its own over the CPU, so that no GPU is waited for.
    """

    def __init__(self, accelerator: Accelerator, checkpoint_minutes: float, timeout_minutes: float) -> None:
        self.accelerator = accelerator
        self.checkpoint_seconds = 60 * checkpoint_minutes
        self.saved_at = time.monotonic()
        self.received: int | None = None
        self.groups = []
        if accelerator.num_processes > 1:
            # the second one is kept for finding out who is missing when the first is broken
            limit = timedelta(minutes=timeout_minutes)
            self.groups = [dist.new_group(backend="gloo", timeout=limit) for _ in range(2)]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM and SIGUSR1 instead of dying of them; the handlers before are put back."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number

    def due(self) -> int:
        """`STOP` when any process got a signal, `CHECKPOINT` when the main process's clock says so, else `GOES_ON`."""
        answer = GOES_ON
        if self.received is not None:
            answer = STOP
        elif self.accelerator.is_main_process and time.monotonic() - self.saved_at > self.checkpoint_seconds:
            answer = CHECKPOINT
        if self.groups:
            shared = torch.tensor(answer)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.groups[0])
            answer = int(shared)
        return answer

    def saved(self) -> None:
        """A checkpoint was written just now."""
        self.saved_at = time.monotonic()

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """End the process with a message that names the ranks that do not answer any more when a collective fails."""
        try:
            yield
        except RuntimeError as error:
            if not self.groups:
                raise
            try:
                limit = timedelta(seconds=SECONDS_TO_ANSWER)
                dist.monitored_barrier(self.groups[1], timeout=limit, wait_all_ranks=True)
            except RuntimeError as missing:
                rank = self.accelerator.process_index
                print(
                    f"error: process {rank} lost contact: {' '.join(str(missing).split())}; the checkpoints are intact: "
                    "give the same command again to go on",
                    file=sys.stderr,
                    flush=True,
                )
                raise SystemExit(1) from error
            raise
