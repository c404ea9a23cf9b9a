"""Commands run several at a time, each once: what has left its mark is skipped, and CPU seconds are written down."""

from __future__ import annotations

import os
import runpy
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: of its log, below the folder of all; may have a slash.
        command: what follows the name of Python.
        mark: a file that is there when the job is finished, not before.
        needs: marks of jobs without which it cannot begin.
    """

    name: str
    command: tuple[str, ...]
    mark: Path
    needs: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"{'done' if self.mark.exists() else 'to do'}  {self.name}: python {shlex.join(self.command)}"


def seconds_file(root: Path, name: str) -> Path:
    """Where the CPU seconds of a job stand, one line for every time that it ran."""
    return root / "logs" / f"{name}.seconds"


def cpu_seconds(root: Path, name: str) -> float | None:
    """CPU seconds of a job over all its starts, user and system; None before the first has ended."""
    file = seconds_file(root, name)
    return sum(map(float, file.read_text().split())) if file.exists() else None


def run_jobs(jobs: Sequence[Job], root: Path, at_once: int, forked: bool = False) -> list[Job]:
    """Run what is not finished, in order, `at_once` at a time, each with one thread and a log in `root`/logs.

    A job whose needs are not there yet waits for those that run, and is given up when they have ended without. At Ctrl-C or
    SIGTERM the running ones get SIGTERM, write their checkpoints, and are waited for.

    Args:
        forked: a job is a fork of this process, and not a Python of its own: it has what is imported here. Nothing may
            have been computed here, because a fork has neither the threads of its parent nor its device.

    Returns:
        The jobs that failed or could not begin.
    """
    waiting, running, failed = [job for job in jobs if not job.mark.exists()], {}, []

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            ready = next((job for job in waiting if all(need.exists() for need in job.needs)), None)
            if ready is not None and len(running) < at_once:
                waiting.remove(ready)
                running[_start(ready, root, forked)] = ready
            elif running:
                failed += _ended(running, root)
            else:
                failed += waiting
                waiting = []
    except KeyboardInterrupt:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
        while running:
            _ended(running, root)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return failed


def _start(job: Job, root: Path, forked: bool) -> int:
    """Start a job and give the number of its process."""
    log = root / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%H:%M:%S')} {job.name}", flush=True)
    # one thread: the last digits of sums depend on their number, and threads of several jobs get in each other's way
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        if forked:
            return os.fork() or _run_here(job, file.fileno())
        into = [(os.POSIX_SPAWN_DUP2, file.fileno(), number) for number in (1, 2)]
        return os.posix_spawn(sys.executable, [sys.executable, *job.command], settings, file_actions=into)


def _run_here(job: Job, log: int) -> int:
    """Be the process of a job, which writes into the open file `log`; does not return."""
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (1, 2):
            os.dup2(log, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
        first, *words = job.command
        if first == "-m":
            name, *words = words
            sys.argv = [name, *words]
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *words]
            runpy.run_path(first, run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _ended(running: dict[int, Job], root: Path) -> list[Job]:
    """Wait for one of the running jobs, note its seconds, and give it if it has left no mark."""
    pid, _, used = os.wait4(-1, 0)
    if pid not in running:
        return []
    job = running.pop(pid)
    with seconds_file(root, job.name).open("a") as file:
        file.write(f"{used.ru_utime + used.ru_stime:.2f}\n")
    if job.mark.exists():
        return []
    print(f"  {job.name} ended without a result; its log: {root / 'logs' / job.name}.log", flush=True)
    return [job]
