"""Augmentation of a whole uint8 batch at once, every row with its own parameters.

Parameters are hashes of (key, sample index) (see `coreg.data.keyed`): an image gets the same pixels whatever batch,
process or device it is drawn in. They are drawn on the CPU, where the host can read them for nothing, and only small
tensors of them travel to the device of the images; nothing ever waits for the device.

The operations are those of RandomAugment as used with partial labels (PiCO, Wang et al., ICLR 2022; after RandAugment,
Cubuk et al., 2020) and reproduce Pillow's arithmetic: ImageOps, ImageEnhance and nearest-neighbour affine transforms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from coreg.data.keyed import keyed_uniform

_LUMA = (19595, 38470, 7471)  # ITU-R 601-2 weights in 16-bit fixed point, as Pillow's "L" mode
_CUTOUT_COLOUR = (125, 123, 114)
_CUTOUT_GREY = 123  # the luma of that colour


def _send(values: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return values.to(device, non_blocking=True)


def _per_row(values: Tensor, images: Tensor) -> Tensor:
    """One value a row, (m,) on the CPU -> (m, 1, 1, 1) beside the images."""
    return _send(values, images.device).view(-1, 1, 1, 1)


# --- operations: (images uint8 (m, c, h, w), magnitudes float64 (m,) on the CPU) -> uint8 (m, c, h, w) ---------------


def _identity(images: Tensor, magnitudes: Tensor) -> Tensor:
    return images


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """Every pixel through the table of its row and channel, (m, c, 256) with entries in [0, 255]."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def _auto_contrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Stretch every channel to [0, 255]; a constant channel stays. In float64, as Python computes Pillow's table."""
    flat = images.flatten(2)
    low, high = flat.amin(2, keepdim=True).double(), flat.amax(2, keepdim=True).double()
    scale = torch.full_like(low, 255) / (high - low)  # `255 / tensor` multiplies by a reciprocal: other last bits
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    return _look_up(images, torch.where(high > low, (levels * scale + (-low * scale)).clamp_(0, 255), levels))


def _equalize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Histogram equalisation of every channel with integer steps; too few different pixels leave it alone."""
    flat = images.flatten(2).long()
    histogram = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = histogram.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    below = histogram.cumsum(2) - histogram
    table = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    return _look_up(images, torch.where(step > 0, table, torch.arange(256, device=images.device)))


def _posterize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Keep the int(magnitude) highest bits."""
    dropped = 8 - magnitudes.long()
    return images & _per_row((256 - (1 << dropped)).to(torch.uint8), images)


def _solarize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Invert the pixels that are not below the threshold."""
    reached = images.short() >= _per_row(magnitudes.ceil().short(), images)
    return images ^ (reached.view(torch.uint8) * 255)


def _luma(images: Tensor) -> Tensor:
    """Grey level of every pixel, uint8 (m, 1, h, w)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (images[:, i : i + 1].int() * weight for i, weight in enumerate(_LUMA))
    return ((red + green + blue + 0x8000) >> 16).to(torch.uint8)


def _blend(degenerate: Tensor | int, images: Tensor, magnitudes: Tensor) -> Tensor:
    """degenerate + magnitude * (image - degenerate) in float32, cut off to an integer, as Pillow's blend."""
    base = degenerate.float() if isinstance(degenerate, Tensor) else degenerate
    return ((images.float() - base) * _per_row(magnitudes.float(), images) + base).to(torch.uint8)


def _brightness(images: Tensor, magnitudes: Tensor) -> Tensor:
    return _blend(0, images, magnitudes)


def _color(images: Tensor, magnitudes: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else _blend(_luma(images), images, magnitudes)


def _contrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    pixels = images.shape[2] * images.shape[3]
    total = _luma(images).sum((1, 2, 3), keepdim=True)
    return _blend((2 * total + pixels) // (2 * pixels), images, magnitudes)


def _sharpness(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Towards the 3x3 smoothing (centre 5, neighbours 1, sum 13); the outermost pixels have no neighbours and stay."""
    smooth = images.float()
    if min(images.shape[2:]) >= 3:
        rows = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
        box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        inner = smooth[:, :, 1:-1, 1:-1]
        inner.copy_(((box + 4 * inner) / 13 + 0.5).floor_())
    return _blend(smooth, images, magnitudes)


def _affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Nearest-neighbour affine transform with black outside, in Pillow's 16.16 fixed point.

    matrices: float64 (m, 6) on the CPU; the centre of output pixel (x, y) comes from (a x + b y + c, d x + e y + f).
    """
    count, channels, height, width = images.shape
    a, b, c, d, e, f = matrices.unbind(1)
    fixed = torch.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2])
    fixed = _send((fixed * 65536 + 0.5).floor().to(torch.int32), images.device).view(6, -1, 1, 1)
    x = torch.arange(width, dtype=torch.int32, device=images.device)
    y = torch.arange(height, dtype=torch.int32, device=images.device).unsqueeze(1)
    from_x = (fixed[0] * x + (fixed[1] * y + fixed[2])) >> 16
    from_y = (fixed[3] * x + (fixed[4] * y + fixed[5])) >> 16
    near_x, near_y = from_x.clamp(0, width - 1), from_y.clamp(0, height - 1)
    inside = (near_x == from_x).view(torch.uint8) * (near_y == from_y).view(torch.uint8)
    source = near_y.mul_(width).add_(near_x).view(count, 1, height * width).long()
    moved = images.flatten(2).gather(2, source.expand(-1, channels, -1))
    return moved.mul_(inside.view(count, 1, height * width)).view_as(images)


def _matrices(magnitudes: Tensor, **entries: Tensor) -> Tensor:
    """float64 (m, 6) rows a..f: the identity, but for the named entries."""
    matrices = magnitudes.new_tensor([1, 0, 0, 0, 1, 0]).repeat(len(magnitudes), 1)
    for name, values in entries.items():
        matrices[:, "abcdef".index(name)] = values
    return matrices


def _rotate(magnitudes: Tensor, size: int) -> Tensor:
    """Counter-clockwise by so many degrees about the centre of the image."""
    angle, half = magnitudes * (-math.pi / 180), size / 2
    cos, sin = angle.cos(), angle.sin()
    return _matrices(angle, a=cos, b=sin, c=half - cos * half - sin * half, d=-sin, e=cos, f=half + sin * half - cos * half)


# name -> (function, lowest magnitude, highest magnitude); the magnitude is uniform between the two.
# Operations on pixels: (images uint8 (m, c, size, size), magnitudes float64 (m,) on the CPU) -> uint8.
PIXEL_OPS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float]] = {
    "auto_contrast": (_auto_contrast, 0.0, 1.0),
    "brightness": (_brightness, 0.05, 0.95),
    "color": (_color, 0.05, 0.95),
    "contrast": (_contrast, 0.05, 0.95),
    "equalize": (_equalize, 0.0, 1.0),
    "identity": (_identity, 0.0, 1.0),
    "posterize": (_posterize, 4.0, 8.0),
    "sharpness": (_sharpness, 0.05, 0.95),
    "solarize": (_solarize, 0.0, 256.0),
}
# Operations that move pixels: (magnitudes, size) -> matrices of `_affine`, which moves all rows of a batch at once.
AFFINE_OPS: dict[str, tuple[Callable[[Tensor, int], Tensor], float, float]] = {
    "rotate": (_rotate, -30.0, 30.0),
    "shear_x": (lambda shares, size: _matrices(shares, b=shares), -0.3, 0.3),
    "shear_y": (lambda shares, size: _matrices(shares, d=shares), -0.3, 0.3),
    "translate_x": (lambda shares, size: _matrices(shares, c=shares * size), -0.3, 0.3),
    "translate_y": (lambda shares, size: _matrices(shares, f=shares * size), -0.3, 0.3),
}
RANDAUGMENT = (*PIXEL_OPS, *AFFINE_OPS)

# Columns of a row's uniform draws. Every parameter owns its column, so that switching one off moves no other.
_TOP, _LEFT, _FLIP, _SIDE, _CENTRE_X, _CENTRE_Y, _FIXED_X, _FIXED_Y, _FIRST_OP = range(9)


def _crop_and_flip(images: Tensor, draws: Tensor, padding: int, flip: bool) -> Tensor:
    """Zero-padded random crop of the images' own size, then a horizontal flip with probability 1/2, in one gather.

    The padded images lie in one buffer, mirrored where they are to be flipped; a row of an output image is `width`
    neighbouring bytes of it, so the gather copies runs of bytes and needs one index per image row, not one per pixel.
    """
    count, channels, height, width = images.shape
    if not count or not (padding or flip):
        return images
    tall, wide = height + 2 * padding, width + 2 * padding
    offsets = (draws[:, [_TOP, _LEFT]] * (2 * padding + 1)).long()
    mirrored = (draws[:, _FLIP] >= 0.5) & flip
    left = torch.where(mirrored, 2 * padding - offsets[:, 1], offsets[:, 1])
    # Straight images first: known on the host, so that the device copies two blocks and selects nothing.
    order = mirrored.to(torch.uint8).argsort(stable=True)
    straight = count - int(mirrored.sum())
    ordered = images.index_select(0, _send(order, images.device))
    buffer = images.new_zeros(count, channels, tall, wide)
    inner = buffer[:, :, padding : padding + height, padding : padding + width]
    inner[:straight] = ordered[:straight]
    inner[straight:] = ordered[straight:].flip(3)
    first = order.argsort() * (channels * tall * wide) + offsets[:, 0] * wide + left
    lines = torch.arange(channels, device=images.device).unsqueeze(1) * tall
    lines = (lines + torch.arange(height, device=images.device)) * wide
    start = _send(first, images.device).view(-1, 1) + lines.view(1, -1)
    runs = buffer.view(-1).as_strided((buffer.numel() - width + 1, width), (1, 1))
    return runs.index_select(0, start.view(-1)).view_as(images)


def _draw_boxes(images: Tensor, boxes: Tensor, colour: Sequence[int]) -> Tensor:
    """Fill one box per row. boxes: int64 (n, 4) on the CPU, first x, first y, last x, last y, all inclusive."""
    x0, y0, x1, y1 = _send(boxes.t().contiguous(), images.device).view(4, -1, 1)
    column = torch.arange(images.shape[3], device=images.device)
    line = torch.arange(images.shape[2], device=images.device)
    lines, columns = (line >= y0) & (line <= y1), (column >= x0) & (column <= x1)
    hole = (lines.view(torch.uint8).unsqueeze(2) * columns.view(torch.uint8).unsqueeze(1)).unsqueeze(1)
    kept = images * (1 - hole)
    if not any(colour):
        return kept
    fill = _send(torch.tensor(colour, dtype=torch.uint8), images.device)
    return kept.add_(hole * fill.view(1, -1, 1, 1))


@dataclass(frozen=True)
class Augmentation:
    """Weak and strong views of batches of square uint8 images.

    `weak`, `strong` and `plain` take uint8 (n, c, size, size) on any device and return the normalised images,
    contiguous, on that device. `rows` int64 (n,) are the sample indices and `key` names the view, e.g.
    `(seed, "train", epoch, "net1", "weak1")`: views that are to differ need keys that differ. Keep `rows` on the CPU:
    rows on a GPU have to be fetched, which waits for the device.

    Attributes:
        size: height and width of the images, pixels.
        padding: zeros around an image before the random crop back to `size`, pixels.
        flip: flip horizontally with probability 1/2.
        strong_ops: what the strong view draws from, names of `RANDAUGMENT` in any order.
        strong_count: how many operations a strong view gets, drawn uniformly with replacement.
        cutout: a strong view loses a square whose side is uniform in [0, cutout * size], centred anywhere, clipped to
            the image, filled with (125, 123, 114), or the luma of this colour where c = 1. 0: none.
        cutout_fixed: a strong view loses a square of this side, centred anywhere, clipped, filled with 0 before the
            normalisation (DeVries and Taylor, 2017). 0: none.
        mean, std: of every channel, for images in [0, 1].

    Raises:
        ValueError: a field is out of its range; images, rows and the augmentation do not fit each other.
    """

    size: int
    padding: int
    flip: bool
    strong_ops: tuple[str, ...] = RANDAUGMENT
    strong_count: int = 1
    cutout: float = 0.5
    cutout_fixed: int = 0
    _: KW_ONLY
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.strong_ops) - set(RANDAUGMENT))
        if unknown:
            raise ValueError(f"unknown operation {unknown[0]!r}; the operations are {', '.join(RANDAUGMENT)}")
        if self.strong_count < 0 or (self.strong_count and not self.strong_ops):
            raise ValueError(f"strong_count is {self.strong_count} with {len(self.strong_ops)} operations to draw from")
        if not 1 <= self.size <= 8192 or self.padding < 0 or self.cutout_fixed < 0 or not 0 <= self.cutout <= 1:
            raise ValueError(f"a size, padding or cutout is out of range in {self}")
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} have to give every channel a mean and a std > 0")

    def plain(self, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normalised and otherwise as they are: what evaluation sees. `dtype` is that of the result."""
        self._check(images)
        mean, std = torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)
        scale, shift = _send(torch.stack([1 / (255 * std), -mean / std]).float(), images.device).view(2, -1, 1, 1)
        return images.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift).to(dtype)

    def weak(self, images: Tensor, rows: Tensor, key: Sequence[int | str], dtype: torch.dtype = torch.float32) -> Tensor:
        """Random crop with zero padding and horizontal flip, normalised."""
        draws = self._draws(images, rows, key, _SIDE)
        return self.plain(_crop_and_flip(images, draws, self.padding, self.flip), dtype)

    def strong(self, images: Tensor, rows: Tensor, key: Sequence[int | str], dtype: torch.dtype = torch.float32) -> Tensor:
        """The weak geometry, then `strong_count` operations, then cutout, normalised; c is 1 or 3."""
        if len(self.mean) not in (1, 3):
            raise ValueError(f"strong views need grey (c = 1) or RGB (c = 3) images, not {len(self.mean)} channels")
        draws = self._draws(images, rows, key, _FIRST_OP + 2 * self.strong_count)
        images = _crop_and_flip(images, draws, self.padding, self.flip)
        draws = draws.double()
        for column in range(_FIRST_OP, draws.shape[1], 2):
            images = self._random_op(images, draws[:, column], draws[:, column + 1])
        if self.cutout:
            images = _draw_boxes(images, *self._cutout_boxes(draws))
        if self.cutout_fixed:
            corner = (draws[:, [_FIXED_X, _FIXED_Y]] * self.size).long() - self.cutout_fixed // 2
            images = _draw_boxes(images, torch.cat([corner, corner + self.cutout_fixed - 1], 1), (0,))
        return self.plain(images, dtype)

    def _check(self, images: Tensor) -> None:
        shape = (len(self.mean), self.size, self.size)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(f"expected uint8 images (n, *{shape}), got {images.dtype} {tuple(images.shape)}")

    def _draws(self, images: Tensor, rows: Tensor, key: Sequence[int | str], columns: int) -> Tensor:
        """float32 (n, columns) on the CPU."""
        self._check(images)
        if rows.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images need as many row numbers, got {tuple(rows.shape)}")
        return keyed_uniform(key, rows.cpu(), columns)

    def _random_op(self, images: Tensor, choice: Tensor, level: Tensor) -> Tensor:
        """One operation per row: rows sorted by operation, so that each operation gets a slice and one call.

        choice, level: float64 (n,) in [0, 1) on the CPU.
        """
        names = sorted(self.strong_ops, key=RANDAUGMENT.index)  # affine operations last
        drawn = (choice * len(names)).long()
        order = drawn.argsort(stable=True)
        counts = torch.bincount(drawn, minlength=len(names)).tolist()
        images = images.index_select(0, _send(order, images.device))
        done, matrices, start = [], [], 0
        for name, count, u in zip(names, counts, level[order].split(counts)):
            apply, low, high = (PIXEL_OPS | AFFINE_OPS)[name]
            if name in AFFINE_OPS:
                matrices.append(apply(low + (high - low) * u, self.size))
            elif count:
                done.append(apply(images[start : start + count], low + (high - low) * u))
                start += count
        if matrices:
            done.append(_affine(images[start:], torch.cat(matrices)))
        return torch.cat(done).index_select(0, _send(order.argsort(), images.device))

    def _cutout_boxes(self, draws: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Boxes (as `_draw_boxes` takes them) and colour; the last column and line count, as in Pillow's rectangles."""
        side = (draws[:, _SIDE] * self.cutout * self.size).unsqueeze(1)
        first = (draws[:, [_CENTRE_X, _CENTRE_Y]] * self.size - side / 2).clamp(min=0).floor()
        last = torch.where(side > 0, (first + side).floor(), first - 1)
        return torch.cat([first, last], 1).long(), (_CUTOUT_COLOUR if len(self.mean) == 3 else (_CUTOUT_GREY,))
