"""Which members a tar file has, and where in it they lie; kept for a file at a URL, which has to be read for it."""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from coreg.data.decode import UnreadableImage
from coreg.data.ranges import LocalFile, RangedFile, Reader
from coreg.data.remote import RemoteFile, fingerprint
from coreg.errors import UserError
from coreg.files import inside, write_atomically
from coreg.plaintext import one_line
from coreg.records import Number, RecordError, parse_record

NOT_REGULAR = -1  # in the place of a size
LONGEST_LABEL = 4096  # bytes of a member `*.cls`
_KIND = {"names": [str], "offsets": [Number(0)], "sizes": [Number(NOT_REGULAR)], "labels": [str]}


@dataclass
class TarIndex:
    """The members of a tar file that are no folders, in its order."""

    names: list[str]  # paths in it that lead nowhere else
    offsets: list[int]  # bytes from its beginning
    sizes: list[int]  # bytes, or NOT_REGULAR
    labels: list[str]  # the text of members called `*.cls`, "" of others


def index_of(file: RangedFile) -> TarIndex | str:
    """The index of a tar file, or in words why there is none.

    Raises:
        UserError: its store does not answer.
    """
    kept = _cache_file(file) if isinstance(file, RemoteFile) else None
    if kept is not None and (index := _kept_index(kept)) is not None:
        return index
    try:
        index = TarIndex([], [], [], [])
        for member, label in _members(file):
            index.names.append(inside(member.name))
            index.offsets.append(member.offset_data)
            index.sizes.append(member.size if member.isreg() else NOT_REGULAR)
            index.labels.append(label)
    except UnreadableImage as error:  # a file of several
        return f"{file.place} cannot be read ({error})"
    except (tarfile.TarError, OSError, EOFError) as error:
        return f"{file.place} cannot be read as a tar file: {one_line(error)}"
    if kept is not None:
        with contextlib.suppress(OSError, UserError):  # it only saves time
            kept.parent.mkdir(parents=True, exist_ok=True)
            # with a checksum of zlib's own
            write_atomically(kept, zlib.compress(json.dumps(vars(index)).encode(), 1))
    return index


def _members(file: RangedFile) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """The members of a tar file that are no folders, with the text of those called `*.cls`."""
    size = file.size
    stream = file.path.open("rb") if isinstance(file, LocalFile) else Reader(file)
    with stream, tarfile.open(fileobj=stream, mode="r:") as archive:
        end = 0
        for member in archive:
            is_label = member.isreg() and member.name.endswith(".cls") and member.size < LONGEST_LABEL
            label = archive.extractfile(member).read().decode("utf-8", "replace").strip() if is_label else ""
            end = member.offset_data + member.size if member.isreg() else end
            if not member.isdir():
                yield member, label
            archive.members = []  # the archive object would keep them all
        if end > size:
            raise tarfile.ReadError("it ends in the middle of a member")


# ---- kept -----------------------------------------------------------------------------------------------------------


def _cache_file(file: RemoteFile) -> Path | None:
    """Where the index of this version of a file is kept; None where its store does not tell versions apart."""
    if not file.version:
        return None
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "coreg", "shards", fingerprint(file))


def _kept_index(path: Path) -> TarIndex | None:
    try:
        record = parse_record(zlib.decompress(path.read_bytes()), _KIND)
    except (OSError, zlib.error, RecordError):
        return None
    return TarIndex(*(record[name] for name in _KIND)) if len(set(map(len, record.values()))) == 1 else None
