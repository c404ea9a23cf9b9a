"""Where images come from: a folder, a list, archives, a torchvision data set or built-in digits, as one `ImageList`."""

from __future__ import annotations

import dataclasses
import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from coreg.data.archives import COMPRESSED, datasets_folder, shards_of, tar_shards
from coreg.data.decode import Files, UnreadableImage
from coreg.data.folders import folder_labels, settled
from coreg.data.images import SPLITS, ImageList, Paths, absolute_path, lookup, path_within, translated
from coreg.data.joined import PREFIX, joined_images
from coreg.data.labels import class_of, csv_lines
from coreg.data.lists import listed_images
from coreg.data.parquet import parquet_images
from coreg.data.passed_over import PassedOver, is_system_folder
from coreg.data.ranges import LocalFile
from coreg.data.shards import is_shards, open_shards
from coreg.data.tag_sets import TAG_SETS
from coreg.data.tags import names_in, read_tags, translated_tags
from coreg.data.torchvision_sets import TORCHVISION, torchvision_set
from coreg.errors import UserError
from coreg.plaintext import did_you_mean


def open_images(spec: str, class_names: Sequence[str] | None = None, data_root: str = "data") -> ImageList:
    """List the images that `spec` names, without decoding any.

    In folders and tar files, what lies below `test/` is the test split (see `folder_labels` for other spellings), and the
    innermost folder that is called like a class (case, spaces, underscores and hyphens do not count) gives the label.

    Args:
        spec: a folder (searched recursively; hidden entries and files without an image suffix are passed over); a CSV
            file with the columns `path[,label][,split]`, paths relative to its folder, or, for several labels an image,
            those of `read_tags` and `split`; a `.txt` file with `path label` a line (`coreg.data.lists.listed_images`); a
            `.tar` file or a folder of such files without images beside them (WebDataset shards, img2dataset's folder); a
            `.parquet` file or a folder of them; either at a URL (`s3://`, `gs://`, `hf://`, `https://`, ...), or several,
            with `{000..999}` in their name; a folder that Hugging Face `datasets` saved; a torchvision set (`CIFAR10` or
            `torchvision:CIFAR10`), downloaded when it is not there; `voc:`, `coco:`, `nuswide:` or `cub:` and the folder
            of that data set; `builtin:digits`; or several of these, `joined:["a", "b"]`.
        class_names: the classes that labels are expressed in; None means the data set's own, if it has them.
        data_root: where torchvision data sets lie.

    Raises:
        UserError: there is no such source, it holds no image, a CSV row leaves its folder or is malformed, an archive
            is damaged, or a download failed.
    """
    if spec in BUILT_IN:
        return BUILT_IN[spec](class_names)
    prefix, _, name = spec.rpartition(":")
    if prefix == "torchvision" or (spec in TORCHVISION and not Path(spec).exists()):
        return torchvision_set(name, class_names, data_root)
    kind, _, folder = spec.partition(":")
    if kind in TAG_SETS:
        return TAG_SETS[kind](folder, class_names)
    if spec.startswith(PREFIX):
        return joined_images(spec, lambda one: open_images(one, class_names, data_root))
    if is_shards(spec):
        return open_shards(spec, class_names)
    if spec.lower().endswith((".tar", *COMPRESSED)) and Path(spec).is_file():
        return tar_shards(spec, class_names)
    if Path(spec).is_dir():
        # made by `save_to_disk` of Hugging Face datasets
        saved = any(Path(spec, name).is_file() for name in ("dataset_dict.json", "state.json"))
        return (datasets_folder if saved else _folder)(spec, class_names)
    if spec.lower().endswith(".csv") and Path(spec).is_file():
        return _csv(spec, class_names)
    if spec.lower().endswith(".txt") and Path(spec).is_file():
        return listed_images(spec, class_names)
    kind = (
        "is a file, but neither a folder nor a .csv, .txt, .tar or .parquet file"
        if Path(spec).exists()
        else "does not exist"
    )
    hint = did_you_mean(spec, [*TORCHVISION, *BUILT_IN])
    raise UserError(
        f"--images {spec} {kind}{hint} (give a folder, a .csv or .txt list, .tar or .parquet files, also at a URL, "
        f"{', '.join(BUILT_IN)} or one of {', '.join(TORCHVISION)})"
    )


def require_readable(images: ImageList) -> None:
    """Raise a UserError unless at least one image can be read."""
    for row in range(len(images)):
        try:
            images.load(row)
            return
        except UnreadableImage as error:
            last = f"{images.paths[row]!r}: {error}"
    raise UserError(f"none of the {len(images)} images in {images.spec} can be read (the last, {last}); give other images")


# ---- files ----------------------------------------------------------------------------------------------------------


def _walk(root: Path, passed_over: PassedOver) -> list[bytes]:
    """Relative posix paths (encoded) of all entries with an image suffix, sorted bytewise.

    Links to folders are followed, after all real folders and never twice into the same one, which ends loops. Broken
    links and odd files with an image suffix are listed: reading them will say what is wrong.
    """
    files: list[bytes] = []
    seen: set[tuple[int, int]] = set()
    pending: list[str] = [""]
    links: list[str] = []
    while pending or links:
        if not pending:
            links.sort(key=lambda link: (link.count("/"), os.fsencode(link)))  # an order that no disk decides
        folder = pending.pop() if pending else links.pop(0)
        try:
            status = Path(root, folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(Path(root, folder)) as entries:
                for entry in entries:
                    path = posixpath.join(folder, entry.name)
                    if _is_folder(entry):
                        if not is_system_folder(entry.name):
                            (links if entry.is_symlink() else pending).append(path)
                    elif passed_over.takes(entry.name):
                        files.append(os.fsencode(path))
        except OSError as error:
            raise UserError(f"cannot list {Path(root, folder)}: {error.strerror}") from None
    files.sort()
    return files


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example
        return False


def _folder(spec: str, class_names: Sequence[str] | None) -> ImageList:
    root = absolute_path(spec)
    passed_over = PassedOver()
    paths = Paths(_walk(root, passed_over))
    shards = shards_of(root)
    passed_over.counts[".tar"] -= len(shards)
    if not len(paths) and shards:
        return tar_shards(spec, class_names, passed_over)
    if not len(paths) and (tables := shards_of(root, ".parquet")):
        return parquet_images(str(root), spec, [LocalFile(root / name) for name in tables], tables, class_names)
    notes = passed_over.notes()
    if not len(paths):
        seen = f" ({notes[0]})" if notes else ""
        raise UserError(f"no image below {spec}{seen}; put files such as .jpg or .png there, or give another folder")
    if shards:
        notes.append(
            f"images lie beside {len(shards)} .tar files, which are not opened: put either into a folder of its own"
        )
    labels, split, split_lines = folder_labels(paths, class_names)
    return ImageList(str(root), paths, labels, split, None, Files(root, paths), split_lines + notes)


def _csv(spec: str, class_names: Sequence[str] | None) -> ImageList:
    path = absolute_path(spec)
    entries: dict[str, tuple[int, int]] = {}
    find, single = lookup(class_names or ()), True
    for place, row in csv_lines(spec, ()):
        single = {"path", "label", "split"}.issuperset(row)
        if "path" not in row or not (single or "label" not in row):
            raise UserError(
                f"{spec} has the header {','.join(row)!r}; its first line must be path[,label][,split], or "
                f"path,labels[,split], or path[,split] and one column a label"
            )
        name, label, split = path_within(row["path"], f"{place} names"), row.get("label", ""), row.get("split", "")
        if name in entries:
            raise UserError(f"{place} names {row['path']!r} a second time; list every image once")
        if split not in SPLITS:
            raise UserError(f"{place} has the split {split!r}; write train, val or test")
        index = class_of(label, find, class_names, place) if label and class_names is not None else -1
        entries[name] = (index, SPLITS[split])
    if not entries:
        raise UserError(f"{spec} lists no image; write one path a line below the header path[,label][,split]")
    names = sorted(entries, key=os.fsencode)
    labels, split = np.array([entries[name] for name in names], dtype=np.int64).T
    paths = Paths([os.fsencode(name) for name in names])
    known = labels if (labels >= 0).any() else None
    images = ImageList(str(path), paths, known, settled(split.astype(np.uint8)), None, Files(path.parent, paths))
    if single:
        return images
    own = names_in(spec)
    tags = read_tags(spec, paths, class_names or own, all_listed=True)
    return dataclasses.replace(images, class_names=own, tags=tags)


# ---- data sets ------------------------------------------------------------------------------------------------------


@dataclass
class _Array:
    """Pixels of a uint8 array (N, h, w)."""

    images: np.ndarray

    def __call__(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row])


def _digits(class_names: Sequence[str] | None) -> ImageList:
    from coreg.data.digits import DIGIT_NAMES, load_digits_images

    images, labels, split = load_digits_images()
    paths = Paths([b"%04d" % row for row in range(len(images))])
    known = translated(labels, DIGIT_NAMES, class_names)
    return ImageList("builtin:digits", paths, known, split, list(DIGIT_NAMES), _Array(images))


def _digit_pictures(class_names: Sequence[str] | None) -> ImageList:
    from coreg.data.digit_pictures import load_digit_pictures
    from coreg.data.digits import DIGIT_NAMES

    images, tags, split = load_digit_pictures()
    paths = Paths([b"%04d" % row for row in range(len(images))])
    known = translated_tags(tags, DIGIT_NAMES, class_names)
    return ImageList("builtin:digit-pictures", paths, None, split, list(DIGIT_NAMES), _Array(images), tags=known)


BUILT_IN = {"builtin:digits": _digits, "builtin:digit-pictures": _digit_pictures}
