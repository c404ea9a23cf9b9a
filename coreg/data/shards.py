"""Lists of tar and parquet files, here or at URLs: one of them, a folder of them, or `{000..999}` in their names."""

from __future__ import annotations

import dataclasses
import os
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from coreg.data.archives import AT_ONCE, refuse_compressed, tar_images
from coreg.data.images import ImageList, absolute_path
from coreg.data.parquet import parquet_images
from coreg.data.ranges import LocalFile, RangedFile, numbered
from coreg.data.remote import RemoteFile, SourceError, is_url, listed, place_of, remote_file
from coreg.errors import UserError

KINDS = {".tar": tar_images, ".parquet": parquet_images}


def is_shards(spec: str) -> bool:
    """Whether `spec` is a URL, a parquet file, or has `{000..999}` in it and is no file of that name."""
    if is_url(spec):
        return True
    return not Path(spec).is_dir() and (
        spec.lower().endswith(".parquet") or (numbered(spec) != [spec] and not Path(spec).exists())
    )


def open_shards(spec: str, class_names: Sequence[str] | None) -> ImageList:
    """The images in the tar or parquet files that `spec` names; see `tar_images` and `parquet_images`.

    A folder at a URL is one of such files, in it or in folders in it. Paths begin with a file's own name, with folders
    where the files lie in several.

    Raises:
        UserError: there are none, none can be read, or what reads them is not installed.
    """
    place = place_of(spec) if is_url(spec) else str(absolute_path(spec))
    whole = spec if is_url(spec) else place
    refuse_compressed(place, place)
    written = numbered(whole)
    if is_url(spec) and written == [spec] and _kind(spec) is None:
        written = _in_folder(spec, place)
    kinds = {_kind(one) for one in written}
    if len(kinds) > 1 or None in kinds:
        raise UserError(
            f"--images {place} names files of several kinds, or of none that is read so; name .tar files, .parquet "
            f"files, or a folder of either"
        )
    names = None if written == [whole] else _names(written)
    if names is not None:
        # paths in them are sorted as files are, slash included
        order = sorted(range(len(names)), key=lambda number: os.fsencode(names[number] + "/"))
        written, names = [written[number] for number in order], [names[number] for number in order]
    files = _remote_files(written) if is_url(spec) else [LocalFile(Path(one)) for one in written]
    return KINDS[kinds.pop()](place, place, files, names, class_names)


def _kind(spec: str) -> str | None:
    suffix = posixpath.splitext(place_of(spec) if is_url(spec) else spec)[1].lower()
    return suffix if suffix in KINDS else None


def _in_folder(url: str, place: str) -> list[str]:
    try:
        files = listed(url, tuple(KINDS))
    except SourceError as error:
        raise UserError(
            f"cannot list {place} ({error}); name .tar or .parquet files there, such as {{000..999}}.tar"
        ) from None
    if not files:
        raise UserError(f"there is no .tar and no .parquet file in {place}; name such files, or a folder of them")
    return files


def _names(written: Sequence[str]) -> list[str]:
    """What of each file's place is below the folder that they share."""
    places = [place_of(one) if is_url(one) else one for one in written]
    folder = posixpath.commonpath([posixpath.dirname(place.partition("://")[2] or place) for place in places])
    return [posixpath.relpath(place.partition("://")[2] or place, folder or ".") for place in places]


def _remote_files(urls: Sequence[str]) -> list[RangedFile | str]:
    """The files at URLs; where one cannot be had and others can, the reason.

    Raises:
        UserError: none can be had.
    """

    def ask(url: str) -> RemoteFile | str:
        try:
            return remote_file(url)
        except SourceError as error:
            return f"{place_of(url)} cannot be read ({error})"

    with ThreadPoolExecutor(AT_ONCE) as pool:
        files = list(pool.map(ask, urls))
    there = [file.url for file in files if isinstance(file, RemoteFile)]
    if not there:
        raise UserError(f"{files[0]}; give the place of files that are there, and see that this machine may read them")
    beside = tuple({there[0], there[len(there) // 2], there[-1]})
    return [file if isinstance(file, str) else dataclasses.replace(file, beside=beside) for file in files]
