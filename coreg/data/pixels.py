"""Decoded images in one file, or in memory that processes share: rows of equal length, read by number.

Rows are read and not mapped: what is mapped would count as memory of the process as soon as it was touched.
"""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from coreg.errors import UserError

CHUNK_BYTES = 16 << 20  # decoded at a time


@dataclass
class StoredPixels:
    """N decoded images."""

    path: str  # for messages
    descriptor: int  # of the file, open for reading
    shape: tuple[int, int, int]  # (c, H, W) of an image
    checksums: np.ndarray | None = None  # uint32 (N,), CRC-32 of each image; None where memory holds them

    @cached_property
    def length(self) -> int:
        """Bytes of an image."""
        return math.prod(self.shape)

    def expect(self, rows: np.ndarray) -> None:
        """Let the system begin to read these rows int64 (n,), increasing, from the disk; does not wait."""
        if self.checksums is not None and hasattr(os, "posix_fadvise"):
            for start, stop in _runs(rows):
                offset, length = int(rows[start]) * self.length, (stop - start) * self.length
                os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_WILLNEED)

    def read(self, rows: np.ndarray, pixels: np.ndarray) -> None:
        """Read images into memory and compare them with their checksums.

        Args:
            rows: int64 (n,), increasing. pixels: uint8 (n, c, H, W), contiguous, takes them.

        Raises:
            UserError: the file is damaged, or cannot be read.
        """
        into = pixels.reshape(len(rows), self.length)
        for start, stop in _runs(rows):
            place, left = int(rows[start]) * self.length, memoryview(into[start:stop]).cast("B")
            while left:
                try:
                    count = os.preadv(self.descriptor, [left], place)
                except OSError as error:
                    raise UserError(f"cannot read {self.path} ({error.strerror}); run the same command again") from None
                if not count:
                    raise self.damaged(int(rows[start]))
                left, place = left[count:], place + count
        if self.checksums is not None:
            for image, row in zip(into, rows.tolist()):
                if zlib.crc32(image) != self.checksums[row]:
                    raise self.damaged(row)

    def damaged(self, row: int) -> UserError:
        """The error for an image that is not what was written."""
        folder = os.path.dirname(self.path)
        return UserError(
            f"{self.path} is damaged (image {row}); type python -m coreg.store delete {folder}, and the same command "
            f"decodes the images anew"
        )


def _runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of the parts of increasing `rows` that follow each other without a gap."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return list(zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)]))


def write_at(descriptor: int, content: np.ndarray, offset: int) -> None:
    """Write all bytes of an array at `offset`; OSError where that cannot be done."""
    left = memoryview(np.ascontiguousarray(content)).cast("B")
    while left:
        count = os.pwrite(descriptor, left, offset)
        left, offset = left[count:], offset + count
