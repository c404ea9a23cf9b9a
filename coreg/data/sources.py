"""Where images come from: a folder, a CSV list, a torchvision data set or built-in digits, all as one `ImageList`."""

from __future__ import annotations

import csv
import difflib
import hashlib
import os
import posixpath
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from coreg.data.decode import SUFFIXES, UnreadableImage, read_image
from coreg.errors import UserError

TRAIN, TEST = 0, 1
SPLITS = {"": TRAIN, "train": TRAIN, "0": TRAIN, "test": TEST, "1": TEST}

_SIGNS = (
    "Speed limit 20|Speed limit 30|Speed limit 50|Speed limit 60|Speed limit 70|Speed limit 80|"
    "Speed limit 80 cancelled|Speed limit 100|Speed limit 120|No passing|No truck overtaking|"
    "Only have priority at the next intersection|Priority road|Give way|Stop|All vehicles prohibited|"
    "Trucks prohibited|No entry|Caution!|Curve (to the left)|Curve (to the right)|Continuous curves|Rough road|"
    "Slippery road|The road narrows on the right|Construction site|Signal light|Pay attention to pedestrians|"
    "Pay attention to children|Watch out for bikes|Watch out for snow/ice on the road|Deer ahead|Unlimited speed|"
    "Turn right|Turn left|Go straight|Go straight and turn right|Go straight and turn left|Drive on the right|"
    "Drive on the left|Driving around the island|Lift ban on no passing|Lift ban on truck overtaking"
)
_FACES = ("Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral")

# Class names of the torchvision sets in label order; None: the set says them itself. EuroSAT has no official split.
TORCHVISION: dict[str, list[str] | None] = {
    "CIFAR10": None,
    "CIFAR100": None,
    "SVHN": [f"number {digit}" for digit in range(10)],
    "FashionMNIST": None,
    "EuroSAT": None,
    "FER2013": [f"{face} Facial Expression" for face in _FACES],
    "GTSRB": [f"German Traffic Sign: {sign}" for sign in _SIGNS.split("|")],
}


@dataclass
class ImageList:
    """N images whose row number is their identity everywhere, in an order that does not depend on the machine.

    Attributes:
        spec: what `open_images` takes to open the same list again; absolute for files.
        paths: N unique posix paths relative to the folder (or made-up names for data sets), sorted bytewise.
        labels: int64 (N,), -1 where unknown, or None without any; for reporting only.
        split: uint8 (N,), 0 = train, 1 = test.
        class_names: what the data set itself says, in label order, or None.
        pixels: row -> PIL image.
    """

    spec: str
    paths: list[str]
    labels: np.ndarray | None
    split: np.ndarray
    class_names: list[str] | None
    pixels: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, row: int) -> Image.Image:
        """Image `row` as a PIL image of mode "L" or "RGB".

        Raises:
            UnreadableImage: with the reason.
        """
        return self.pixels(row)


def open_images(spec: str, class_names: Sequence[str] | None = None, data_root: str = "data") -> ImageList:
    """List the images that `spec` names, without decoding any.

    In a folder, what lies below `test/` is the test split, and the innermost folder that is called like a class (case,
    spaces, underscores and hyphens do not count) gives the label.

    Args:
        spec: a folder (searched recursively; hidden entries and files without an image suffix are passed over); a CSV
            file with the columns `path[,label][,split]`, paths relative to its folder; a torchvision set (`CIFAR10` or
            `torchvision:CIFAR10`), downloaded when it is not there; or `builtin:digits`.
        class_names: the classes that labels are expressed in; None means the data set's own, if it has them.
        data_root: where torchvision data sets lie.

    Raises:
        UserError: there is no such source, it holds no image, a CSV row leaves its folder or is malformed, or a
            download failed.
    """
    if spec == "builtin:digits":
        return _digits(class_names)
    prefix, _, name = spec.rpartition(":")
    if prefix == "torchvision" or (spec in TORCHVISION and not Path(spec).exists()):
        return _torchvision(name, class_names, data_root)
    if Path(spec).is_dir():
        return _folder(spec, class_names)
    if spec.lower().endswith(".csv") and Path(spec).is_file():
        return _csv(spec, class_names)
    kind = "is a file, but neither a folder nor a .csv list" if Path(spec).exists() else "does not exist"
    near = difflib.get_close_matches(spec, [*TORCHVISION, "builtin:digits"], n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    raise UserError(
        f"--images {spec} {kind}{hint} (give a folder, a .csv list, builtin:digits or one of {', '.join(TORCHVISION)})"
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


def escape(path: str) -> str:
    """`path` on one line: backslash, newline and carriage return are escaped with a backslash."""
    return path.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")


def unescape(line: str) -> str:
    """The inverse of `escape`."""
    return re.sub(r"\\(.)", lambda match: {"n": "\n", "r": "\r"}.get(match[1], match[1]), line)


def list_hash(paths: Iterable[str]) -> str:
    """sha256 (hex) of the escaped paths, one a line: the identity of an image list and its order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(os.fsencode(escape(path)) + b"\n")
    return digest.hexdigest()


# ---- class names and labels -----------------------------------------------------------------------------------------


def _plain(name: str) -> str:
    """What is left of a name when case, spaces, underscores and hyphens do not count."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def _lookup(class_names: Sequence[str]) -> Callable[[str], int]:
    """A function from a written name to its class index, -1 for none: spelled exactly, or alike and not ambiguous."""
    exact = {name: index for index, name in enumerate(class_names)}
    plain = [_plain(name) for name in class_names]
    alike = {key: index for index, key in enumerate(plain) if plain.count(key) == 1}
    return lambda name: exact.get(name, alike.get(_plain(name), -1))


def _translated(labels: np.ndarray, own: Sequence[str], wanted: Sequence[str] | None) -> np.ndarray | None:
    """Labels of a data set with class names `own`, expressed in the classes `wanted`; None when nothing corresponds.

    Names that are spelled alike correspond. Where there are equally many and no name says otherwise, `wanted` is taken
    for other words in the same order.
    """
    if wanted is None:
        return labels
    find = _lookup(wanted)
    table = np.array([find(name) for name in own], dtype=np.int64)
    if len(own) == len(wanted) and ((table < 0) | (table == np.arange(len(own)))).all():
        return labels
    if (table < 0).all():
        return None
    return np.where(labels < 0, -1, table[labels])


# ---- files ----------------------------------------------------------------------------------------------------------


@dataclass
class _Files:
    """Pixels of files below a folder; a plain object, so that it can be sent to worker processes."""

    root: Path
    paths: list[str]

    def __call__(self, row: int) -> Image.Image:
        return read_image(self.root / self.paths[row])


def _walk(root: Path) -> list[str]:
    """Relative posix paths of all entries with an image suffix, sorted bytewise.

    Links to folders are followed, after all real folders and never twice into the same one, which ends loops. Broken
    links and odd files with an image suffix are listed: reading them will say what is wrong.
    """
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    pending, links = [""], []
    while pending or links:
        folder = pending.pop() if pending else links.pop(0)
        try:
            status = Path(root, folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(Path(root, folder)), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise UserError(f"cannot list {Path(root, folder)}: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = posixpath.join(folder, entry.name)
            if Path(entry.path).is_dir():
                (links if entry.is_symlink() else pending).append(path)
            elif posixpath.splitext(entry.name)[1].lower() in SUFFIXES:
                found.append(path)
    return sorted(found, key=os.fsencode)


def _folder(spec: str, class_names: Sequence[str] | None) -> ImageList:
    root = Path(spec).resolve()
    paths = _walk(root)
    if not paths:
        raise UserError(f"no image below {spec}; put files such as .jpg or .png there, or give another folder")
    split = np.array([TEST if path.startswith("test/") else TRAIN for path in paths], dtype=np.uint8)
    labels = None
    if class_names is not None:
        find = _lookup(class_names)
        of_folder: dict[str, int] = {}
        labels = np.full(len(paths), -1, dtype=np.int64)
        for row, path in enumerate(paths):
            folder = posixpath.dirname(path)
            if folder not in of_folder:  # the innermost folder that is called like a class
                of_folder[folder] = next((i for part in folder.split("/")[::-1] if (i := find(part)) >= 0), -1)
            labels[row] = of_folder[folder]
    return _file_list(str(root), root, paths, labels, split)


def _file_list(spec: str, root: Path, paths: list[str], labels: np.ndarray | None, split: np.ndarray) -> ImageList:
    known = labels is not None and bool((labels >= 0).any())
    return ImageList(spec, paths, labels if known else None, split, None, _Files(root, paths))


def _csv(spec: str, class_names: Sequence[str] | None) -> ImageList:
    path = Path(spec).resolve()
    found: dict[str, tuple[int, int]] = {}
    find = _lookup(class_names) if class_names is not None else lambda name: -1
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, restval="")
            columns = reader.fieldnames or []
            if "path" not in columns or not {"path", "label", "split"}.issuperset(columns):
                raise UserError(f"{spec} has the header {','.join(columns)!r}; its first line must be path[,label][,split]")
            for row in reader:
                place, label, split = f"{spec} line {reader.line_num}", row.get("label", ""), row.get("split", "")
                if None in row:
                    raise UserError(f"{place} has more fields than the header; put quotes around paths with commas")
                name = posixpath.normpath(row["path"])
                if not row["path"] or posixpath.isabs(name) or name.split("/")[0] == ".." or "\0" in name:
                    raise UserError(f"{place} names {row['path']!r}; paths must lie in the folder of the CSV file")
                if name in found:
                    raise UserError(f"{place} names {row['path']!r} a second time; list every image once")
                if split not in SPLITS:
                    raise UserError(f"{place} has the split {split!r}; write train or test")
                index = find(label) if label else -1
                if label and index < 0 and class_names is not None:
                    near = difflib.get_close_matches(label, class_names, n=1)
                    hint = f", did you mean {near[0]!r}?" if near else ""
                    raise UserError(f"{place} has the label {label!r}, which is none of the class names{hint}")
                found[name] = (index, SPLITS[split])
    except (csv.Error, OSError) as error:
        raise UserError(f"cannot read {spec}: {error}") from None
    if not found:
        raise UserError(f"{spec} lists no image; write one path a line below the header path[,label][,split]")
    paths = sorted(found, key=os.fsencode)
    table = np.array([found[name] for name in paths], dtype=np.int64)
    return _file_list(str(path), path.parent, paths, table[:, 0], table[:, 1].astype(np.uint8))


# ---- data sets ------------------------------------------------------------------------------------------------------


@dataclass
class _Parts:
    """Pixels of data sets that are put one behind the other."""

    parts: list[Any]

    def __call__(self, row: int) -> Image.Image:
        for part in self.parts:
            if row < len(part):
                try:
                    image = part[row][0]
                    return image if image.mode in ("L", "RGB") else image.convert("RGB")
                except Exception as error:
                    raise UnreadableImage(" ".join(f"{type(error).__name__}: {error}".split())) from None
            row -= len(part)
        raise IndexError(row)


@dataclass
class _Array:
    """Pixels of a uint8 array (N, h, w)."""

    images: np.ndarray

    def __call__(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row])


def _digits(class_names: Sequence[str] | None) -> ImageList:
    from coreg.demo.digits import DIGIT_NAMES, load_digits_images

    images, labels, split = load_digits_images()
    paths = [f"{row:04d}" for row in range(len(images))]
    labels = _translated(labels, DIGIT_NAMES, class_names)
    return ImageList("builtin:digits", paths, labels, split, list(DIGIT_NAMES), _Array(images))


def _torchvision(name: str, class_names: Sequence[str] | None, data_root: str) -> ImageList:
    if name not in TORCHVISION:
        near = difflib.get_close_matches(name, TORCHVISION, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"no torchvision data set {name}{hint} (there are: {', '.join(TORCHVISION)})")
    # "test" before "train", so that the made-up names are sorted bytewise like all others
    splits = ("train",) if name == "EuroSAT" else ("test", "train")
    parts = [_torchvision_part(name, split, data_root) for split in splits]
    own = TORCHVISION[name] or list(parts[0].classes)
    paths = [f"{split}/{row:06d}" for split, part in zip(splits, parts) for row in range(len(part))]
    split = np.concatenate([np.full(len(part), SPLITS[name], np.uint8) for name, part in zip(splits, parts)])
    labels = _translated(np.concatenate([_torchvision_labels(part) for part in parts]), own, class_names)
    return ImageList(f"torchvision:{name}", paths, labels, split, own, _Parts(parts))


def _torchvision_part(name: str, split: str, data_root: str) -> Any:
    from torchvision import datasets

    if name == "EuroSAT":
        choice: dict[str, Any] = {}
    else:
        choice = {"split": split} if name in ("SVHN", "FER2013", "GTSRB") else {"train": split == "train"}
    build = getattr(datasets, name)
    try:
        return build(data_root, **choice)
    except (RuntimeError, OSError):
        pass  # not there yet
    is_new = not Path(data_root).exists()
    try:
        if name == "FER2013":  # lies behind a login: torchvision cannot fetch it
            raise OSError("torchvision cannot download it; put fer2013.csv from Kaggle into a folder fer2013 there")
        with _network_timeout(20):
            return build(data_root, download=True, **choice)
    except Exception as error:  # torchvision lets every kind of network, archive and checksum error through
        reason = " ".join(str(error).split()) or type(error).__name__
        if is_new:  # leave no folder with half a download behind
            shutil.rmtree(data_root, ignore_errors=True)
        raise UserError(
            f"data set {name} is not in {data_root} and could not be had: {reason} "
            f"(copy it there from a machine with network, or give --data_root)"
        ) from None


def _torchvision_labels(part: Any) -> np.ndarray:
    labels = getattr(part, "targets", getattr(part, "labels", None))
    if labels is None:
        labels = [-1 if label is None else label for _, label in part._samples]
    return np.asarray(labels, dtype=np.int64)


@contextmanager
def _network_timeout(seconds: float) -> Iterable[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
