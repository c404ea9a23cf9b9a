"""Every kind of pixel becomes 8 bits: strip by strip or at once, by what the file says, in bounded memory."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from coreg.data import decode as decoding
from coreg.data import eight_bit
from coreg.data.decode import MAX_BYTES, MAX_PIXELS, UnreadableImage, decode_image, read_image
from coreg.data.eight_bit import USES_FEW_BITS, to_8_bit

GENERATOR = np.random.default_rng(0)
NOISE = Image.fromarray(GENERATOR.integers(0, 256, (23, 31, 4), dtype=np.uint8))


def kinds():
    rgb, grey = NOISE.convert("RGB"), NOISE.convert("L")
    marked = rgb.copy()
    marked.info["transparency"] = rgb.getpixel((3, 5))
    palette = rgb.quantize(17)
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    floats = GENERATOR.normal(size=(23, 31)).astype(np.float32)
    floats[0, 0], floats[9, 9] = np.nan, np.inf
    return {
        "L": grey, "RGB": rgb, "RGBA": NOISE, "LA": NOISE.convert("LA"), "1": grey.convert("1"), "P": palette,
        "CMYK": rgb.convert("CMYK"), "YCbCr": rgb.convert("YCbCr"), "LAB": Image.merge("LAB", rgb.split()),
        "RGB marked": marked, "P marked": see_through, "F": Image.fromarray(floats),
        "I": Image.fromarray(GENERATOR.integers(-9, 10**6, (23, 31), dtype=np.int32)),
        "I;16": Image.fromarray(GENERATOR.integers(0, 65536, (23, 31), dtype=np.uint16)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
def test_strips_give_the_bits_of_the_whole(kind, monkeypatch):
    image = kinds()[kind]
    whole = to_8_bit(image)
    for pixels in (1, 31 * 4, 31 * 22 + 5):
        monkeypatch.setattr(eight_bit, "STRIP", pixels)
        strips = to_8_bit(image)
        assert strips.mode == whole.mode in ("L", "RGB") and np.array_equal(strips, whole)


# ---- what a file says of its bits -----------------------------------------------------------------------------------


def tiff(tags, data, size):
    """A little-endian TIFF of one strip: tag -> (type, value) of what is not usual."""
    usual = {
        256: (4, size[0]), 257: (4, size[1]), 258: (3, 16), 259: (3, 1), 262: (3, 1), 273: (4, 8), 277: (3, 1),
        278: (4, size[1]), 279: (4, len(data)),
    }  # fmt: skip
    data += b"\0" * (len(data) % 2)
    entries = sorted((usual | tags).items())
    directory = struct.pack("<H", len(entries))
    for tag, (kind, value) in entries:
        directory += struct.pack("<HHI", tag, kind, 1) + struct.pack("<I" if kind == 4 else "<HH", *[value, 0][: 5 - kind])
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + struct.pack("<I", 0)


def test_a_file_that_says_how_many_bits_it_uses_is_scaled_by_them():
    values = np.array([[0, 15, 16, 4095, 2048, 800]], dtype=np.uint16)
    wanted = [[0, 0, 1, 255, 128, 50]]
    image = decode_image(io.BytesIO(tiff({281: (3, 4095)}, values.tobytes(), (6, 1))))
    assert image.mode == "L" and np.asarray(image).tolist() == wanted and USES_FEW_BITS not in image.info
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in values.reshape(-1, 2).tolist())
    image = decode_image(io.BytesIO(tiff({258: (3, 12)}, packed, (6, 1))))
    assert np.asarray(image).tolist() == wanted
    # a value above what was declared is white; other declarations may be this picture's own and say nothing
    image = decode_image(io.BytesIO(tiff({281: (3, 4095)}, (values + 1).tobytes(), (6, 1))))
    assert np.asarray(image).tolist() == [[0, 1, 1, 255, 128, 50]]
    for tags in ({}, {281: (3, 65535)}, {281: (3, 3000)}):
        image = decode_image(io.BytesIO(tiff(tags, (16 * values).tobytes(), (6, 1))))
        assert np.asarray(image).tolist() == wanted, tags


def deep_png(pixels):
    """A PNG of 16 bits a channel from uint16 (h, w) or (h, w, 3)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_images_that_use_few_of_their_bits_are_marked_and_not_changed():
    for shape in ((4, 5), (4, 5, 3)):
        values = GENERATOR.integers(0, 4096, shape)
        values[0, 0] = 4095
        for scale, marked in ((1, True), (3, True), (16, False)):
            image = decode_image(io.BytesIO(deep_png(scale * values)))
            assert np.array_equal(np.asarray(image), scale * values >> 8)
            assert (USES_FEW_BITS in image.info) == marked, (shape, scale)
        assert USES_FEW_BITS not in decode_image(io.BytesIO(deep_png(0 * values))).info  # black
    dark = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(dark, "PNG")
    assert USES_FEW_BITS not in decode_image(dark).info  # all of its 8 bits are there


# ---- memory ---------------------------------------------------------------------------------------------------------

CHILD = """
import resource, sys
from coreg.data.decode import read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = read_image(sys.argv[1])
print(image.mode, *image.size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("side", [3000, pytest.param(int(MAX_PIXELS**0.5), marks=pytest.mark.slow)])
def test_a_float_image_takes_no_more_memory_than_an_rgb_image(tmp_path, side):
    path, count = tmp_path / "floats.tif", 4 * side * side
    head = tiff({258: (3, 32), 339: (3, 3), 273: (4, 512), 279: (4, count)}, b"", (side, side))
    with path.open("wb") as file:  # its pixels are a hole in the file
        file.write(head)
        file.truncate(512 + count)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, timeout=300, check=True
    )
    mode, width, height, peak = child.stdout.split()
    assert (mode, int(width), int(height)) == ("L", side, side)
    # two images of 4 bytes a pixel, and a strip in double precision; four double copies of the whole were taken before
    assert int(peak) < 8 * side * side + 80e6 < MAX_BYTES < 1.1e9, peak


@pytest.mark.parametrize("tags", [{322: (4, 65536), 323: (4, 16384)}, {278: (4, 1 << 30)}])
def test_a_tiff_whose_single_tile_is_larger_than_any_image_is_refused(tags):
    content = tiff({259: (3, 8), 324: (4, 8), 325: (4, 20)} | tags, zlib.compress(b"\0" * 99), (20, 20))
    with pytest.raises(UnreadableImage) as raised:
        decode_image(io.BytesIO(content))
    if 322 in tags:
        assert "20x20 pixels of this kind (TIFF, I;16) need 2.1 GB to decode" in str(raised.value)


def test_formats_whose_libraries_take_more_have_a_lower_limit(tmp_path, monkeypatch):
    small = NOISE.convert("RGB")
    monkeypatch.setattr(decoding, "MAX_BYTES", 12 * small.width * small.height)
    for suffix, reads in (("png", True), ("jpg", True), ("tif", True), ("webp", False), ("jp2", False)):
        path = tmp_path / f"x.{suffix}"
        small.save(path)
        monkeypatch.setattr(decoding, "MAX_BYTES", max(decoding.MAX_BYTES, path.stat().st_size))
        if reads:
            assert read_image(path).size == small.size
        else:
            with pytest.raises(UnreadableImage, match=r"31x23 pixels of this kind .* need .* GB to decode, more than"):
                read_image(path)


def test_an_icon_is_looked_at_before_it_is_decoded(monkeypatch):
    inside = io.BytesIO()
    Image.new("L", (5000, 5000)).save(inside, "PNG")
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, inside.tell(), 22)
    icon = struct.pack("<HHH", 0, 1, 1) + entry + inside.getvalue()
    loaded = []
    monkeypatch.setattr(Image.Image, "load", lambda image: loaded.append(image))
    with pytest.raises(UnreadableImage, match="an icon of 5000x5000 pixels; icons have at most 1024x1024"):
        decode_image(io.BytesIO(icon))
    assert not loaded
    monkeypatch.undo()
    good = io.BytesIO()
    NOISE.resize((64, 64)).convert("RGB").save(good, "ICO", sizes=[(64, 64)])
    assert decode_image(good).size == (64, 64)
    for cut in (3, 7, 21, 40):
        with pytest.raises(UnreadableImage):
            decode_image(io.BytesIO(good.getvalue()[:cut]))


def test_a_file_that_would_be_read_whole_is_refused_by_its_size(tmp_path):
    for name, beginning in (("x.webp", b"RIFF\0\0\0\0WEBPVP8 "), ("x.png", b"\x89PNG\r\n\x1a\n")):
        with (tmp_path / name).open("wb") as file:
            file.write(beginning)
            file.truncate(MAX_BYTES + 1)
        with pytest.raises(UnreadableImage, match=r"^a file of 1.1 GB$"):
            read_image(tmp_path / name)


def test_pipes_and_devices_called_like_images_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(UnreadableImage, match="not a regular file"):
            read_image(tmp_path / name)
