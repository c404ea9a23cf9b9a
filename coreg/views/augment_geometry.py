"""Crops, flips and holes of batches of uint8 images, every row with its own; resizing reproduces Pillow's arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coreg.views.augment_ops import send

_TRIES = 10  # of a random crop that has to fit into the image, as torchvision
RESIZED_CROP_DRAWS = 2 * _TRIES + 3  # area and shape of every try, place, flip
_BITS = 22  # of the fractions in Pillow's fixed-point resampling


def crop_and_flip(images: Tensor, draws: Tensor, padding: int, flip: bool, reflect: bool = False) -> Tensor:
    """Padded random crop of the images' own size, then a horizontal flip with probability 1/2, in one gather.

    The padded images lie in one buffer, mirrored where they are to be flipped; a row of an output image is `width`
    neighbouring bytes of it, so the gather copies runs of bytes and needs one index per image row, not one per pixel.

    Args:
        images: uint8 (n, c, h, w). draws: (n, 3) uniform in [0, 1) on the CPU: top, left, flip.
        reflect: the padding mirrors the image at its outermost pixels, instead of zeros.
    """
    count, channels, height, width = images.shape
    if not count or not (padding or flip):
        return images
    tall, wide = height + 2 * padding, width + 2 * padding
    offsets = (draws[:, :2] * (2 * padding + 1)).long()
    mirrored = (draws[:, 2] >= 0.5) & flip
    left = torch.where(mirrored, 2 * padding - offsets[:, 1], offsets[:, 1])
    # Straight images first: known on the host, so that the device copies two blocks and selects nothing.
    order = mirrored.to(torch.uint8).argsort(stable=True)
    straight = count - int(mirrored.sum())
    ordered = images.index_select(0, send(order, images.device))
    buffer = images.new_zeros(count, channels, tall, wide)
    inner = buffer[:, :, padding : padding + height, padding : padding + width]
    inner[:straight] = ordered[:straight]
    inner[straight:] = ordered[straight:].flip(3)
    if reflect:
        _reflect(buffer, padding)
    first = order.argsort() * (channels * tall * wide) + offsets[:, 0] * wide + left
    lines = torch.arange(channels, device=images.device).unsqueeze(1) * tall
    lines = (lines + torch.arange(height, device=images.device)) * wide
    start = send(first, images.device).view(-1, 1) + lines.view(1, -1)
    runs = buffer.view(-1).as_strided((buffer.numel() - width + 1, width), (1, 1))
    return runs.index_select(0, start.view(-1)).view_as(images)


def _reflect(buffer: Tensor, padding: int) -> None:
    """Fill the borders of (n, c, h + 2 padding, w + 2 padding) from what they surround; borders wider than it bounce."""
    for dim in (3, 2):
        size = buffer.shape[dim] - 2 * padding
        period = max(2 * size - 2, 1)
        for place in (*range(padding), *range(padding + size, 2 * padding + size)):
            phase = (place - padding) % period
            buffer.select(dim, place).copy_(buffer.select(dim, padding + min(phase, period - phase)))


def draw_boxes(images: Tensor, boxes: Tensor, colour: Sequence[int]) -> Tensor:
    """Fill one box per row. boxes: int64 (n, 4) on the CPU, first x, first y, last x, last y, all inclusive."""
    x0, y0, x1, y1 = send(boxes.t().contiguous(), images.device).view(4, -1, 1)
    column = torch.arange(images.shape[3], device=images.device)
    line = torch.arange(images.shape[2], device=images.device)
    lines, columns = (line >= y0) & (line <= y1), (column >= x0) & (column <= x1)
    hole = (lines.view(torch.uint8).unsqueeze(2) * columns.view(torch.uint8).unsqueeze(1)).unsqueeze(1)
    kept = images * (1 - hole)
    if not any(colour):
        return kept
    fill = send(torch.tensor(colour, dtype=torch.uint8), images.device)
    return kept.add_(hole * fill.view(1, -1, 1, 1))


def cut_out_square(images: Tensor, draws: Tensor, side: int) -> Tensor:
    """Black square of so many pixels centred anywhere, clipped (DeVries and Taylor, 2017). draws: (n, 2), x and y."""
    corner = (draws * images.shape[-1]).long() - side // 2
    return draw_boxes(images, torch.cat([corner, corner + side - 1], 1), (0,))


def random_boxes(draws: Tensor, side: int, scale: tuple[float, float]) -> Tensor:
    """torchvision's RandomResizedCrop of square images: part of the area, aspect ratio 3/4 to 4/3 in the logarithm.

    The first of ten draws that fits into the image counts; when none does, the box is the whole image.

    Args:
        draws: (n, >= 22) uniform in [0, 1) on the CPU. side: of the images. scale: smallest and largest part.

    Returns:
        int64 (n, 4) on the CPU: top, left, height, width.
    """
    draws = draws.double()
    area = side * side * (scale[0] + (scale[1] - scale[0]) * draws[:, :_TRIES])
    aspect = (math.log(4 / 3) * (2 * draws[:, _TRIES : 2 * _TRIES] - 1)).exp()
    boxes = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], 2).round().long()  # (n, tries, 2)
    fits = ((boxes > 0) & (boxes <= side)).all(2)
    first = fits.to(torch.uint8).argmax(1)
    chosen = boxes[torch.arange(len(boxes)), first]
    extent = torch.where(fits.any(1, keepdim=True), chosen, side)
    corner = (draws[:, 2 * _TRIES : 2 * _TRIES + 2] * (side - extent + 1)).long()
    return torch.cat([corner, extent], 1)


def _linear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


# name -> (weight at a distance in pixels, distance beyond which it is 0)
_KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {"bilinear": (_linear, 1.0), "bicubic": (_cubic, 2.0)}


def _taps(first: Tensor, length: Tensor, side: int, size: int, kernel: str) -> tuple[Tensor, Tensor]:
    """Which lines [first, first + length) of an image make each of `size` lines, and their weights; antialiased.

    Args:
        first, length: int64 (n,) on the CPU, within images of `side` lines.

    Returns:
        int64 and int32 (taps, n, size) on the CPU; the weights in fixed point, as Pillow rounds them.
    """
    weigh, support = _KERNELS[kernel]
    length, first = length.unsqueeze(1), first.unsqueeze(1)
    scale = length.double() / size
    stretch = scale.clamp(min=1)
    centre = (torch.arange(size) + 0.5) * scale
    begin = (centre - support * stretch + 0.5).long().clamp_(min=0)
    end = torch.minimum((centre + support * stretch + 0.5).long(), length)
    lines = begin + torch.arange(math.ceil(2 * support * max(side / size, 1.0))).view(-1, 1, 1)
    weights = torch.where(lines < end, weigh((lines - centre + 0.5) * (1 / stretch)), 0.0)
    weights = weights / sum(weights.unbind(0))  # in this order, as Pillow adds
    fixed = (weights * (1 << _BITS) + torch.full_like(weights, 0.5).copysign(weights)).to(torch.int32)
    return first + torch.minimum(lines, length - 1), fixed


def _resample(images: Tensor, lines: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of the lines of each image, uint8 (n, c, h, w) -> uint8 (n, c, size, w); taps on any device."""
    count, channels, height, width = images.shape
    start = torch.arange(count * channels, device=images.device).view(count, channels, 1) * height
    flat = images.reshape(-1, width)
    shape = (count, channels, lines.shape[2], width)
    picked = images.new_empty(shape)  # buffers that all taps share: fresh memory costs more than the arithmetic
    addend = picked.new_empty(shape, dtype=torch.int32)
    total = torch.full_like(addend, 1 << (_BITS - 1))
    for line, weight in zip(send(lines, images.device), send(weights, images.device)):
        source = (start + line.unsqueeze(1)).view(-1)
        torch.index_select(flat, 0, source, out=picked.view(-1, width))
        total.addcmul_(addend.copy_(picked), weight.view(count, 1, -1, 1))
    return total.bitwise_right_shift_(_BITS).clamp_(0, 255).to(torch.uint8)


def resized_crop(images: Tensor, boxes: Tensor, mirrored: Tensor, size: int, kernel: str) -> Tensor:
    """Cut a box out of every image, resize it to size x size and mirror it, exactly as Pillow's crop, resize and mirror.

    Args:
        images: uint8 (n, c, side, side). boxes: int64 (n, 4) on the CPU: top, left, height, width.
        mirrored: bool (n,) on the CPU, which results to flip horizontally. kernel: bilinear or bicubic.

    Returns:
        uint8 (n, c, size, size).
    """
    if not len(images):
        return images.new_zeros(0, images.shape[1], size, size)
    side = images.shape[-1]
    top, left, height, width = boxes.unbind(1)
    columns = (torch.where(mirrored.view(-1, 1), taps.flip(2), taps) for taps in _taps(left, width, side, size, kernel))
    # Lines of pixels are copied fast, columns are not: the images lie on their side for the first of two passes.
    across = _resample(images.transpose(2, 3), *columns).transpose(2, 3)
    return _resample(across, *_taps(top, height, side, size, kernel))


def random_resized_crop(
    images: Tensor, draws: Tensor, size: int, scale: tuple[float, float], flip: bool, kernel: str
) -> Tensor:
    """`resized_crop` at random. draws: (n, RESIZED_CROP_DRAWS) uniform in [0, 1) on the CPU; flip with chance 1/2."""
    boxes = random_boxes(draws, images.shape[-1], scale)
    return resized_crop(images, boxes, (draws[:, -1] >= 0.5) & flip, size, kernel)
