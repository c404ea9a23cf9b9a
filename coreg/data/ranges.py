"""Files of which parts are read: on a disk here, at URLs in `coreg.data.remote`; and lists of them, `{000..999}`."""

from __future__ import annotations

import io
import itertools
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from coreg.data.decode import UnreadableImage
from coreg.errors import UserError

MOST_FILES = 1_000_000
_NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")


class RangedFile(Protocol):
    """A file that does not change while it is used."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def place(self) -> str:
        """Where it is, for messages and manifests: without credentials."""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on.

        Raises:
            UnreadableImage: they cannot be read, and other files could be.
            UserError: nothing can be read any more, or the file has changed.
        """


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk."""

    path: Path

    @property
    def place(self) -> str:
        """Where it is."""
        return str(self.path)

    @property
    def size(self) -> int:
        """Bytes; OSError for what is no file, such as a pipe, at which a reader would wait."""
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no file")
        return status.st_size

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on.

        Raises:
            UnreadableImage: with the system's reason.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except OSError as error:
            raise UnreadableImage(error.strerror or "input/output error") from None


class Reader(io.RawIOBase):
    """A file as libraries want it that read archives and tables: opened, with a position."""

    def __init__(self, file: RangedFile) -> None:
        self.file, self.position, self.size = file, 0, file.size

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """The position."""
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position."""
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        """Read as much as fits, up to the end."""
        length = max(0, min(len(buffer), self.size - self.position))
        content = self.file.read(self.position, length) if length else b""
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


class LastFew:
    """The last few things that were read, for all threads of a process; each of them is read once."""

    def __init__(self, most: int) -> None:
        """Keep at most `most` of them."""
        self.most = most
        self.forget()
        # what another thread was reading when a process was forked would never come
        os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Begin anew."""
        self.lock, self.kept = threading.Lock(), OrderedDict[Hashable, Future]()

    def get(self, key: Hashable, read: Callable[[], Any]) -> Any:
        """What `read` gives, or gave when it was called for this key; its error, too, but for this time only."""
        with self.lock:
            future = self.kept.get(key)
            is_new = future is None
            if future is None:
                future = self.kept[key] = Future()
            self.kept.move_to_end(key)
            while len(self.kept) > self.most:
                self.kept.popitem(last=False)
        if is_new:
            try:
                future.set_result(read())
            except BaseException as error:
                with self.lock:
                    if self.kept.get(key) is future:
                        del self.kept[key]
                future.set_exception(error)
        return future.result()


def numbered(spec: str) -> list[str]:
    """`shard-{000..999}.tar` as 1000 names, or the one name without such braces; with leading zeros if the numbers have.

    Raises:
        UserError: these are too many, or none.
    """
    parts = _NUMBERS.split(spec)  # text, first, last, text, first, last, ..., text
    ranges = list(zip(parts[1::3], parts[2::3]))
    count = 1
    for first, last in ranges:
        count *= max(0, int(last) - int(first) + 1)
    if not 0 < count <= MOST_FILES:
        raise UserError(
            f"--images {spec} stands for {count} files; write the smaller number first, such as {{000..999}}, and at most "
            f"{MOST_FILES} of them"
        )
    choices = []
    for first, last in ranges:
        width = max(len(first), len(last)) if first[0] == "0" or last[0] == "0" else 0
        choices.append([f"{number:0{width}d}" for number in range(int(first), int(last) + 1)])
    return [
        "".join(itertools.chain.from_iterable(zip(parts[0::3], (*chosen, "")))) for chosen in itertools.product(*choices)
    ]
