"""What a source of images gives: an `ImageList`, whose paths take little memory, with labels in the asked-for classes."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from coreg.errors import UserError

TRAIN, TEST, HELD_OUT = 0, 1, 2
SPLIT_NAMES = ("train", "test", "held out")
SPLITS = {"": TRAIN, "train": TRAIN, "0": TRAIN, "test": TEST, "1": TEST, "val": HELD_OUT}


class Paths(Sequence[str]):
    """N paths in one block of bytes: some 60 bytes a path instead of 150, and not copied by worker processes.

    (Python objects are written to when they are read, because references are counted; a list of a million strings
    would be copied into every forked worker sooner or later.)
    """

    def __init__(self, encoded: Sequence[bytes]) -> None:
        """Keep `encoded`, paths as the file system encodes them, in order."""
        self.bytes = b"".join(encoded)
        self.ends = np.cumsum(np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[index] for index in range(*row.indices(len(self)))]
        row = int(row)
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        return os.fsdecode(self.bytes[self.ends[row - 1] if row else 0 : self.ends[row]])

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends:
            yield os.fsdecode(self.bytes[start:end])
            start = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Paths):
            return self.bytes == other.bytes and np.array_equal(self.ends, other.ends)
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None


@dataclass
class ImageList:
    """N images whose row number is their identity everywhere, in an order that does not depend on the machine."""

    spec: str  # what `open_images` takes to open the same list again; absolute for files
    paths: Sequence[str]  # N unique posix paths relative to the folder (or made-up names of data sets), sorted bytewise
    labels: np.ndarray | None  # int64 (N,), -1 where unknown, or None without any; for reporting only
    split: np.ndarray  # uint8 (N,), 0 = train, 1 = test, 2 = held out: neither trained on nor counted
    class_names: list[str] | None  # what the data set itself says, in label order
    pixels: Callable[[int], Image.Image]  # row -> PIL image
    notes: list[str] = field(default_factory=list)  # how the list came about, for a person, one line each
    # int8 (N, L) where images have several labels (`coreg.data.tags`), for reporting only
    tags: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, row: int) -> Image.Image:
        """Image `row` as a PIL image of mode "L" or "RGB".

        Raises:
            UnreadableImage: with the reason.
        """
        return self.pixels(row)


def escape(path: str) -> str:
    """`path` on one line: backslash, newline and carriage return are escaped with a backslash."""
    return path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def unescape(line: str) -> str:
    """The inverse of `escape`."""
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "r": "\r"}.get(match[1], match[1]), line)


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """`path` from the root on as a person typed it, links and all: they may be the stable name of a place that changes."""
    plain = os.path.abspath(path)
    # where `..` comes after a link, only the system knows what is meant
    return Path(plain if os.path.realpath(plain) == os.path.realpath(path) else os.path.realpath(path))


def path_within(written: str, place: str) -> str:
    """A path from a list as it lies below the list's folder.

    Args:
        place: for the error, such as `list.csv line 2 names`.

    Raises:
        UserError: it leads out of that folder.
    """
    name = posixpath.normpath(written)
    if not written or posixpath.isabs(name) or name.split("/")[0] == ".." or "\0" in name:
        raise UserError(f"{place} {written!r}; paths must lie in the folder of the list")
    return name


def list_hash(paths: Iterable[str]) -> str:
    """sha256 (hex) of the escaped paths, one a line: the identity of an image list and its order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(escape(path)) + b"\n")
    return digest.hexdigest()


# ---- class names and labels -----------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    """What is left of a name when case, Unicode form, spaces, underscores and hyphens do not count."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name)).casefold()


def lookup(class_names: Sequence[str]) -> Callable[[str], int]:
    """A function from a written name to its class index, -1 for none: spelled exactly, or alike and not ambiguous."""
    exact = {name: index for index, name in enumerate(class_names)}
    plain = [_plain(name) for name in class_names]
    alike = {key: index for index, key in enumerate(plain) if plain.count(key) == 1}
    return lambda name: exact.get(name, alike.get(_plain(name), -1))


def translated(labels: np.ndarray, own: Sequence[str], wanted: Sequence[str] | None) -> np.ndarray | None:
    """Labels of a data set with class names `own`, expressed in the classes `wanted`; None when nothing corresponds.

    Names that are spelled alike correspond. Where there are equally many and no name says otherwise, `wanted` is taken
    for other words in the same order.
    """
    if wanted is None:
        return labels
    find = lookup(wanted)
    table = np.array([find(name) for name in own], dtype=np.int64)
    if len(own) == len(wanted) and ((table < 0) | (table == np.arange(len(own)))).all():
        return labels
    if (table < 0).all():
        return None
    return np.where(labels < 0, -1, table[labels])
