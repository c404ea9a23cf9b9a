"""Random crops and flips of single images for models that bring their own preprocessing, each a function of its key.

The crop is that of torchvision's `RandomResizedCrop` (Szegedy et al., 2015: 8 to 100 % of the area, aspect ratio 3/4 to
4/3), which CoOp and CLIP-LoRA train with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from coreg.data.decode import UnreadableImage, no_longer_readable
from coreg.data.images import ImageList
from coreg.data.keyed import keyed_uniform

TRIES = 10  # boxes that are drawn before the largest central one is taken
RATIOS = (3 / 4, 4 / 3)
DRAWS = 4 * TRIES + 1  # uniform numbers a view


@dataclass(frozen=True)
class RandomView:
    """What a training view may do to an image."""

    area: float  # smallest share of the image that a crop keeps; at 1 nothing is cropped
    flip: bool  # mirror every other view
    size: int | None  # side to which a crop is resized, in pixels; None leaves it to the model

    @property
    def random(self) -> bool:
        """Whether two views of an image can differ."""
        return self.area < 1 or self.flip

    def __call__(self, image: Image.Image, draws: np.ndarray) -> Image.Image:
        """A view of `image` for uniform numbers (DRAWS,)."""
        if self.area < 1:
            left, top, width, height = crop_box(image.width, image.height, self.area, draws)
            image = image.crop((left, top, left + width, top + height))
            if self.size is not None:
                image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        mirrored = self.flip and draws[-1] >= 0.5
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def crop_box(width: int, height: int, area: float, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random crop: the first of ten random boxes that lies within the image.

    Each box has an area uniform between `area` and 1 of the image's and a ratio log-uniform between 3/4 and 4/3. Where
    none fits, it is the largest central box of a ratio in that range.
    """
    low, high = map(math.log, RATIOS)
    for share, ratio, x, y in draws[: 4 * TRIES].reshape(TRIES, 4).tolist():
        target, ratio = width * height * (area + (1 - area) * share), math.exp(low + (high - low) * ratio)
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    w = min(width, round(height * RATIOS[1]))
    h = min(height, round(width / RATIOS[0]))
    return (width - w) // 2, (height - h) // 2, w, h


class Photos:
    """Images of a store by row, decoded in threads and prepared by a model's own preprocessing."""

    def __init__(
        self, images: ImageList, preprocess: Callable[[Image.Image], Any], view: RandomView, seed: int, workers: int
    ) -> None:
        """Start the threads; nothing is decoded yet.

        Args:
            images: of the store.
            preprocess: PIL image -> what a model takes.
            view: of training images. seed: of the views. workers: threads.
        """
        self.images, self.preprocess, self.random_view, self.seed = images, preprocess, view, seed
        # Pillow releases the interpreter's lock while it decodes and resizes
        self.pool = ThreadPoolExecutor(max_workers=max(1, workers))

    def plain(self, rows: np.ndarray) -> list[Any]:
        """Preprocessed images of rows int64 (n,).

        Raises:
            UserError: some of them cannot be read any more.
        """
        return self._prepared(rows, lambda image, _: self.preprocess(image), rows)

    def views(self, rows: np.ndarray, number: int) -> list[Any]:
        """Preprocessed random views of rows int64 (n,); a view depends on the seed, its `number` and the row alone.

        Raises:
            UserError: some of the images cannot be read any more.
        """
        draws = keyed_uniform((self.seed, "view", number), torch.from_numpy(rows), DRAWS).double().numpy()
        return self._prepared(rows, lambda image, drawn: self.preprocess(self.random_view(image, drawn)), draws)

    def read(self, rows: np.ndarray) -> None:
        """Read the images of rows int64 (n,) and do nothing with them.

        Raises:
            UserError: some of them cannot be read any more.
        """
        self._prepared(rows, lambda image, _: None, rows)

    def _prepared(self, rows: np.ndarray, prepare: Callable[[Image.Image, Any], Any], each: np.ndarray) -> list[Any]:
        failed: dict[int, str] = {}

        def one(row: int, more: Any) -> Any:
            try:
                image = self.images.load(row)
            except UnreadableImage as error:
                failed[row] = str(error)
                return None
            return prepare(image, more)

        prepared = list(self.pool.map(one, rows.tolist(), each))
        if failed:
            raise no_longer_readable(self.images, failed)
        return prepared
