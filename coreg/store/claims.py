"""Which process annotates which block, agreed upon through the folder alone: processes may come, go and be killed.

A process that works on a store keeps a file `claims/<process>.alive` fresh and takes a block by creating
`claims/<block>.claim` with its name in it, which only one process can do. The claim of a process that ended or has not
been heard of for `STALE_SECONDS` is taken over. Claims only save work: should two processes ever annotate the same block,
because a network disk showed one of them an old picture, then both write the same bytes, each in one rename.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from coreg.errors import UserError
from coreg.files import is_running, this_machine

STALE_SECONDS = 180.0  # well above the minute for which network disks may show old file times
BEAT_SECONDS = 10.0


class BlockQueue:
    """The blocks of a store that are still to be annotated, as one of the processes that share the folder sees them.

    Use it as a context manager: inside, this process counts as alive.
    """

    def __init__(self, root: Path, files: Sequence[Path], start: float = 0.0) -> None:
        """Prepare a queue.

        Args:
            root: folder of the store.
            files: the files of all blocks; a block is finished when its file is there.
            start: where to begin to try blocks, as a share in [0, 1); processes that begin at different
                places seldom want the same block.
        """
        self.root, self.files = root / "claims", files
        self.order = [(int(start * len(files)) + step) % len(files) for step in range(len(files))]
        self.name = f"{this_machine()}.{os.getpid()}.{secrets.token_hex(4)}"
        self.alive = self.root / f"{self.name}.alive"
        self.claimed: set[int] = set()
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._keep_alive, daemon=True)

    def __enter__(self) -> BlockQueue:
        for tries_left in range(9, -1, -1):
            try:
                self.root.mkdir(exist_ok=True)
                self.alive.touch()
                break
            except OSError as error:
                # another process may see the job finished, and clear up, between the two
                if isinstance(error, FileNotFoundError) and tries_left:
                    continue
                raise UserError(f"cannot write into {self.root}: {error.strerror}; run the same command again") from None
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._beating.join()
        for index in list(self.claimed):
            self.release(index)
        with contextlib.suppress(OSError):
            self.alive.unlink()

    def _keep_alive(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # removed by a process that saw the job finished
                os.utime(self.alive)

    def finished(self) -> list[bool]:
        """Which blocks are there, by listing the folder once."""
        names = set(os.listdir(self.files[0].parent))
        return [file.name in names for file in self.files]

    def claim(self) -> int | None:
        """Take a free block; None when every block is finished or in work."""
        done = self.finished()
        for index in self.order:
            if done[index] or index in self.claimed or not self._take(index):
                continue
            self.claimed.add(index)
            if not self.files[index].exists():  # it may have been finished since the folder was listed
                return index
            self.release(index)
        return None

    def release(self, index: int) -> None:
        """Give a block back, finished or not."""
        self.claimed.discard(index)
        with contextlib.suppress(OSError):
            if _owner(self._claim(index)) == self.name:
                self._claim(index).unlink()

    def _claim(self, index: int) -> Path:
        return self.root / f"{index:05d}.claim"

    def _take(self, index: int) -> bool:
        claim = self._claim(index)
        try:
            with claim.open("x", encoding="utf-8") as file:
                file.write(self.name)
            return True
        except FileExistsError:
            pass
        except FileNotFoundError:  # another process saw the job finished and cleared up
            return False
        except OSError as error:
            raise UserError(f"cannot write {claim}: {error.strerror}; run the same command again") from None
        try:
            if not stat.S_ISREG(claim.lstat().st_mode):  # nobody would ever let go of it
                raise UserError(f"{claim} is no file; remove it and run the same command again")
            owner = _owner(claim)
            if not self._is_gone(self.root / f"{owner}.alive" if owner else claim, owner):
                return False
            taken = self.root / f"{self.name}.take"
            taken.write_text(self.name, encoding="utf-8")
            taken.replace(claim)
            # Of two processes that take over at the same time, the one that wrote last has it.
            return _owner(claim) == self.name
        except OSError:  # released, or taken over by another process, at this very moment
            return False

    def _is_gone(self, sign: Path, owner: str) -> bool:
        """Whether the process that touches the file `sign` has ended, or has not been heard of for long."""
        machine, _, rest = owner.rpartition(".")[0].rpartition(".")
        if machine == this_machine() and rest.isdigit() and not is_running(int(rest)):
            return True
        try:
            last = sign.stat().st_mtime
            self.alive.touch()  # the clock of the disk, not of this machine
            return self.alive.stat().st_mtime - last > STALE_SECONDS
        except FileNotFoundError:
            return not sign.exists()

    def clear(self) -> None:
        """Remove all claims; for when every block is there."""
        shutil.rmtree(self.root, ignore_errors=True)


def _owner(claim: Path) -> str:
    """Who holds a claim; "" where no name is in it, as in one that is just being written, or is damaged."""
    with claim.open("rb") as file:
        name = file.read(200).decode("utf-8", "replace")
    return "" if len(name) >= 200 or set("/\0") & set(name) else name
