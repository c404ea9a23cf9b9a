"""What may interrupt a job: a cluster's signal, the clock, and a process that died; all processes decide together."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from coreg.interrupt import SAME_PRESS_SECONDS

EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: give the same command again
GOES_ON, CHECKPOINT, STOP = range(3)
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECONDS_TO_ANSWER = 10


class Watch:
    """Asked at every step boundary what is due; every process gets the same answer.

    The answer travels on a group of its own over the CPU, so that no GPU is waited for.
    """

    def __init__(self, accelerator: Accelerator, checkpoint_minutes: float, timeout_minutes: float) -> None:
        self.accelerator = accelerator
        self.checkpoint_seconds = 60 * checkpoint_minutes
        self.saved_at = time.monotonic()  # when the last checkpoint was written
        self.received: int | None = None
        self.received_at = 0.0
        self.before: dict[int, Any] = {}
        self.process = os.getpid()
        self.group, self.store = None, None
        if accelerator.num_processes > 1:
            limit = timedelta(minutes=timeout_minutes)
            self.group = dist.new_group(backend="gloo", timeout=limit)
            self.store = dist.PrefixStore("roll call", dist.distributed_c10d._get_default_store())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM, SIGUSR1 and Ctrl-C instead of dying of them; the handlers before are put back.

        Ctrl-C that the caller ignores, as shells do for what runs in the background of a script, stays ignored. Once a
        signal waits for the step boundary, Ctrl-C no longer waits.
        """
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        heard = [number for number in SIGNALS if not (ignored and number == signal.SIGINT)]
        self.process, self.before = os.getpid(), {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return
        again = self.received is not None and time.monotonic() - self.received_at > SAME_PRESS_SECONDS
        if number == signal.SIGINT and again and callable(self.before[number]):
            self.before[number](number, frame)
        elif self.received is None:
            self.received, self.received_at = number, time.monotonic()

    def due(self) -> int:
        """`STOP` when any process got a signal, `CHECKPOINT` when the main process's clock says so, else `GOES_ON`."""
        answer = GOES_ON
        if self.received is not None:
            answer = STOP
        elif self.accelerator.is_main_process and time.monotonic() - self.saved_at > self.checkpoint_seconds:
            answer = CHECKPOINT
        if self.group is not None:
            shared = torch.tensor(answer)
            dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
            answer = int(shared)
        return answer

    @contextmanager
    def naming_the_lost(self) -> Iterator[None]:
        """End the process with a message that names the ranks that do not answer any more when a collective fails."""
        try:
            yield
        except RuntimeError as error:
            if self.group is None:
                raise
            missing = self._silent()
            if not missing:
                raise
            print(
                f"error: process {self.accelerator.process_index} lost contact with process "
                f"{', '.join(map(str, missing))} ({str(error).splitlines()[0]}); the checkpoints are intact: give the "
                "same command again to go on",
                file=sys.stderr,
                flush=True,
            )
            # without the usual farewells, which would wait for those who are gone
            os._exit(1)

    def _silent(self) -> list[int]:
        """Ranks that do not answer a roll call. When even the store is silent, process 0, which holds it, is gone."""
        answers: list[list[int]] = []
        # in a thread, because asking a machine whose cable is cut never returns
        thread = threading.Thread(target=lambda: answers.append(self._roll_call()), daemon=True)
        thread.start()
        thread.join(SECONDS_TO_ANSWER + 5)
        return answers[0] if answers else [0]

    def _roll_call(self) -> list[int]:
        """Go through the store, because connections between the processes may be broken."""
        world, me = self.accelerator.num_processes, self.accelerator.process_index
        missing = set(range(world)) - {me}
        try:
            self.store.set(str(me), "here")
            limit = time.monotonic() + SECONDS_TO_ANSWER
            while missing and time.monotonic() < limit:
                missing = {rank for rank in missing if not self.store.check([str(rank)])}
                time.sleep(0.1)
            # those who ask later shall still find the store, which may live in this process
            time.sleep(1)
        except RuntimeError:
            return [0]
        return sorted(missing)
