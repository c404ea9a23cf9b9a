"""Text lists of images, `path label` a line, as Places-LT and ImageNet-LT come (Liu et al., CVPR 2019)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coreg.data.decode import Files
from coreg.data.images import TEST, TRAIN, ImageList, Paths, absolute_path, path_within
from coreg.errors import UserError

WANTED = "write `path label` a line, the path as seen from the folder of the list and the label as a number from 0 on"


def listed_images(spec: str, class_names: Sequence[str] | None) -> ImageList:
    """The images of a text list.

    Args:
        spec: the list; one called `...train...` brings the list called `...test...` beside it, which is the test split.
        class_names: the classes in the order that labels count; without them labels say nothing.

    Raises:
        UserError: a list cannot be read, or a line is wrong.
    """
    path = absolute_path(spec)
    lists = {path: TEST if "test" in path.name.lower() else TRAIN}
    beside = path.with_name(path.name.replace("train", "test"))
    if beside != path and beside.is_file():
        lists[beside] = TEST
    entries: dict[str, tuple[int, int]] = {}
    for file, split in lists.items():
        for place, name, label in _lines(file):
            if name in entries:
                raise UserError(f"{place} names {name!r} a second time; list every image once")
            if class_names is not None and label >= len(class_names):
                raise UserError(
                    f"{place} has the label {label}, and there are {len(class_names)} class names; give one for each, in "
                    f"the order of the labels"
                )
            entries[name] = (label, split)
    if not entries:
        raise UserError(f"{spec} lists no image; {WANTED}")
    names = sorted(entries, key=os.fsencode)
    labels, split = np.array([entries[name] for name in names], dtype=np.int64).T
    paths = Paths([os.fsencode(name) for name in names])
    known = None if class_names is None else labels
    return ImageList(str(path), paths, known, split.astype(np.uint8), None, Files(path.parent, paths))


def _lines(file: Path) -> list[tuple[str, str, int]]:
    """Of each line that is not blank: where it stands, the path and the label."""
    try:
        text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; {WANTED}") from None
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place, parts = f"{file} line {number}", line.strip().rsplit(maxsplit=1)
        if len(parts) != 2 or not (parts[1].isascii() and parts[1].isdigit() and len(parts[1]) < 10):
            raise UserError(f"{place} is {line.strip()[:80]!r}; {WANTED}")
        lines.append((place, path_within(parts[0], f"{place} names"), int(parts[1])))
    return lines
