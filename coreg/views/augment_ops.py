"""Operations on batches of uint8 images, every row with its own magnitude.

They reproduce Pillow's arithmetic: ImageOps, ImageEnhance, the HSV mode and nearest-neighbour affine transforms. What is
random about them is drawn elsewhere (`coreg.views.policies`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LUMA = (19595, 38470, 7471)  # ITU-R 601-2 weights in 16-bit fixed point, as Pillow's "L" mode


def send(values: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return values.to(device, non_blocking=True)


def per_row(values: Tensor, images: Tensor) -> Tensor:
    """One value a row, (m,) on the CPU -> (m, 1, 1, 1) beside the images."""
    return send(values, images.device).view(-1, 1, 1, 1)


# --- operations: (images uint8 (m, c, h, w), magnitudes float64 (m,) on the CPU) -> uint8 (m, c, h, w) ---------------


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
    return images & per_row((256 - (1 << dropped)).to(torch.uint8), images)


def _solarize(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Invert the pixels that are not below the threshold."""
    reached = images.short() >= per_row(magnitudes.ceil().short(), images)
    return images ^ (reached.view(torch.uint8) * 255)


def luma(images: Tensor) -> Tensor:
    """Grey level of every pixel, uint8 (m, 1, h, w)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (images[:, i : i + 1].int() * weight for i, weight in enumerate(_LUMA))
    return ((red + green + blue + 0x8000) >> 16).to(torch.uint8)


def _blend(degenerate: Tensor | int, images: Tensor, magnitudes: Tensor) -> Tensor:
    """degenerate + magnitude * (image - degenerate) in float32, clipped and cut off to an integer, as Pillow's blend."""
    base = degenerate.float() if isinstance(degenerate, Tensor) else degenerate
    mixed = images.float().sub_(base).mul_(per_row(magnitudes.float(), images)).add_(base)
    return mixed.clamp_(0, 255).to(torch.uint8)


def _color(images: Tensor, magnitudes: Tensor) -> Tensor:
    return images if images.shape[1] == 1 else _blend(luma(images), images, magnitudes)


def _contrast(images: Tensor, magnitudes: Tensor) -> Tensor:
    pixels = images.shape[2] * images.shape[3]
    total = luma(images).sum((1, 2, 3), keepdim=True)
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


@functools.cache
def _hues(device: torch.device) -> Tensor:
    """Pillow's 8-bit hue, uint8 (3 * 256 * 512,), of [which channel is brightest, span, difference of the others + 256].

    Its mixture of float32 and float64 decides where a hue falls on an integer, so a table keeps it out of the way.
    """
    span = torch.arange(256, dtype=torch.float32).clamp(min=1).view(256, 1)
    difference = torch.arange(-256, 256, dtype=torch.float32)
    # Of the two other channels one is the darkest, a whole span below the brightest.
    one = torch.where(difference >= 0, 1.0, (span + difference) / span).double()
    other = torch.where(difference >= 0, (span - difference) / span, 1.0).double()
    sextant = torch.stack([2 * brightest + one - other for brightest in range(3)]).float().double()
    turn = (sextant / torch.full_like(sextant, 6) + 1).frac().float()
    return send((turn.double() * 255).to(torch.uint8).flatten(), device)


def _hue(images: Tensor, magnitudes: Tensor) -> Tensor:
    """Turn the hue by so many whole turns, in [-0.5, 0.5], through Pillow's HSV mode; grey images have no hue.

    The way back rounds a fraction that is never halfway between two integers: channel = v - v s j / (255 * 85), where j
    in [0, 85] is a triangle wave of the hue, cut off, with a phase of its own for each channel.
    """
    if images.shape[1] == 1:
        return images
    colour = images.float()
    value = colour.amax(1, keepdim=True)
    span = value - colour.amin(1, keepdim=True)
    red, green, blue = colour.split(1, 1)
    brightest_is_not_red = (red < value).float()
    brightest_is_blue = (green < value).float() * brightest_is_not_red
    first, second, third = green - blue, blue - red, red - green
    difference = first + brightest_is_not_red * (second - first) + brightest_is_blue * (third - second)
    entry = (brightest_is_not_red + brightest_is_blue) * (256 * 512) + (span * 512 + (difference + 256))
    hue = _hues(images.device).index_select(0, entry.long().view(-1)).view(entry.shape)
    hue = (hue + per_row((magnitudes * 255).long().to(torch.uint8), images)).float()
    saturation = (span / value.clamp(min=1)).double().mul_(255).floor_().float()
    chroma = value * saturation
    lost = torch.cat([85 + 85 - (2 * hue - 255).abs_(), (2 * hue - 170).abs_() - 85, (2 * hue - 340).abs_() - 85], 1)
    lost = lost.clamp_(0, 85).mul_(chroma).div_(255 * 85).round_()
    return (value - lost).to(torch.uint8)


def affine(images: Tensor, matrices: Tensor) -> Tensor:
    """Nearest-neighbour affine transform with black outside, in Pillow's 16.16 fixed point.

    matrices: float64 (m, 6) on the CPU; the centre of output pixel (x, y) comes from (a x + b y + c, d x + e y + f).
    """
    count, channels, height, width = images.shape
    a, b, c, d, e, f = matrices.unbind(1)
    fixed = torch.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2])
    fixed = send((fixed * 65536 + 0.5).floor().to(torch.int32), images.device).view(6, -1, 1, 1)
    x = torch.arange(width, dtype=torch.int32, device=images.device)
    y = torch.arange(height, dtype=torch.int32, device=images.device).unsqueeze(1)
    from_x = (fixed[0] * x + (fixed[1] * y + fixed[2])).bitwise_right_shift_(16).clamp_(-1, width)
    from_y = (fixed[3] * x + (fixed[4] * y + fixed[5])).bitwise_right_shift_(16).clamp_(-1, height)
    # whatever lies outside comes from a black frame, so that nothing has to be compared
    framed = images.new_zeros(count, channels, height + 2, width + 2)
    framed[:, :, 1:-1, 1:-1] = images
    source = from_y.mul_(width + 2).add_(from_x).add_(width + 3).view(count, 1, height * width).long()
    return framed.flatten(2).gather(2, source.expand(-1, channels, -1)).view_as(images)


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


# Operations on pixels: (images uint8 (m, c, size, size), magnitudes float64 (m,) on the CPU) -> uint8.
PIXEL_OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": _auto_contrast,
    "brightness": lambda images, magnitudes: _blend(0, images, magnitudes),
    "color": _color,
    "contrast": _contrast,
    "equalize": _equalize,
    "grey": lambda images, magnitudes: luma(images).expand_as(images),
    "hue": _hue,
    "identity": lambda images, magnitudes: images,
    "invert": lambda images, magnitudes: ~images,
    "posterize": _posterize,
    "sharpness": _sharpness,
    "solarize": _solarize,
}
# Operations that move pixels: (magnitudes, size) -> matrices of `affine`, which moves all rows of a batch at once.
AFFINE_OPS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "rotate": _rotate,
    "shear_x": lambda shares, size: _matrices(shares, b=shares),
    "shear_y": lambda shares, size: _matrices(shares, d=shares),
    "translate_x": lambda shares, size: _matrices(shares, c=shares * size),
    "translate_y": lambda shares, size: _matrices(shares, f=shares * size),
}


def apply_ops(images: Tensor, names: Sequence[str], which: Tensor, magnitudes: Tensor) -> Tensor:
    """One operation per row: rows sorted by operation, so that each operation gets a slice and one call.

    Args:
        images: uint8 (n, c, size, size). names: of `PIXEL_OPS` and, after all of those, of `AFFINE_OPS`.
        which: int64 (n,) on the CPU, positions in `names`. magnitudes: float64 (n,) on the CPU.

    Returns:
        uint8 (n, c, size, size).
    """
    if not len(images):
        return images
    order = which.argsort(stable=True)
    counts = torch.bincount(which, minlength=len(names)).tolist()
    images = images.index_select(0, send(order, images.device))
    done, matrices, start = [], [], 0
    for name, count, values in zip(names, counts, magnitudes[order].split(counts)):
        if name in AFFINE_OPS:
            matrices.append(AFFINE_OPS[name](values, images.shape[-1]))
        elif count:
            done.append(PIXEL_OPS[name](images[start : start + count], values))
            start += count
    if matrices:
        done.append(affine(images[start:], torch.cat(matrices)))
    return torch.cat(done).index_select(0, send(order.argsort(), images.device))
