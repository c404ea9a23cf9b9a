"""The run folder is the job: what it holds decides whether a command starts, goes on, has finished, or is refused."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coreg.errors import UserError
from coreg.files import write_atomically
from coreg.records import Number, RecordError, read_record

SCHEMA = 1
JOB, REPORT = "job.json", "report.json"


class RunFolder:
    """Paths of a run, and the record of which job it belongs to."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.checkpoints = self.root / "checkpoints"
        self.export = self.root / "export"
        self.chosen_export = self.root / "export_chosen"
        self.tower = self.root / "tower"
        self.report = self.root / REPORT
        self.held = False  # by this process

    @property
    def finished(self) -> bool:
        return self.report.is_file()

    @property
    def claimed(self) -> bool:
        return (self.root / JOB).is_file()

    def refuse_other(self, identity: dict[str, Any]) -> None:
        """Check, without writing anything, whether the folder is free for this job or already belongs to it.

        Args:
            identity: plain values that make the job what it is; those missing here or in the folder are not compared.

        Raises:
            UserError: the folder belongs to another job (the message names what differs) or to something else.
        """
        record = self.root / JOB
        if record.is_file():
            try:
                before = read_record(record, {"schema": Number(1)})
            except RecordError as error:
                raise UserError(
                    f"{record} is damaged ({error}); choose another --output_dir or delete {self.root}"
                ) from None
            here = json.loads(json.dumps({"schema": SCHEMA} | identity))
            changes = [
                f"{key} was {before[key]} and is {here[key]}" for key in here if key in before and before[key] != here[key]
            ]
            if changes:
                raise UserError(
                    f"{self.root} holds another job ({'; '.join(changes[:3])}{'; …' if len(changes) > 3 else ''}); "
                    f"choose another --output_dir, or delete {self.root} to start anew"
                )
            return
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"--output_dir {self.root} is a file; choose a folder")
        # the default job keeps its annotation store inside the run folder, and others what was made on the way
        known = ("annotations", "refined", "tower", ".lock")
        others = sorted(path.name for path in self.root.iterdir() if path.name not in known) if self.root.is_dir() else []
        if others:
            raise UserError(
                f"--output_dir {self.root} is not empty and holds no run (found {others[0]}); choose an empty folder"
            )

    def claim(self, identity: dict[str, Any]) -> None:
        """Begin the job in an empty folder, or go on with the same job; the folder has to be `locked`.

        Raises:
            UserError: as `refuse_other`, or the folder cannot be written.
        """
        self.refuse_other(identity)
        if not self.claimed:
            write_atomically(
                self.root / JOB, json.dumps({"schema": SCHEMA} | identity, indent=1, ensure_ascii=False) + "\n"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second job; the system lets go of it when the process ends, however it ends.

        Raises:
            UserError: another process holds it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(f"cannot write --output_dir {self.root} ({error.strerror}); choose another folder") from None
        _held.add(lock)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another job is running in {self.root}; wait for it, stop it, or choose another --output_dir"
                ) from None
            self.held = True
            yield
        finally:
            self.held = False
            if lock in _held:
                _held.remove(lock)
                os.close(lock)


# locks of this process. A forked process that decodes images would hold them too, and live on for seconds when this one is
# killed.
_held: set[int] = set()


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)
