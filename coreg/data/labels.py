"""True labels of a few images: drawn from those that a data set has, or read from a person's own list."""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from coreg.data.images import lookup
from coreg.data.keyed import keyed_generator
from coreg.data.label_studio import answers
from coreg.errors import UserError
from coreg.plaintext import did_you_mean

NONE_OF_THESE = "none of these"  # in a list of labels: the image is of no class
NONE = -2  # its class, where -1 is an unknown one


def few_shot_draw(labels: np.ndarray, candidates_rows: np.ndarray, per_class: int, n_classes: int, seed: int) -> np.ndarray:
    """Draw the images whose true labels are given away: equally many of every class.

    A class with fewer images gives all that it has. What a class gives depends on the seed and its own images alone, and
    a larger `per_class` adds to what a smaller one draws.

    Args:
        labels: int (N,) true classes, -1 where unknown.
        candidates_rows: int (M,), the rows to draw from (the training images), in any order.
        per_class: images a class.
        n_classes: C.
        seed: of the draw.

    Returns:
        int64 (at most per_class * C,): rows, in increasing order.
    """
    rows = np.unique(candidates_rows).astype(np.int64)
    drawn = [
        keyed_generator(seed, "few-shot", index).permutation(rows[labels[rows] == index])[:per_class]
        for index in range(n_classes)
    ]
    return np.sort(np.concatenate(drawn)) if drawn else rows[:0]


def read_labels(csv_path: str, paths: Sequence[str], class_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read a person's own labels from a CSV file with the columns `path,label`; others may be there and do not count.

    Images may be left out, or have an empty label, which says nothing about them. A class may be written in other case,
    or with spaces, underscores or hyphens exchanged, where that leaves no doubt. `none of these` is the label of images of
    no class, unless a class is called so.

    Args:
        csv_path: UTF-8, with or without a byte order mark; the first line names the columns.
        paths: N image paths as the image list writes them.
        class_names: C names in order.

    Returns:
        rows int64 (n,), increasing, without repetition, and the class of each, int64 (n,), `NONE` for none of them.

    Raises:
        UserError: the file cannot be read, has no such columns or no label at all, names an unknown image or class, or
            labels an image twice in different ways.
    """
    find = lookup(class_names)
    label_of: dict[int, int] = {}
    for place, row, line in lines_of_images(csv_path, paths, ("path", "label")):
        label = line["label"].strip()
        if not label:
            continue
        index = NONE if says_none(label, find) else class_of(label, find, class_names, place)
        if (before := label_of.setdefault(row, index)) != index:
            name = NONE_OF_THESE if before == NONE else class_names[before]
            raise UserError(
                f"{place} labels {line['path']!r} as {label!r}, but a line before says {name!r}; keep one of them"
            )
    if not label_of:
        raise UserError(f"{csv_path} labels no image; write one path,label a line below the header")
    table = np.array(sorted(label_of.items()), dtype=np.int64)
    return table[:, 0], table[:, 1]


def lines_of_images(
    csv_path: str, paths: Sequence[str], columns: Sequence[str]
) -> Iterator[tuple[str, int, dict[str, str]]]:
    """The lines of a CSV file about images, one after the other.

    Args:
        csv_path: UTF-8, with or without a byte order mark; the first line names the columns.
        paths: N image paths as the image list writes them.
        columns: that the file has to have, `path` among them.

    Yields:
        Where the line is, for errors; the row of its image; what stands in each column.

    Raises:
        UserError: the file cannot be read, lacks a column or names an unknown image.
    """
    row_of = {path: row for row, path in enumerate(paths)}
    for place, line in csv_lines(csv_path, columns):
        path = line["path"]
        row = row_of.get(path, row_of.get(posixpath.normpath(path), -1))
        if row < 0:
            raise UserError(f"{place} names {path!r}, which is none of the {len(paths)} images{_near(path, paths)}")
        yield place, row, line


def csv_lines(csv_path: str, columns: Sequence[str], wanted: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of a CSV file, one after the other; or those of Label Studio's answers, a .json file (or its CSV export).

    Args:
        csv_path: UTF-8, with or without a byte order mark; the first line names the columns.
        columns: that the file has to have. wanted: what to give where it cannot be read; by default such a CSV file.

    Yields:
        Where the line is, for errors; what stands in each column.

    Raises:
        UserError: the file cannot be read or lacks a column.
    """
    if csv_path.lower().endswith(".json"):
        yield from answers(csv_path)
        return
    try:
        # file names need not be UTF-8; what is no UTF-8 finds its counterpart in the list
        with Path(csv_path).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.DictReader(file, restval="")
            names = reader.fieldnames or []
            if "choice" in names and not {"label", "labels"} & set(names):
                reader.fieldnames = [{"choice": "label"}.get(name, name) for name in names]
            missing = [name for name in columns if name not in (reader.fieldnames or [])]
            if missing:
                raise UserError(
                    f"{csv_path} has no column {missing[0]!r}: its first line is {','.join(reader.fieldnames or [])!r}, "
                    f"and has to name {','.join(columns)} separated by commas"
                )
            for line in reader:
                place = f"{csv_path} line {reader.line_num}"
                if None in line:
                    raise UserError(f"{place} has more fields than the header; put quotes around paths with commas")
                yield place, line
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        wanted = wanted or f"give a CSV file with {','.join(columns)}"
        raise UserError(f"cannot read {csv_path}: {reason}; {wanted}") from None


def says_none(label: str, find: Callable[[str], int]) -> bool:
    """Whether a label says that the image is of no class, which no class is called like."""
    return find(label) < 0 and lookup([NONE_OF_THESE])(label) == 0


def class_of(name: str, find: Callable[[str], int], class_names: Sequence[str], place: str) -> int:
    """The class that a person named at this place, by `find` of `lookup(class_names)`.

    Raises:
        UserError: there is no such class.
    """
    index = find(name)
    if index < 0:
        hint = did_you_mean(name, class_names, form=repr)
        raise UserError(f"{place} has the label {name!r}, which is none of the class names{hint}")
    return index


def _near(path: str, paths: Sequence[str]) -> str:
    """A hint at the image that was meant: one of the same file name, or else one written alike."""
    name = path.replace("\\", "/").rsplit("/", 1)[-1]
    same_name = [known for known in paths if known.rsplit("/", 1)[-1] == name]
    return did_you_mean(path, same_name or paths, 0.0 if same_name else 0.6, repr)
