"""Answers in label_next.csv: read from the run folder, and merged into what stands there."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from coreg.data.images import lookup
from coreg.data.labels import class_of, csv_lines, says_none
from coreg.data.tags import ABSENT_LIST, BETWEEN, LIST
from coreg.files import writing_csv
from coreg.label.page import LabelPage, write_label_next

Answer = Sequence[int] | None  # classes in order, empty for none of them; None where there is no answer


def read_answers(path: Path, shown: LabelPage) -> list[list[int] | None]:
    """The answers that the file holds for each image of the page; the file is made where it is missing.

    Raises:
        UserError: it cannot be read or written, or names an unknown class.
    """
    if not path.exists():
        write_label_next(path, shown)
    find, number = lookup(shown.class_names), _numbers(shown)
    answers: list[list[int] | None] = [None] * len(shown.images)
    for place, line in csv_lines(str(path), shown.columns):
        if (index := number(line["path"])) is None:
            continue
        if shown.several:
            names = list(filter(None, map(str.strip, line[LIST].split(BETWEEN))))
            if names or line[ABSENT_LIST].strip():
                answers[index] = sorted({class_of(name, find, shown.class_names, place) for name in names})
        elif label := line["label"].strip():
            none = says_none(label, find)
            answers[index] = [] if none else [class_of(label, find, shown.class_names, place)]
    return answers


def merge_answers(path: Path, shown: LabelPage, changed: Mapping[int, Answer]) -> None:
    """Write answers into the file, whole or not at all; whatever else stands there stays as it is.

    Args:
        changed: number of the image on the page -> its answer.

    Raises:
        UserError: the file cannot be read or written.
    """
    if not path.exists():
        write_label_next(path, shown)
    number, missing = _numbers(shown), set(changed)
    lines = [line for _, line in csv_lines(str(path), shown.columns)]
    for line in lines:
        index = number(line["path"])
        if index in changed:
            line.update(zip(shown.columns[1:], shown.cells(changed[index])))
            missing.discard(index)
    for index in sorted(missing):
        lines.append(dict(zip(shown.columns, [shown.images[index].path, *shown.cells(changed[index])])))
    columns = list(dict.fromkeys([*(lines[0] if lines else shown.columns)]))
    with writing_csv(path) as write:
        write(columns)
        for line in lines:
            write([line.get(column, "") for column in columns])


def _numbers(shown: LabelPage) -> Callable[[str], int | None]:
    """A function from a path of the file to the number of the image on the page, None where it is not there."""
    known = {asked.path: index for index, asked in enumerate(shown.images)}
    return lambda path: known.get(path, known.get(posixpath.normpath(path)))
