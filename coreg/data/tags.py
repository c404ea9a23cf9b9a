"""Images with several labels, or none: what a person's own list says of each label of an image.

Labels of N images are int8 (N, L) everywhere: +1 the image has the label, -1 it has not, 0 nobody knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coreg.data.images import lookup, translated
from coreg.data.label_studio import BETWEEN
from coreg.data.labels import class_of, csv_lines, lines_of_images
from coreg.errors import UserError
from coreg.plaintext import did_you_mean

PRESENT, UNKNOWN, ABSENT = 1, 0, -1
LIST, ABSENT_LIST = "labels", "absent"  # columns whose fields are lists of names
RESERVED = ("path", "split")
WRITTEN = {"1": PRESENT, "0": ABSENT, "": UNKNOWN}


def read_tags(csv_path: str, paths: Sequence[str], class_names: Sequence[str], all_listed: bool = False) -> np.ndarray:
    """Read what a person knows of the labels of images from a CSV file.

    Either there is a column `labels` with the names of the labels that an image has, `;` between them, and perhaps one
    `absent`, with those that it has not; or there is a column for every label, named after it, with 1 where the image has
    it, 0 where it has not, and nothing where the person does not know. Lines about the same image add up.

    Args:
        csv_path: UTF-8; the first line names the columns, `path` among them. Columns that are neither do not count.
        paths: N image paths as the image list writes them. class_names: L names in order.
        all_listed: `labels` names all labels of an image, so that it has no other; an empty field says that it has none.

    Returns:
        int8 (N, L) as above; 0 for images that the file leaves out.

    Raises:
        UserError: the file cannot be read, says nothing, contradicts itself, or names an unknown image or label.
    """
    find = lookup(class_names)
    table = np.zeros((len(paths), len(class_names)), dtype=np.int8)
    columns: dict[str, int] | None = None
    for place, row, line in lines_of_images(csv_path, paths, ("path",)):
        if columns is None:
            columns = {} if LIST in line else _columns(csv_path, list(line), class_names)
        known = np.zeros(len(class_names), dtype=np.int8)
        if LIST in line:
            for column, state in ((LIST, PRESENT), (ABSENT_LIST, ABSENT)):
                for name in filter(None, map(str.strip, line.get(column, "").split(BETWEEN))):
                    index = class_of(name, find, class_names, place)
                    if known[index] == -state:
                        raise _contradiction(place, line["path"], class_names[index])
                    known[index] = state
            if all_listed:
                known[known == UNKNOWN] = ABSENT
        for column, index in columns.items():
            written = line[column].strip()
            if written not in WRITTEN:
                raise UserError(f"{place} has {written!r} in the column {column!r}; write 1, 0 or nothing")
            known[index] = WRITTEN[written]
        (against,) = np.nonzero((known * table[row]) < 0)
        if len(against):
            raise _contradiction(place, line["path"], class_names[against[0]])
        table[row] = np.where(known == UNKNOWN, table[row], known)
    if not table.any():
        raise UserError(f"{csv_path} says nothing of any label; write a line for each image below the header")
    return table


def names_in(csv_path: str) -> list[str]:
    """The labels that such a file names: its columns in order, or the names in its lists sorted.

    Raises:
        UserError: it cannot be read.
    """
    lines = [line for _, line in csv_lines(csv_path, ("path",))]
    if lines and LIST not in lines[0]:
        return [name for name in lines[0] if name not in RESERVED]
    written = {name.strip() for line in lines for name in f"{line[LIST]};{line.get(ABSENT_LIST, '')}".split(BETWEEN)}
    return sorted(written - {""})


def translated_tags(tags: np.ndarray, own: Sequence[str], wanted: Sequence[str] | None) -> np.ndarray | None:
    """Labels (N, L) of a data set with label names `own`, expressed in the labels `wanted`, as `translated` does it.

    Returns:
        int8 (N, number of `wanted`), 0 for labels that the data set does not have; None when nothing corresponds.
    """
    if wanted is None:
        return tags
    column = translated(np.arange(len(own)), own, wanted)
    if column is None:
        return None
    table = np.zeros((len(tags), len(wanted)), dtype=np.int8)
    table[:, column[column >= 0]] = tags[:, column >= 0]
    return table


def _contradiction(place: str, path: str, name: str) -> UserError:
    return UserError(f"{place} contradicts what is written of {path!r} and the label {name!r} before; keep one of them")


def _columns(csv_path: str, header: Sequence[str], class_names: Sequence[str]) -> dict[str, int]:
    """Column -> label, of those that are named after labels.

    Raises:
        UserError: none is, two are named after one label, or one is nearly named after a label that has no column.
    """
    find = lookup(class_names)
    columns = {name: find(name) for name in header if name not in RESERVED and find(name) >= 0}
    free = [name for index, name in enumerate(class_names) if index not in columns.values()]
    if len(set(columns.values())) < len(columns):
        raise UserError(f"{csv_path} has two columns for one label: {', '.join(columns)}; keep one of them")
    for name in header:
        if name not in {*columns, *RESERVED} and (hint := did_you_mean(name, free, 0.8, repr)):
            raise UserError(f"{csv_path} has the column {name!r}, which is no label{hint}")
    if not columns:
        raise UserError(
            f"{csv_path} has neither a column 'labels' nor one named after a label: its first line is "
            f"{','.join(header)!r}; write path,labels with {BETWEEN!r} between the names of labels"
        )
    return columns
