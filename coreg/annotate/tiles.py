"""Features of parts of images beside those of the whole: where an image shows several things, each fills some part of it.

A grid of side g cuts an image into g x g parts without overlap; each is preprocessed as an image is. Parts come row after
row, those of the first side first. What a tile shows is judged later, from its features (`coreg.annotate.tag_evidence`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from coreg.annotate.annotators import Annotator
from coreg.annotate.models import ModelSpec
from coreg.errors import UserError


def checked_grids(sides: Sequence[int], model: ModelSpec) -> list[int]:
    """The sides of grids in increasing order.

    Raises:
        UserError: one is 1, the image itself, or named twice, or the annotator compares no features with texts.
    """
    if min(sides) < 2 or len(set(sides)) < len(sides):
        raise UserError(f"--tiles {' '.join(map(str, sides))}: give different numbers from 2 on, such as 2 3")
    if model.kind in ("chat", "run"):
        raise UserError(f"{model.spec} compares no features with texts, so that --tiles are of no use; leave it out")
    return sorted(sides)


def tiles_of(image: Image.Image, sides: Sequence[int]) -> list[Image.Image]:
    """The parts of an image; of one that has fewer pixels than a grid has lines, some parts are the same pixels."""
    parts = []
    for side in sides:
        for row in range(side):
            for column in range(side):
                left, top = column * image.width // side, row * image.height // side
                right = max((column + 1) * image.width // side, left + 1)
                bottom = max((row + 1) * image.height // side, top + 1)
                parts.append(image.crop((left, top, right, bottom)))
    return parts


@dataclass
class _TiledPixels:
    """What an image and its parts become in a decoding process, (1 + M, ...) of what each of them becomes."""

    preprocess: Callable[[Image.Image], torch.Tensor]
    sides: Sequence[int]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.stack([self.preprocess(part) for part in [image, *tiles_of(image, self.sides)]])


class TiledAnnotator:
    """An annotator that gives `tiles` float16 (n, M, D), features of length 1 of the parts, beside what it gives of images.

    Votes, probabilities and features are those of the whole image, the same bits as without tiles.
    """

    def __init__(self, annotator: Annotator, sides: Sequence[int]) -> None:
        """Wrap an annotator whose images are one tensor each, and which has `encode`."""
        self.annotator, self.sides = annotator, sides
        self.features, self.preprocessing, self.notes = annotator.features, annotator.preprocessing, annotator.notes
        self.preprocess, self.collate = _TiledPixels(annotator.preprocess, sides), annotator.collate

    def annotate(self, batch: torch.Tensor) -> dict[str, Any]:
        """Judge n images with their parts, (n, 1 + M, ...), one pass for the images and for each of their parts."""
        whole, *parts = batch.unbind(dim=1)
        tiles = torch.stack([self.annotator.encode(part) for part in parts], dim=1)
        return self.annotator.annotate(whole) | {"tiles": tiles}
