"""From the pixels of a decoded file to 8-bit grey or RGB, a strip of rows at a time where an image is large.

Every conversion but that of 32-bit and float grey is made pixel by pixel, and those two need no more than the smallest
and the largest value of the whole image: so strips give the same bits, and memory for two images at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from PIL import Image

STRIP = 1 << 21  # pixels: some 64 MB of temporary arrays
USES_FEW_BITS = "uses few of its 16 bits"  # key in an image's info


def to_8_bit(image: Image.Image, bits: int = 16) -> Image.Image:
    """An image of mode "L" or "RGB".

    Args:
        image: decoded, of any mode.
        bits: how many bits of a 16-bit grey pixel carry its value (see `bits_of`).
    """
    convert = _conversion(image, bits)
    if convert is None:
        return image if type(image) is Image.Image else image.copy()
    if image.width * image.height <= STRIP:
        return convert(image)
    result = None
    for box in _boxes(image):
        strip = convert(image.crop(box))
        result = result or Image.new(strip.mode, image.size)
        result.paste(strip, box)
    return result


def bits_of(image: Image.Image) -> int:
    """How many bits carry the value of a 16-bit grey pixel, by what the file says, never by its pixels.

    A TIFF may hold 12 bits a pixel, or name the largest value (MaxSampleValue) that its camera can give. A PNG's sBIT is
    no such statement: its pixels are scaled to the full range whatever it says (PNG specification, 11.3.2.7).
    """
    tags = getattr(image, "tag_v2", None)
    if not image.mode.startswith("I;16") or tags is None:
        return 16
    first = lambda value: value[0] if isinstance(value, tuple) and value else value  # noqa: E731
    bits, largest = first(tags.get(258)), first(tags.get(281))
    # of other values of the second tag one cannot know whether they are the camera's or this picture's
    declared = {2**count - 1: count for count in range(9, 16)}
    return 12 if bits == 12 else declared.get(largest, 16) if isinstance(largest, int) else 16


def uses_few_bits(image: Image.Image, converted: Image.Image) -> bool:
    """Whether an image of 16 bits a channel has no value as large as a quarter of its range, and is not black either.

    Args:
        image: as decoded.
        converted: the same, 8 bits a channel.
    """
    if image.mode.startswith("I;16"):
        return 0 < int(np.asarray(image).max()) < 1 << 14
    return 0 < int(np.asarray(converted.convert("L") if converted.mode == "P" else converted).max()) < 64


def _boxes(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def _conversion(image: Image.Image, bits: int) -> Callable[[Image.Image], Image.Image] | None:
    """What makes a strip of `image` 8-bit; None where there is nothing to do."""
    if image.mode.startswith("I;16"):
        by = bits - 8
        return lambda strip: Image.fromarray(np.minimum(np.asarray(strip).astype(np.uint16) >> by, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        strips = (_finite(image.crop(box)) for box in _boxes(image))
        lows, highs = zip(*((values.min(), values.max()) for values in strips))
        return partial(_stretched, low=min(lows), high=max(highs))
    if image.has_transparency_data:
        return _over_white
    if image.mode in ("L", "RGB"):
        return None
    return lambda strip: strip.convert("L" if strip.mode == "1" else "RGB")


def _over_white(strip: Image.Image) -> Image.Image:
    strip = strip.convert("RGBA")
    white = Image.new("RGBA", strip.size, "white")
    return Image.alpha_composite(white, strip).convert("RGB")


def _finite(strip: Image.Image) -> np.ndarray:
    return np.nan_to_num(np.asarray(strip).astype(np.float64), copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def _stretched(strip: Image.Image, low: float, high: float) -> Image.Image:
    """Grey of any range to 8 bits: `low` to `high` become 0 to 255; a flat image becomes black."""
    values = _finite(strip)
    values -= low
    values *= 255.0 / (high - low) if high > low else 0.0
    return Image.fromarray(np.round(values, out=values).astype(np.uint8))
