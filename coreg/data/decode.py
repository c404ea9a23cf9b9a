"""From an image file to pixels: what can be read becomes 8-bit grey or RGB, what cannot be read says why."""

from __future__ import annotations

import os
import stat
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from coreg.errors import UserError

if TYPE_CHECKING:
    from coreg.data.images import ImageList

# Formats that Pillow decodes by itself. EPS is left out on purpose: Pillow hands it to Ghostscript, an interpreter.
# "JPEG" includes MPO. Formats that this Pillow was built without are left out: asking for them is an error.
Image.init()
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "TGA", "ICO")
FORMATS = tuple(name for name in _FORMATS if name in Image.OPEN)
_SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .gif .tif .tiff .webp .ppm .pgm .pbm .pnm .avif .avifs .jp2 .j2k "
    ".jpx .tga .ico"
)
SUFFIXES = frozenset(_SUFFIXES.split())
MAX_PIXELS = 89_478_485  # Pillow's own border of suspicion: a quarter of a gigabyte as RGB
MAX_ASPECT = 200  # a 1 x 60000 image within MAX_PIXELS would explode when its short side is scaled up to 224

# Above MAX_PIXELS we refuse ourselves; Pillow's warning would only be printed beside it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Damaged EXIF and TIFF tags do not matter while the pixels can be read; of a million images thousands would be remarked.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class UnreadableImage(Exception):  # noqa: N818
    """An image that cannot be used; the message is the reason, one line without the path."""


def read_image(path: str | Path) -> Image.Image:
    """Read one image file; see `decode_image` for what becomes of its pixels.

    Returns:
        PIL image of mode "L" (grey files) or "RGB".

    Raises:
        UnreadableImage: missing, not a regular file, empty, or for the reasons of `decode_image`.
    """
    try:
        # A FIFO that is called x.jpg would block the open for ever, so the kind of file is looked at first.
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("not a regular file")
        if status.st_size == 0:
            raise UnreadableImage("empty file")
    except FileNotFoundError:
        raise UnreadableImage("no such file") from None
    except (OSError, ValueError) as error:
        raise UnreadableImage(" ".join((getattr(error, "strerror", None) or str(error)).split())) from None
    return decode_image(path)


def decode_image(file: str | Path | BinaryIO) -> Image.Image:
    """Decode one image from a regular file or from memory.

    EXIF orientation is applied; palettes, CMYK and other colour spaces become RGB; transparent parts are laid over
    white; 16-bit grey is scaled to 8 bits by its full range, 32-bit and float grey by their own range; animations give
    their first frame.

    Returns:
        PIL image of mode "L" (grey files) or "RGB".

    Raises:
        UnreadableImage: truncated, of no known format, a decompression bomb (more than `MAX_PIXELS` pixels), or one side
            is more than `MAX_ASPECT` times the other.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            _check_size(image.width, image.height)
            image.load()
            return _to_8_bit(_upright(image))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image of a known format") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnreadableImage(" ".join(reason.split()) or "input/output error") from None
    except Exception as error:  # damaged input: SyntaxError, ValueError, struct.error, EOFError, ...
        raise UnreadableImage(" ".join(f"{type(error).__name__}: {error}".split())) from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width}x{height} pixels are more than the {MAX_PIXELS} that are decoded")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImage(f"{width}x{height} has one side more than {MAX_ASPECT} times the other")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return image


def _to_8_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        return Image.fromarray(_stretched(np.asarray(image).astype(np.float64)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image if type(image) is Image.Image else image.copy()
    return image.convert("L" if image.mode == "1" else "RGB")


def _stretched(values: np.ndarray) -> np.ndarray:
    """Float pixels (h, w) to uint8 (h, w): their own finite range becomes 0..255; a flat image becomes black."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    return np.round((values - low) * (255.0 / (high - low) if high > low else 0.0)).astype(np.uint8)


def decode(
    images: ImageList,
    rows: np.ndarray,
    size: int,
    channels: int,
    workers: int,
    failed: dict[int, str] | None = None,
) -> torch.Tensor:
    """Decode images into one tensor for training: squashed to `size` x `size`, bilinear with antialiasing (Pillow's).

    Args:
        images: where the pixels come from.
        rows: int (n,), sample indices into `images`.
        size: side of the square in pixels.
        channels: 3 for RGB, 1 for grey (luma).
        workers: decoding threads; Pillow releases the interpreter's lock while it decodes and resizes.
        failed: takes row -> reason of every image that cannot be read.

    Returns:
        uint8 (n, channels, size, size); rows of unreadable images are zero.

    Raises:
        UserError: the result does not fit into this machine's memory.
        ValueError: an argument is out of range.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if channels not in (1, 3) or size < 1 or (len(rows) and not 0 <= rows.min() <= rows.max() < len(images)):
        raise ValueError(f"cannot decode to {channels} channels of side {size} for rows of {len(images)} images")
    need = len(rows) * channels * size * size
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise UserError(
            f"{len(rows)} images of {size}x{size} need {need / 2**30:.0f} GiB but this machine has "
            f"{have / 2**30:.0f} GiB of memory; train with a smaller image size"
        )
    pixels = torch.zeros((len(rows), size, size, channels), dtype=torch.uint8)
    target = pixels.numpy()

    def fill(places: range) -> None:
        for place in places:
            try:
                image = images.load(int(rows[place]))
            except UnreadableImage as error:
                if failed is not None:
                    failed[int(rows[place])] = str(error)
                continue
            image = image.convert("RGB" if channels == 3 else "L").resize((size, size), Image.Resampling.BILINEAR)
            target[place] = np.asarray(image).reshape(size, size, channels)

    # Chunks, because handing over one image at a time costs more than resizing a small one.
    chunks = [range(start, min(start + 64, len(rows))) for start in range(0, len(rows), 64)]
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        list(pool.map(fill, chunks))
    return pixels.permute(0, 3, 1, 2).contiguous()
