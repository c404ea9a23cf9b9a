"""Images inside other files: tar archives (WebDataset shards) and folders that Hugging Face `datasets` saved."""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset

from coreg.data.decode import MAX_BYTES, UnreadableImage, decode_image
from coreg.data.folders import folder_labels, settled, split_notes, split_of
from coreg.data.images import HELD_OUT, TEST, TRAIN, ImageList, Paths, absolute_path, lookup, translated
from coreg.data.passed_over import PassedOver
from coreg.data.ranges import LocalFile, RangedFile
from coreg.data.tar_index import index_of
from coreg.errors import UserError
from coreg.plaintext import one_line

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
AT_ONCE = 8  # files at URLs that are read at a time
LOST = -2  # in the place of a size: the whole archive cannot be read


# ---- tar files ------------------------------------------------------------------------------------------------------


def shards_of(folder: Path, suffix: str = ".tar") -> list[str]:
    """The names of the tar files in a folder, or of others, sorted."""
    names = [name for name in os.listdir(folder) if name.lower().endswith(suffix) and not name.startswith(".")]
    return sorted((name for name in names if (folder / name).is_file()), key=os.fsencode)


@dataclass
class _Members:
    """Pixels of members of tar files, read from their place without unpacking; of other places the reason."""

    files: list[RangedFile]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray  # NOT_REGULAR and LOST stand for themselves
    lost: dict[int, str]  # number of a file -> why it cannot be read

    def __call__(self, row: int) -> Image.Image:
        size, file = int(self.size[row]), int(self.file[row])
        if size == LOST:
            raise UnreadableImage(self.lost[file])
        if size <= 0:
            raise UnreadableImage("empty file" if size == 0 else "not a regular file")
        if size > MAX_BYTES:
            raise UnreadableImage(f"a file of {size / 1e9:.1f} GB")
        return decode_image(io.BytesIO(self.files[file].read(int(self.offset[row]), size)))


def tar_shards(spec: str, class_names: Sequence[str] | None, passed_over: PassedOver | None = None) -> ImageList:
    """The images in one tar file or in a folder of tar files; see `tar_images`.

    Raises:
        UserError: see there, or the archive is compressed.
    """
    root = absolute_path(spec)
    refuse_compressed(spec, root.name)
    if not root.is_dir():
        return tar_images(str(root), spec, [LocalFile(root)], None, class_names)
    names = shards_of(root)
    return tar_images(str(root), spec, [LocalFile(root / name) for name in names], names, class_names, passed_over)


def refuse_compressed(spec: str, name: str) -> None:
    """Raise a UserError for a tar file in which no member has a place."""
    if name.lower().endswith(COMPRESSED):
        raise UserError(f"{spec} is compressed, so single images cannot be read from it; unpack it, or make a plain .tar")


def tar_images(
    root: str,
    spec: str,
    files: Sequence[RangedFile | str],
    names: Sequence[str] | None,
    class_names: Sequence[str] | None,
    passed_over: PassedOver | None = None,
) -> ImageList:
    """The images in tar files; paths are `shard.tar/path/in/it.jpg`, or for one file without a name those in it.

    Labels come from a member `KEY.cls` beside `KEY.jpg` (a number or a class name, as WebDataset writes it), otherwise
    from the folders in the archive. Of several members with one name the last counts, as in tar. A file that cannot be
    read, while others can, stands in the list under its own name as one unreadable image.

    Args:
        root, spec: the place for manifests, and as a person wrote it.
        files: in the order of `names`; a text is the reason why one cannot be read.
        names: what paths begin with, sorted bytewise; None for one file without.
        passed_over: the files beside the shards; takes those in them.

    Raises:
        UserError: no archive can be read, or they hold no image.
    """
    passed_over = passed_over or PassedOver()
    place_of: dict[bytes, tuple[int, int, int]] = {}
    written: dict[str, str] = {}
    lost: dict[int, str] = {}
    with ThreadPoolExecutor(1 if isinstance(files[0], LocalFile) else AT_ONCE) as pool:
        indexes = pool.map(lambda file: file if isinstance(file, str) else index_of(file), files)
        for number, index in enumerate(indexes):
            if isinstance(index, str):
                lost[number] = index
                continue
            prefix = f"{names[number]}/" if names is not None else ""
            for name, offset, size, label in zip(index.names, index.offsets, index.sizes, index.labels):
                if posixpath.splitext(name)[1].lower() == ".cls":
                    written[prefix + posixpath.splitext(name)[0]] = label
                elif passed_over.takes(name):
                    place_of[os.fsencode(prefix + name)] = (number, offset, size)
    if len(lost) == len(files):
        raise UserError(f"{lost[0]}; copy it again")
    if not place_of:
        seen = "".join(f" ({note})" for note in passed_over.notes())
        raise UserError(f"{spec} holds no image{seen}; put files such as .jpg or .png into it, or give another archive")
    place_of |= {os.fsencode(names[number]): (number, 0, LOST) for number in lost}
    encoded = sorted(place_of)
    file, offset, size = np.array([place_of[path] for path in encoded], dtype=np.int64).T
    paths = Paths(encoded)
    labels, split, notes = _labels_and_split(paths, names, file, size != LOST, class_names)
    labels = _written_labels(paths, written, class_names, labels)
    notes += lost_notes(lost, len(files)) + passed_over.notes()
    return ImageList(root, paths, labels, split, None, _Members(list(files), file, offset, size, lost), notes)


def lost_notes(lost: dict[int, str], count: int) -> list[str]:
    """A line that says how many of `count` files cannot be read, none where all can; `lost` has the reasons."""
    return [f"{len(lost)} of {count} files cannot be read (the first, {next(iter(lost.values()))})"] if lost else []


def _labels_and_split(
    paths: Paths, names: Sequence[str] | None, file: np.ndarray, is_image: np.ndarray, class_names: Sequence[str] | None
) -> tuple[np.ndarray | None, np.ndarray, list[str]]:
    """What folders in archives and the names of archives say (see `folder_labels`); nothing of archives without images."""
    if names is None:
        return folder_labels(paths, class_names)
    # the first part is the shard, which may be called test-000.tar, or train/000.tar
    inside_of = [b"shard" + os.fsencode(paths[row][len(names[file[row]]) :]) for row in np.flatnonzero(is_image)]
    some, split_inside, notes = folder_labels(Paths(inside_of), class_names, skip=1)
    labels, split = np.full(len(paths), -1, dtype=np.int64), np.zeros(len(paths), dtype=np.uint8)
    split[is_image] = split_inside
    if some is not None:
        labels[is_image] = some
    kinds = np.array([shard_split(name) for name in names], dtype=np.uint8)
    split = np.where(kinds[file] == TRAIN, split, settled(kinds)[file]).astype(np.uint8)
    if (kinds == HELD_OUT).any():
        notes += split_notes(dict(zip(names, kinds.tolist())), bool((kinds == TEST).any()))
    return (None if some is None else labels), split, notes


def shard_split(shard: str) -> int:
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


@dataclass
class _Rows:
    """Pixels of rows of saved data sets of one column each, put one after the other."""

    parts: ConcatDataset

    def __call__(self, row: int) -> Image.Image:
        (cell,) = self.parts[row].values()
        if cell is None:
            raise UnreadableImage("no image in this row")
        if cell["bytes"] is None:
            raise UnreadableImage("the row names a file instead of holding an image")
        return decode_image(io.BytesIO(cell["bytes"]))


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
        raise UserError(f"{spec} cannot be read by datasets: {one_line(error)}; save it again") from None
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    parts, labels, names, own = [], [], [], None
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
        names += [os.fsencode(f"{name}/{row:08d}") for row in range(len(part))]
    if not names:
        raise UserError(f"{spec} holds no row; give another folder")
    used = {name: split_of(name) or TRAIN for name in splits}
    split = np.concatenate([np.full(len(splits[name]), used[name], np.uint8) for name in sorted(splits)])
    notes = split_notes(used, TEST in used.values())
    table = np.concatenate(labels)
    table = None if own is None or not (table >= 0).any() else translated(table, own, class_names)
    own = list(own) if own else None
    return ImageList(str(root), Paths(names), table, settled(split), own, _Rows(ConcatDataset(parts)), notes)
