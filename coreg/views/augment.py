"""Augmentation of a whole uint8 batch at once, every row with its own parameters.

Parameters are hashes of (key, sample index) (see `coreg.data.keyed`): an image gets the same pixels whatever batch,
process or device it is drawn in. They are drawn on the CPU, where the host can read them for nothing, and only small
tensors of them travel to the device of the images; nothing ever waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from coreg.data.keyed import keyed_uniform
from coreg.views.augment_geometry import (
    RESIZED_CROP_DRAWS,
    crop_and_flip,
    cut_out_square,
    draw_boxes,
    random_resized_crop,
)
from coreg.views.augment_ops import send
from coreg.views.operations import RANDAUGMENT
from coreg.views.policies import AUTO_AUGMENT_DRAWS, COLOUR_JITTER_DRAWS, auto_augment, colour_jitter, random_augment

_CUTOUT_COLOUR = (125, 123, 114)
_CUTOUT_GREY = (123,)  # the luma of that colour
_PICO_OPS = 3  # operations of RandomAugment in PiCO's strong view
_PICO_SCALE, _CLIP_SCALE = (0.2, 1.0), (0.08, 1.0)  # smallest and largest part of the area in a resized crop

# columns, and the purpose that they are drawn for -> uniform draws (n, columns) on the CPU
Draw = Callable[..., Tensor]

# Columns of a row's uniform draws. Every parameter owns its column, so that switching one off moves no other.
_TOP, _LEFT, _FLIP, _SIDE, _CENTRE_X, _CENTRE_Y, _FIXED_X, _FIXED_Y, _FIRST_OP = range(9)


@dataclass(frozen=True)
class Augmentation:
    """Views of batches of square uint8 images; `VIEWS` has the kinds.

    Raises:
        ValueError: a field is out of its range.
    """

    size: int  # height and width of the views, pixels
    padding: int  # pixels around an image before the random crop back to `size`: zeros, or its reflection in CR's views
    flip: bool  # flip horizontally with probability 1/2, in every kind of view that has flips
    strong_ops: tuple[str, ...] = tuple(RANDAUGMENT)  # what strong views draw from, names of `RANDAUGMENT` in any order
    strong_count: int = 1  # how many operations a `strong` view gets, drawn uniformly with replacement
    # a strong view loses a square whose side is uniform in [0, cutout * size], centred anywhere, clipped to the image,
    # filled with (125, 123, 114), or the luma of this colour where c = 1; 0: none
    cutout: float = 0.5
    # a strong view loses a square of this side, centred anywhere, clipped, filled with 0 before the normalisation (DeVries
    # and Taylor, 2017); 0: none
    cutout_fixed: int = 0
    _: KW_ONLY
    mean: tuple[float, ...]  # of every channel, for images in [0, 1]
    std: tuple[float, ...]  # likewise

    def __post_init__(self) -> None:
        unknown = sorted(set(self.strong_ops) - set(RANDAUGMENT))
        if unknown:
            raise ValueError(f"unknown operation {unknown[0]!r}; the operations are {', '.join(RANDAUGMENT)}")
        if self.strong_count < 0 or (self.strong_count and not self.strong_ops):
            raise ValueError(f"strong_count is {self.strong_count} with {len(self.strong_ops)} operations to draw from")
        if not 1 <= self.size <= 8192 or self.padding < 0 or self.cutout_fixed < 0 or not 0 <= self.cutout <= 1:
            raise ValueError(f"a size, padding or cutout is out of range in {self}")
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std}: one or three channels need a mean and a std > 0 each")

    def view(
        self, kind: str, images: Tensor, samples: Tensor, key: Sequence[int | str], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A random view of every image, normalised.

        Args:
            kind: a name in `VIEWS`, whose functions say what is done.
            images: uint8 (n, c, size, size) on any device; those in `RESIZED_VIEWS` take squares of any other side, too.
            samples: int64 (n,), sample indices. Keep them on the CPU: fetching them from a GPU waits for the device.
            key: names the view, e.g. `(seed, "train", epoch, "net1", "weak1")`: views that are to differ need keys that
                differ. Kinds share parameters under the same key; `strong` has the crops and flips of `weak`.
            dtype: of the result.

        Returns:
            (n, c, size, size), contiguous, on the device of the images.

        Raises:
            ValueError: there is no such kind, or images or samples have the wrong shape or type.
        """
        return self.views(kind, images, [(samples, key)], dtype)

    def views(
        self,
        kind: str,
        images: Tensor,
        blocks: Sequence[tuple[Tensor, Sequence[int | str]]],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Views under several keys at once, the same pixels as one `view` for each, in a fraction of the calls to a GPU.

        Args:
            images: of all blocks, one block after another. blocks: samples int64 and key of each. kind, dtype: see `view`.

        Raises:
            ValueError: as `view`.
        """
        if kind not in VIEWS:
            raise ValueError(f"unknown view {kind!r}; the views are {', '.join(VIEWS)}")
        self._check(images, images.shape[-1] if kind in RESIZED_VIEWS else self.size)
        counts = [samples.shape for samples, _ in blocks]
        if any(len(shape) != 1 for shape in counts) or sum(map(len, (samples for samples, _ in blocks))) != len(images):
            raise ValueError(
                f"{len(images)} images need as many sample indices, got {', '.join(str(tuple(n)) for n in counts)}"
            )
        where = [(samples.cpu(), tuple(key)) for samples, key in blocks]

        def draw(columns: int, *purpose: str) -> Tensor:
            return torch.cat([keyed_uniform((*key, *purpose), samples, columns) for samples, key in where])

        return self.plain(VIEWS[kind](self, images, draw), dtype)

    def weak(self, images: Tensor, rows: Tensor, key: Sequence[int | str], dtype: torch.dtype = torch.float32) -> Tensor:
        """`view("weak", ...)`: random crop with zero padding and horizontal flip."""
        return self.view("weak", images, rows, key, dtype)

    def strong(self, images: Tensor, rows: Tensor, key: Sequence[int | str], dtype: torch.dtype = torch.float32) -> Tensor:
        """`view("strong", ...)`: the weak geometry, then `strong_count` operations, then cutout."""
        return self.view("strong", images, rows, key, dtype)

    def plain(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalised and otherwise as they are, uint8 (n, c, size, size): what evaluation sees."""
        self._check(images, self.size)
        mean, std = torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)
        scale, shift = send(torch.stack([1 / (255 * std), -mean / std]).float(), images.device).view(2, -1, 1, 1)
        return images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift).to(dtype)

    def _check(self, images: Tensor, side: int) -> None:
        shape = (len(self.mean), side, side)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(f"expected uint8 images (n, *{shape}), got {images.dtype} {tuple(images.shape)}")

    def _resized_crop(self, images: Tensor, draw: Draw, scale: tuple[float, float], kernel: str) -> Tensor:
        draws = draw(RESIZED_CROP_DRAWS, "resized crop")
        return random_resized_crop(images, draws, self.size, scale, self.flip, kernel)

    def _strengthen(self, images: Tensor, draws: Tensor) -> Tensor:
        """RandomAugment with the operations of the columns from `_FIRST_OP` on, then cutout."""
        images = random_augment(images, draws[:, _FIRST_OP:], self.strong_ops)
        if self.cutout:
            images = draw_boxes(images, *self._cutout_boxes(draws.double()))
        if self.cutout_fixed:
            images = cut_out_square(images, draws[:, [_FIXED_X, _FIXED_Y]], self.cutout_fixed)
        return images

    def _cutout_boxes(self, draws: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Boxes (as `draw_boxes` takes them) and colour; the last column and line count, as in Pillow's rectangles."""
        side = (draws[:, _SIDE] * self.cutout * self.size).unsqueeze(1)
        first = (draws[:, [_CENTRE_X, _CENTRE_Y]] * self.size - side / 2).clamp(min=0).floor()
        last = torch.where(side > 0, (first + side).floor(), first - 1)
        return torch.cat([first, last], 1).long(), (_CUTOUT_COLOUR if len(self.mean) == 3 else _CUTOUT_GREY)


# --- kinds of views: (augmentation, images uint8, draw) -> uint8 (n, c, size, size) ----------------------------


def _weak(augmentation: Augmentation, images: Tensor, draw: Draw) -> Tensor:
    draws = draw(_FLIP + 1)
    return crop_and_flip(images, draws, augmentation.padding, augmentation.flip)


def _strong(augmentation: Augmentation, images: Tensor, draw: Draw) -> Tensor:
    draws = draw(_FIRST_OP + 2 * augmentation.strong_count)
    return augmentation._strengthen(crop_and_flip(images, draws, augmentation.padding, augmentation.flip), draws)


def _pico_weak(augmentation: Augmentation, images: Tensor, draw: Draw) -> Tensor:
    """PiCO's queries: resized crop, flip, ColorJitter(0.4, 0.4, 0.4, 0.1) with chance 0.8, grey with chance 0.2."""
    images = augmentation._resized_crop(images, draw, _PICO_SCALE, "bilinear")
    return colour_jitter(images, draw(COLOUR_JITTER_DRAWS, "colour"))


def _pico_strong(augmentation: Augmentation, images: Tensor, draw: Draw) -> Tensor:
    """PiCO's keys: resized crop, flip, three operations of RandomAugment, cutout."""
    images = augmentation._resized_crop(images, draw, _PICO_SCALE, "bilinear")
    draws = draw(_FIRST_OP + 2 * (_PICO_OPS if augmentation.strong_ops else 0))
    return augmentation._strengthen(images, draws)


def _cr_weak(augmentation: Augmentation, images: Tensor, draw: Draw) -> Tensor:
    """Flip and crop with reflected padding, of CR (Wu, Wang and Zhang, ICML 2022)."""
    draws = draw(_FLIP + 1)
    return crop_and_flip(images, draws, augmentation.padding, augmentation.flip, reflect=True)


def _cr_policy(augmentation: Augmentation, images: Tensor, draw: Draw, side: int, policy: str) -> Tensor:
    """A black square whose side is given for images of 32 pixels, then AutoAugment."""
    draws = draw(_FIXED_Y + 1)
    images = cut_out_square(images, draws[:, [_FIXED_X, _FIXED_Y]], side * augmentation.size // 32)
    return auto_augment(images, draw(AUTO_AUGMENT_DRAWS, "policy"), policy)


def _cr_strong(augmentation: Augmentation, images: Tensor, draw: Draw) -> Tensor:
    """CR's strong view of CIFAR: the weak one, Cutout(16), AutoAugment's CIFAR-10 policy."""
    return _cr_policy(augmentation, _cr_weak(augmentation, images, draw), draw, 16, "cifar10")


def _cr_strong_svhn(augmentation: Augmentation, images: Tensor, draw: Draw) -> Tensor:
    """CR's strong view of SVHN, whose weak one is plain: Cutout(20), AutoAugment's SVHN policy."""
    return _cr_policy(augmentation, images, draw, 20, "svhn")


def _clip_train(augmentation: Augmentation, images: Tensor, draw: Draw) -> Tensor:
    """What CoOp and CLIP-LoRA train on: bicubic resized crop and flip."""
    return augmentation._resized_crop(images, draw, _CLIP_SCALE, "bicubic")


VIEWS: dict[str, Callable[[Augmentation, Tensor, Draw], Tensor]] = {
    "plain": lambda augmentation, images, draw: images,
    "weak": _weak,
    "strong": _strong,
    "pico_weak": _pico_weak,
    "pico_strong": _pico_strong,
    "cr_weak": _cr_weak,
    "cr_strong": _cr_strong,
    "cr_strong_svhn": _cr_strong_svhn,
    "clip_train": _clip_train,
}
RESIZED_VIEWS = ("pico_weak", "pico_strong", "clip_train")
