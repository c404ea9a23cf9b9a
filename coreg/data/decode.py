"""From an image file to pixels: what can be read becomes 8-bit grey or RGB, what cannot be read says why."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
import torch
from PIL import IcoImagePlugin, Image, ImageOps, UnidentifiedImageError

from coreg.data.eight_bit import USES_FEW_BITS, bits_of, to_8_bit, uses_few_bits
from coreg.errors import UserError

if TYPE_CHECKING:
    from coreg.data.images import ImageList

# Formats that Pillow decodes by itself. EPS is left out on purpose: Pillow hands it to Ghostscript, an interpreter.
# "JPEG" includes MPO. Formats that this Pillow was built without are left out: asking for them is an error. ICO is left
# out because Pillow decodes it when it opens it: `_opened` tries it last, after a check.
Image.init()
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "TGA")
FORMATS = tuple(name for name in _FORMATS if name in Image.OPEN)
_SUFFIXES = (
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .bmp .dib .gif .tif .tiff .webp .ppm .pgm .pbm .pnm .avif .avifs .jp2 .j2k "
    ".jpx .tga .ico"
)
HEIC = frozenset((".heic", ".heif", ".hif"))
READS_HEIF = importlib.util.find_spec("pillow_heif") is not None
SUFFIXES = frozenset(_SUFFIXES.split()) | (HEIC if READS_HEIF else frozenset())
Resize = Literal["squash", "crop"]
MAX_PIXELS = 89_478_485  # Pillow's own border of suspicion: a quarter of a gigabyte as RGB
MAX_BYTES = 12 * MAX_PIXELS  # what the dearest ordinary file of so many RGB pixels takes, a progressive JPEG
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such files begin; they may hold many large pictures
MAX_ICON = 1024  # pixels a side
MAX_ASPECT = 200  # a 1 x 60000 image within MAX_PIXELS would explode when its short side is scaled up to 224

# Above MAX_PIXELS we refuse ourselves; Pillow's warning would only be printed beside it.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Damaged EXIF and TIFF tags do not matter while the pixels can be read; of a million images thousands would be remarked.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class UnreadableImage(Exception):  # noqa: N818
    """An image that cannot be used; the message is the reason, one line without the path."""


@dataclass
class Files:
    """Pixels of files below a folder; a plain object, so that it can be sent to worker processes."""

    root: Path
    paths: Sequence[str]

    def __call__(self, row: int) -> Image.Image:
        return read_image(self.root / self.paths[row])


def read_image(path: str | Path) -> Image.Image:
    """Read one image file; see `decode_image` for what becomes of its pixels.

    Returns:
        PIL image of mode "L" (grey files) or "RGB".

    Raises:
        UnreadableImage: missing, not a regular file, empty, or for the reasons of `decode_image`.
    """
    try:
        # A FIFO that is called x.jpg would block the open for ever, so the kind of file is checked first.
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("not a regular file")
        if status.st_size == 0:
            raise UnreadableImage("empty file")
        if status.st_size > MAX_BYTES:  # several libraries read a file whole before they do anything else
            with Path(path).open("rb") as file:
                if file.read(4) not in TIFF:
                    raise UnreadableImage(f"a file of {status.st_size / 1e9:.1f} GB")
    except FileNotFoundError:
        raise UnreadableImage("no such file") from None
    except (OSError, ValueError) as error:
        raise UnreadableImage(" ".join((getattr(error, "strerror", None) or str(error)).split())) from None
    return decode_image(path)


def decode_image(file: str | Path | BinaryIO) -> Image.Image:
    """Decode one image from a regular file or from memory.

    EXIF orientation is applied; palettes, CMYK and other colour spaces become RGB; transparent parts are laid over
    white; 16-bit grey is scaled to 8 bits by its full range, or by the smaller one that a TIFF file names; 32-bit and
    float grey by their own range; animations give their first frame. Memory stays below `MAX_BYTES`.

    Returns:
        PIL image of mode "L" (grey files) or "RGB". Where a file of 16 bits a channel uses so few of them that the image
        is nearly black, its `info` has the key `USES_FEW_BITS`.

    Raises:
        UnreadableImage: truncated, of no known format, a decompression bomb (more than `MAX_PIXELS` pixels, or pixels
            that need more than `MAX_BYTES`), or one side is more than `MAX_ASPECT` times the other.
    """
    try:
        # what the file's own object holds is let go of before anything is converted
        image, bits, is_deep = _decoded(file)
        converted = to_8_bit(image, bits)
        if is_deep and bits == 16 and uses_few_bits(image, converted):
            converted.info[USES_FEW_BITS] = True
        return converted
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("not an image of a known format") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnreadableImage(" ".join(reason.split()) or "input/output error") from None
    except Exception as error:  # damaged input: SyntaxError, ValueError, struct.error, EOFError, ...
        raise UnreadableImage(" ".join(f"{type(error).__name__}: {error}".split())) from None


def _decoded(file: str | Path | BinaryIO) -> tuple[Image.Image, int, bool]:
    """The upright image in its own mode, the bits of a 16-bit grey pixel, and whether a channel has 16 bits."""
    with _opened(file) as image:
        _check_size(image)
        raw_mode = image.tile[0][3] if getattr(image, "tile", None) else ""
        is_deep = "16" in str(raw_mode[0] if isinstance(raw_mode, tuple) and raw_mode else raw_mode)
        bits = bits_of(image)
        image.load()
        return _upright(image), bits, is_deep


def _opened(file: str | Path | BinaryIO) -> Image.Image:
    """The image, not decoded yet; of two formats more than `FORMATS`, which no other image pays for."""
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        with Path(file).open("rb") if isinstance(file, str | Path) else contextlib.nullcontext(file) as opened:
            opened.seek(0)
            beginning = opened.read(12)
            if beginning[:4] == b"\0\0\1\0":
                _check_icon(opened)
            elif not (beginning[4:8] == b"ftyp" and READS_HEIF):
                raise
        if beginning[4:8] == b"ftyp":
            importlib.import_module("pillow_heif").register_heif_opener()
        return Image.open(file, formats=("HEIF" if beginning[4:8] == b"ftyp" else "ICO",))


def _check_icon(file: BinaryIO) -> None:
    """Refuse an icon that is too large: Pillow decodes the largest one in a file when it opens it, whatever its size.

    Raises:
        UnreadableImage: the picture that Pillow would choose is too large.
    """
    file.seek(0)
    entry = IcoImagePlugin.IcoFile(file).entry[0]
    file.seek(entry.offset)
    with Image.open(io.BytesIO(file.read(entry.size)), formats=("PNG", "DIB")) as picture:
        width, height = picture.size
        if picture.format == "DIB":  # the picture and its mask, one above the other
            height //= 2
        if max(width, height) > MAX_ICON:
            raise UnreadableImage(f"an icon of {width}x{height} pixels; icons have at most {MAX_ICON}x{MAX_ICON}")


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width}x{height} pixels are more than the {MAX_PIXELS} that are decoded")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImage(f"{width}x{height} has one side more than {MAX_ASPECT} times the other")
    need = _bytes_needed(image)
    if need > MAX_BYTES:
        raise UnreadableImage(
            f"{width}x{height} pixels of this kind ({image.format}, {image.mode}) need {need / 1e9:.1f} GB to decode, more "
            f"than the {MAX_BYTES / 1e9:.1f} GB of any RGB image; save it smaller, or as PNG"
        )


def _bytes_needed(image: Image.Image) -> float:
    """Memory at the peak of decoding: the image and a copy of it, or what a format's library takes beside the image.

    Pillow keeps at most 4 bytes a pixel. The other numbers were measured.
    """
    pixels = image.width * image.height
    if image.format == "JPEG2000":
        return pixels * (8 + 4 * len(image.getbands()))
    if image.format == "TIFF" and image.tag_v2.get(259, 1) != 1:  # compressed: one strip or tile is decoded at a time
        tags = image.tag_v2
        bits = tags.get(258, (1,))
        tile = int(tags.get(322, image.width)) * int(tags.get(323, min(int(tags.get(278, image.height)), image.height)))
        return max(8 * pixels, 4 * pixels + tile * sum(bits if isinstance(bits, tuple) else (bits,)) / 8)
    return pixels * {"WEBP": 18, "AVIF": 16, "HEIF": 16}.get(image.format, 8)


def _upright(image: Image.Image) -> Image.Image:
    """A copy of the image, turned as EXIF says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return image.copy()


def as_square(image: Image.Image, size: int, channels: int, resize: Resize) -> Image.Image:
    """`image` in RGB (3 channels) or grey (1), as a square of side `size`; bilinear with antialiasing (Pillow's).

    Args:
        resize: `squash` changes its shape; `crop` resizes its short side to `size` and takes the middle, as torchvision's
            `Resize` and `CenterCrop` do.
    """
    image = image.convert("RGB" if channels == 3 else "L")
    if resize == "squash" or image.width == image.height:
        return image.resize((size, size), Image.Resampling.BILINEAR)
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def decode(
    images: ImageList,
    rows: np.ndarray,
    size: int,
    channels: int,
    workers: int,
    failed: dict[int, str] | None = None,
    resize: Resize = "squash",
) -> torch.Tensor:
    """Decode images into one tensor for training, each made a square of side `size` (see `as_square`).

    Args:
        images: where the pixels come from.
        rows: int (n,), sample indices into `images`.
        size: side of the square in pixels.
        channels: 3 for RGB, 1 for grey (luma).
        workers: decoding threads; Pillow releases the interpreter's lock while it decodes and resizes.
        failed: takes row -> reason of every image that cannot be read.
        resize: `squash` or `crop`.

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
            target[place] = np.asarray(as_square(image, size, channels, resize)).reshape(size, size, channels)

    # Chunks, because handing over one image at a time costs more than resizing a small one; no thread waits for the last.
    length = min(64, -(-len(rows) // (4 * max(1, workers))) or 1)
    chunks = [range(start, min(start + length, len(rows))) for start in range(0, len(rows), length)]
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        list(pool.map(fill, chunks))
    return pixels.permute(0, 3, 1, 2).contiguous()


def decode_annotated(images: ImageList, rows: np.ndarray, size: int, channels: int, workers: int) -> torch.Tensor:
    """As `decode`, for images that an annotation store lists as readable.

    Raises:
        UserError: some of them cannot be read any more.
    """
    failed: dict[int, str] = {}
    pixels = decode(images, rows, size, channels, workers, failed)
    if failed:
        raise no_longer_readable(images, failed)
    return pixels


def no_longer_readable(images: ImageList, failed: dict[int, str]) -> UserError:
    """The error for images that were annotated and cannot be read now.

    Args:
        failed: row -> reason, at least one.
    """
    row, it = min(failed), "it" if len(failed) == 1 else "them"
    return UserError(
        f"{len(failed)} of the {len(images)} images in {images.spec} cannot be read: {images.paths[row]!r} could be read "
        f"when it was annotated, and cannot be now ({failed[row]}); put {it} back, or annotate the images anew"
    )
