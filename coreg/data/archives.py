"""Images inside other files: tar archives (WebDataset shards) and folders that Hugging Face `datasets` saved."""

from __future__ import annotations

import io
import os
import posixpath
import re
import stat
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coreg.data.decode import MAX_BYTES, UnreadableImage, decode_image
from coreg.data.folders import folder_labels, settled, split_notes, split_of
from coreg.data.images import HELD_OUT, TEST, TRAIN, ImageList, Paths, absolute_path, lookup, translated
from coreg.data.passed_over import PassedOver
from coreg.errors import UserError
from coreg.files import inside

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


# ---- tar files ------------------------------------------------------------------------------------------------------


def is_tar(spec: str) -> bool:
    """Whether `spec` is a tar file."""
    return Path(spec).is_file() and spec.lower().endswith((".tar", *COMPRESSED))


def shards_of(folder: Path) -> list[str]:
    """The names of the tar files in a folder, sorted."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(".tar") and not name.startswith(".")]
    return sorted((name for name in names if (folder / name).is_file()), key=os.fsencode)


@dataclass
class _Members:
    """Pixels of members of tar files, read from their place without unpacking; size -1 is no regular member."""

    files: list[Path]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def __call__(self, row: int) -> Image.Image:
        size = int(self.size[row])
        if size <= 0:
            raise UnreadableImage("empty file" if size == 0 else "not a regular file")
        if size > MAX_BYTES:
            raise UnreadableImage(f"a file of {size / 1e9:.1f} GB")
        try:
            with self.files[self.file[row]].open("rb") as file:
                file.seek(int(self.offset[row]))
                content = file.read(size)
        except OSError as error:
            raise UnreadableImage(error.strerror or "input/output error") from None
        return decode_image(io.BytesIO(content))


def tar_shards(spec: str, class_names: Sequence[str] | None, passed_over: PassedOver | None = None) -> ImageList:
    """The images in one tar file or in a folder of tar files; paths are `shard.tar/path/in/it.jpg` for a folder.

    Labels come from a member `KEY.cls` beside `KEY.jpg` (a number or a class name, as WebDataset writes it), otherwise
    from the folders in the archive. Of several members with one name the last counts, as in tar.

    Args:
        passed_over: the files beside the shards; takes those in them.

    Raises:
        UserError: an archive is compressed, damaged or holds no image.
    """
    root = absolute_path(spec)
    if root.name.lower().endswith(COMPRESSED):
        raise UserError(f"{spec} is compressed, so single images cannot be read from it; unpack it, or make a plain .tar")
    files = [root / name for name in shards_of(root)] if root.is_dir() else [root]
    passed_over = passed_over or PassedOver()
    place_of: dict[bytes, tuple[int, int, int]] = {}
    written: dict[str, str] = {}
    for number, file in enumerate(files):
        prefix = f"{file.name}/" if root.is_dir() else ""
        for member, content in _index(file):
            name = inside(member.name)
            if posixpath.splitext(name)[1].lower() == ".cls":
                written[prefix + posixpath.splitext(name)[0]] = content
            elif not member.isdir() and passed_over.takes(name):
                place = (number, member.offset_data, member.size if member.isreg() else -1)
                place_of[os.fsencode(prefix + name)] = place
    if not place_of:
        seen = "".join(f" ({note})" for note in passed_over.notes())
        raise UserError(f"{spec} holds no image{seen}; put files such as .jpg or .png into it, or give another archive")
    names = sorted(place_of)
    file, offset, size = np.array([place_of[name] for name in names], dtype=np.int64).T
    paths = Paths(names)
    # in a folder of shards the first part is the shard, which may be called test-000.tar
    labels, split, notes = folder_labels(paths, class_names, skip=int(root.is_dir()))
    if root.is_dir():
        kinds = np.array([_shard_split(file.name) for file in files], dtype=np.uint8)
        split = np.where(kinds[file] == TRAIN, split, settled(kinds)[file]).astype(np.uint8)
        if (kinds == HELD_OUT).any():
            notes += split_notes({file.name: kind for file, kind in zip(files, kinds.tolist())}, (kinds == TEST).any())
    labels = _written_labels(paths, written, class_names, labels)
    return ImageList(
        str(root), paths, labels, split, None, _Members(files, file, offset, size), notes + passed_over.notes()
    )


def _index(file: Path) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """The members of a tar file one by one, with the text of those called `*.cls`."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise tarfile.ReadError("it is no file")
        with tarfile.open(file, "r:") as archive:
            end = 0
            for member in archive:
                is_label = member.isreg() and member.name.endswith(".cls") and member.size < 4096
                content = archive.extractfile(member).read().decode("utf-8", "replace").strip() if is_label else ""
                end = member.offset_data + member.size if member.isreg() else end
                yield member, content
                archive.members = []  # the archive object would keep them all
            if end > file.stat().st_size:
                raise tarfile.ReadError("it ends in the middle of a member")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{file} cannot be read as a tar file: {' '.join(str(error).split())}; copy it again") from None


def _shard_split(shard: str) -> int:
    """The split of a shard by its name, such as test-000.tar or imagenet-val-12.tar."""
    words = re.findall("[a-z]+", shard.lower())
    kinds = [kind for word in words if (kind := split_of(word)) is not None]
    return TEST if shard.lower().startswith("test") else next(iter(kinds), TRAIN)


def _written_labels(
    paths: Paths, written: dict[str, str], class_names: Sequence[str] | None, labels: np.ndarray | None
) -> np.ndarray | None:
    if not written or class_names is None:
        return labels
    labels = np.full(len(paths), -1, dtype=np.int64) if labels is None else labels
    find = lookup(class_names)
    for row, path in enumerate(paths):
        if text := written.get(posixpath.splitext(path)[0], ""):
            number = int(text) if text.isdigit() else -1
            labels[row] = number if 0 <= number < len(class_names) else find(text)
    return labels if (labels >= 0).any() else None


# ---- Hugging Face datasets ------------------------------------------------------------------------------------------


def is_datasets_folder(spec: str) -> bool:
    """Whether `datasets.Dataset.save_to_disk` or `DatasetDict.save_to_disk` made this folder."""
    return (Path(spec) / "dataset_dict.json").is_file() or (Path(spec) / "state.json").is_file()


@dataclass
class _Rows:
    """Pixels of rows of saved data sets, put one after the other."""

    parts: list[Any]
    columns: list[str]

    def __call__(self, row: int) -> Image.Image:
        for part, column in zip(self.parts, self.columns):
            if row < len(part):
                cell = part[row][column]
                if cell is None:
                    raise UnreadableImage("no image in this row")
                if cell["bytes"] is None:
                    raise UnreadableImage("the row names a file instead of holding an image")
                return decode_image(io.BytesIO(cell["bytes"]))
            row -= len(part)
        raise IndexError(row)


def datasets_folder(spec: str, class_names: Sequence[str] | None) -> ImageList:
    """The images of a saved `Dataset` or `DatasetDict`; its splits are those of `folder_labels`, others are for training.

    Raises:
        UserError: the library is not installed, or the folder holds no column of images.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{spec} was saved by Hugging Face datasets, which is not installed: pip install datasets"
        ) from None
    root = absolute_path(spec)
    try:
        loaded = datasets.load_from_disk(str(root))
    except Exception as error:  # pyarrow and datasets let many kinds of errors through
        raise UserError(f"{spec} cannot be read by datasets: {' '.join(str(error).split())}; save it again") from None
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    parts, columns, labels, names, own = [], [], [], [], None
    for name in sorted(splits, key=os.fsencode):
        part = splits[name]
        column = next((key for key, kind in part.features.items() if isinstance(kind, datasets.Image)), None)
        if column is None:
            raise UserError(f"{spec} has no column of images in its split {name}; cast one with datasets.Image() first")
        label = next((key for key, kind in part.features.items() if isinstance(kind, datasets.ClassLabel)), None)
        own = own or (part.features[label].names if label else None)
        known = [-1 if value is None else value for value in part[label]] if label else [-1] * len(part)
        labels.append(np.array(known, dtype=np.int64))
        parts.append(part.select_columns([column]).cast_column(column, datasets.Image(decode=False)))
        columns.append(column)
        names += [os.fsencode(f"{name}/{row:08d}") for row in range(len(part))]
    if not names:
        raise UserError(f"{spec} holds no row; give another folder")
    used = {name: split_of(name) or TRAIN for name in splits}
    split = np.concatenate([np.full(len(splits[name]), used[name], np.uint8) for name in sorted(splits)])
    notes = split_notes(used, TEST in used.values())
    table = np.concatenate(labels)
    table = None if own is None or not (table >= 0).any() else translated(table, own, class_names)
    own = list(own) if own else None
    return ImageList(str(root), Paths(names), table, settled(split), own, _Rows(parts, columns), notes)
