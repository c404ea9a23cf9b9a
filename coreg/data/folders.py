"""What the folders of a path say: which split an image belongs to, and its label; and which folders say nothing."""

from __future__ import annotations

import difflib
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from coreg.data.images import HELD_OUT, SPLIT_NAMES, TEST, TRAIN, Paths, lookup
from coreg.data.joined import PREFIX

SPELLINGS = {
    "train": TRAIN, "training": TRAIN,
    "test": TEST, "testing": TEST,
    "val": HELD_OUT, "valid": HELD_OUT, "validation": HELD_OUT,
}  # fmt: skip
SHOWN = 8  # folders in a line
LOOKED_AT = 200  # folders that are compared with the classes, those with most images
Parts = tuple[str, ...]


def split_of(name: str) -> int | None:
    """The split that a folder of this name stands for, None for any other; of validation images, `HELD_OUT`."""
    return SPELLINGS.get(name.casefold())


def settled(split: np.ndarray) -> np.ndarray:
    """Splits uint8 (N,) where validation images are the test images if there are no others."""
    return split if (split == TEST).any() else np.where(split == HELD_OUT, TEST, split).astype(np.uint8)


def folder_labels(
    paths: Paths, class_names: Sequence[str] | None, skip: int = 0
) -> tuple[np.ndarray | None, np.ndarray, list[str]]:
    """Labels and splits by the folders of each path (docs/own_images.md).

    Split folders are `train`, `test`, `val` and other spellings of these, at the top, below folders that hold everything,
    or one level down in every folder. The label is that of the innermost other folder that is called like a class.

    Args:
        paths: N paths.
        class_names: the classes; None for no labels.
        skip: parts at the beginning of every path that are no folders.

    Returns:
        labels int64 (N,), -1 where no folder is called so, or None where none is at all; split uint8 (N,); lines that say
        how the split came about, none where it is plain `train/` and `test/` at the top.
    """
    find = lookup(class_names) if class_names is not None else lambda name: -1
    number: dict[str, int] = {}
    of_path = np.fromiter((number.setdefault(posixpath.dirname(path), len(number)) for path in paths), np.int64, len(paths))
    folders = [tuple(folder.split("/")[skip:]) if folder else () for folder in number]
    depth = _split_depth(folders, find)
    split_parts = [parts[depth] if depth is not None and len(parts) > depth else "" for parts in folders]
    kinds = np.array([split_of(part) if split_of(part) is not None else TRAIN for part in split_parts], dtype=np.uint8)
    split = settled(kinds[of_path]) if len(paths) else kinds
    labels = np.array([_label(parts, depth, find) for parts in folders], dtype=np.int64)[of_path]
    notes = _notes(folders, depth, kinds, np.bincount(of_path, minlength=len(folders)), (kinds == TEST).any())
    return (labels if (labels >= 0).any() else None), split, notes


def _label(parts: Parts, depth: int | None, find: Callable[[str], int]) -> int:
    for place in range(len(parts) - 1, -1, -1):
        serves_as_split = place == depth and split_of(parts[place]) is not None
        if not serves_as_split and (label := find(parts[place])) >= 0:
            return label
    return -1


def _split_depth(folders: Sequence[Parts], find: Callable[[str], int]) -> int | None:
    """At which depth folders stand for splits, None for nowhere."""
    around = _around(folders)
    for depth in range(around + 1):
        if any(len(parts) > depth and split_of(parts[depth]) is not None for parts in folders):
            return None if _is_class(folders, depth, find) else depth
    for depth in range(1, min(map(len, folders), default=0)):
        kinds = {split_of(parts[depth]) for parts in folders}
        if None not in kinds and TRAIN in kinds and len(kinds) > 1:
            return depth
    return None


def _around(folders: Sequence[Parts]) -> int:
    """How many folders, one in the other, hold everything."""
    first, last = min(folders, default=()), max(folders, default=())
    return next((depth for depth, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))


def _is_class(folders: Sequence[Parts], depth: int, find: Callable[[str], int]) -> bool:
    """Whether a single folder called like a split is a class: it lies beside other classes and holds none."""
    names = {parts[depth] for parts in folders if len(parts) > depth}
    splits = {name for name in names if split_of(name) is not None}
    beside = any(find(name) >= 0 for name in names - splits)
    within = any(
        len(parts) > depth and parts[depth] in splits and any(find(part) >= 0 for part in parts[depth + 1 :])
        for parts in folders
    )
    return len(splits) == 1 and beside and not within and all(find(name) >= 0 for name in splits)


def _notes(folders: Sequence[Parts], depth: int | None, kinds: np.ndarray, counts: np.ndarray, has_test: bool) -> list[str]:
    """What was made of the split folders, and which were not taken for such."""
    shared = depth is not None and depth <= _around(folders)
    used: dict[str, int] = {}
    stray: Counter[str] = Counter()
    for parts, kind, count in zip(folders, kinds.tolist(), counts.tolist()):
        if depth is not None and len(parts) > depth and split_of(parts[depth]) is not None:
            used["/".join([*(parts[:depth] if shared else "*" * depth), parts[depth]])] = kind
        if kind == TRAIN:
            inner = [place for place, part in enumerate(parts) if split_of(part) not in (None, TRAIN)]
            if inner:
                stray["/".join(parts[: inner[0] + 1])] += count
    notes = split_notes(used, has_test)
    if stray:
        notes.append(
            f"{sum(stray.values())} images in folders such as {min(stray)!r} are trained on: a folder of test images has "
            f"to be at the top, or one level down in every folder"
        )
    return notes


def split_notes(used: dict[str, int], has_test: bool) -> list[str]:
    """A line that says what became of splits by their names, none where these are plain `train` and `test`.

    Args:
        used: name of a folder or shard -> its split, before `settled`.
        has_test: whether there are test images.
    """
    if not set(used) - {"train", "test"}:
        return []
    held_out = "held out (neither trained on nor counted as test)" if has_test else "test (there is no other)"
    what = {TRAIN: "train", TEST: "test", HELD_OUT: held_out}
    lines = [f"{name!r} is {what[kind]}" for name, kind in sorted(used.items())]
    return ["splits: " + ", ".join([*lines[:SHOWN], *([f"and {len(lines) - SHOWN} more"] if lines[SHOWN:] else [])])]


# ---- what a person should know --------------------------------------------------------------------------------------


def labelled_counts(split: np.ndarray, labels: np.ndarray | None) -> dict[str, tuple[int, int]]:
    """Images of each split that has any, and how many of them have a label."""
    known = np.zeros(len(split), dtype=bool) if labels is None else labels >= 0
    counts = {
        name: (int((split == number).sum()), int(known[split == number].sum())) for number, name in enumerate(SPLIT_NAMES)
    }
    return {name: pair for name, pair in counts.items() if pair[0]}


def counts_line(counts: dict[str, tuple[int, int]]) -> str:
    """`train 80 (60 labelled), test 20 (20 labelled)`."""
    return ", ".join(f"{name} {images} ({known} labelled)" for name, (images, known) in counts.items())


def unmatched_folders(
    spec: str, paths: Sequence[str], split: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str]
) -> list[str]:
    """Folders of images without a label that are called like no class, most images first, with a hint at the class meant.

    Where a split has no label at all, nobody meant its folders for classes: only those that are nearly called like one
    are named.

    Args:
        spec: of the image list; a CSV file says its labels itself.

    Returns:
        Lines such as `'Forest' (300 images, did you mean 'forrest'?)`.
    """
    if spec.lower().endswith(".csv"):
        return []
    labels = np.full(len(paths), -1) if labels is None else labels
    has_labels = np.array([(labels[split == number] >= 0).any() for number in range(len(SPLIT_NAMES))])
    plain = {_letters(name): name for name in class_names}
    counts: Counter[tuple[str, bool]] = Counter()
    for path, label, number in zip(paths, labels.tolist(), split.tolist()):
        if label < 0 and "/" in path:
            counts[posixpath.dirname(path), bool(has_labels[number])] += 1
    folders: Counter[str] = Counter()
    hints: dict[str, str] = {}
    for (folder, names_classes), count in counts.most_common(LOOKED_AT):
        parts = folder.split("/")[spec.startswith(PREFIX) :]
        parts = [part for part in parts[::-1] if split_of(part) is None and not part.lower().endswith((".tar", ".parquet"))]
        for part in parts:
            near = difflib.get_close_matches(_letters(part), plain, n=1, cutoff=0.75)
            if near:
                hints[part] = f", did you mean {plain[near[0]]!r}?"
                folders[part] += count
                break
        else:
            if parts and names_classes:
                folders[parts[0]] += count
    lines = [f"{name!r} ({count} images{hints.get(name, '')})" for name, count in folders.most_common()]
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"{len(lines) - SHOWN} more"]


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))
