"""Several sources of images as one: `joined:["photos/a", "photos/b"]`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from coreg.data.images import ImageList, Paths
from coreg.errors import UserError

PREFIX = "joined:"


def joined_spec(specs: Sequence[str]) -> str:
    """What `open_images` takes to open these sources one after the other."""
    return PREFIX + json.dumps(list(specs))


def joined_paths(parts: Sequence[Sequence[str]]) -> Paths:
    """The paths of all parts, `NUMBER/path`; sorted bytewise if the parts are, because all numbers are equally long."""
    width = len(str(len(parts) - 1))
    return Paths([os.fsencode(f"{number:0{width}d}/{path}") for number, part in enumerate(parts) for path in part])


@dataclass
class _Joined:
    """Pixels of several image lists."""

    parts: list[ImageList]

    def __call__(self, row: int) -> Image.Image:
        for part in self.parts:
            if row < len(part):
                return part.load(row)
            row -= len(part)
        raise IndexError(row)


def joined_labels(parts: Sequence[ImageList]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Labels int64 (N,), split uint8 (N,) and tags int8 (N, L) of image lists one after the other, in the same classes.

    Tags are None where no part has any.

    Raises:
        UserError: parts have tags of different labels.
    """
    labels = np.concatenate([np.full(len(part), -1) if part.labels is None else part.labels for part in parts])
    split = np.concatenate([part.split for part in parts])
    widths = {part.tags.shape[1] for part in parts if part.tags is not None}
    if not widths:
        return labels.astype(np.int64), split, None
    if len(widths) > 1:
        raise UserError("the sources that are joined have several labels an image, and not the same; give --classes")
    nothing = (widths.pop(),)
    tags = [np.zeros((len(part), *nothing), np.int8) if part.tags is None else part.tags for part in parts]
    return labels.astype(np.int64), split, np.concatenate(tags)


def joined_images(spec: str, open_one: Callable[[str], ImageList]) -> ImageList:
    """Open a `joined:` source.

    Args:
        spec: `joined:` and a JSON list of sources.
        open_one: opens one source, with labels in the asked-for classes.

    Raises:
        UserError: the list cannot be understood, or a source cannot be opened.
    """
    try:
        specs = json.loads(spec.removeprefix(PREFIX))
    except ValueError:
        specs = None
    if not isinstance(specs, list) or not specs or not all(isinstance(one, str) for one in specs):
        raise UserError(f'--images {spec} is no list of sources; write it like {PREFIX}["photos/a", "photos/b"]')
    if any(one.startswith(PREFIX) for one in specs):
        raise UserError(f"--images {spec} joins what is joined already; list all sources in one {PREFIX}[...]")
    parts = [open_one(one) for one in specs]
    table, split, tags = joined_labels(parts)
    names = {tuple(part.class_names or ()) for part in parts}
    own = list(names.pop()) if len(names) == 1 else []
    return ImageList(
        spec=joined_spec([part.spec for part in parts]),
        paths=joined_paths([part.paths for part in parts]),
        labels=table if (table >= 0).any() else None,
        split=split,
        class_names=own or None,
        pixels=_Joined(parts),
        notes=[f"{part.spec}: {note}" for part in parts for note in part.notes],
        tags=tags,
    )
