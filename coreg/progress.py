"""Progress on a terminal, in the log file of a cluster job, and beside what is being made, for `coreg-status`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from coreg.errors import UserError
from coreg.files import write_atomically

SECONDS_BETWEEN_LINES = 60.0  # of a log, which keeps every line that a terminal overwrites
PROGRESS = "progress.json"


class _Lines:
    """Standard error where it is no terminal: what a terminal draws over becomes lines."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(**options: Any) -> tqdm:
    """A bar on a terminal, a line a minute elsewhere; with `tqdm`'s options."""
    if sys.stderr.isatty():
        return tqdm(**options)
    return tqdm(**options, file=_Lines(), mininterval=SECONDS_BETWEEN_LINES, maxinterval=SECONDS_BETWEEN_LINES, ncols=100)


class ProgressFile:
    """How far a training has come, written into its folder once a minute."""

    def __init__(self, folder: Path, doing: str, total: float) -> None:
        self.path, self.doing, self.total = folder / PROGRESS, doing, total
        self.began, self.from_there, self.written = time.time(), 0.0, float("-inf")

    def begin(self, done: float) -> None:
        """From `done` of `total` on; rates are of what comes after it."""
        self.from_there = done
        self.write(done)

    def update(self, done: float) -> None:
        """Write, if a minute has passed since."""
        if time.time() - self.written >= SECONDS_BETWEEN_LINES:
            self.write(done)

    def write(self, done: float, running: bool = True) -> None:
        """Write now; `running` is false when the process leaves, finished or not."""
        self.written = time.time()
        rate = (done - self.from_there) / max(self.written - self.began, 1e-9)
        left = (self.total - done) / rate if rate > 0 else None
        record = {"doing": self.doing, "done": round(done, 3), "total": self.total, "running": running}
        record |= {"at": round(self.written), "seconds_left": None if left is None else round(left)}
        with contextlib.suppress(UserError):  # a full disk stops what matters, not this
            write_atomically(self.path, json.dumps(record) + "\n")
