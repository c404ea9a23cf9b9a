"""A folder as people have it: every odd file is annotated or listed with the reason, and none is dropped in silence."""

import csv
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image, features
from test_annotate_annotators import save_tiny_clip

from annotate_vlm import main
from coreg.store.store import AnnotationStore
from coreg.weak.rules import candidate_sets

NAMES = ["red thing", "green thing", "blue thing"]
GENERATOR = np.random.default_rng(0)
NOISE = Image.fromarray(GENERATOR.integers(0, 256, (40, 56, 3), dtype=np.uint8))
GREY = Image.fromarray(GENERATOR.integers(0, 256, (40, 56), dtype=np.uint8))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


def good_files(root):
    """Files that must be read: name -> how to write it."""
    exif, broken_exif = Image.Exif(), b"Exif\0\0II*\0\xff\xff\xff\xff"
    exif[0x0112] = 6
    frames = [Image.new("RGB", (30, 30), colour) for colour in ("red", "lime", "blue")]
    deep = Image.fromarray(GENERATOR.integers(0, 65536, (40, 56), dtype=np.uint16))
    numbers = GENERATOR.normal(size=(40, 56)).astype(np.float32)
    numbers[0, 0], numbers[1, 1] = np.nan, np.inf
    clear = NOISE.convert("RGBA")
    clear.putalpha(GREY)
    palette = NOISE.quantize(17)

    def saved(image, **options):
        return lambda path: image.save(path, **options)

    several = {"save_all": True, "append_images": frames[1:]}
    files = {
        "plain.jpg": saved(NOISE, quality=95),
        "plain.png": saved(NOISE),
        "SHOUTED.JPG": saved(NOISE),
        "progressive.jpeg": saved(NOISE, progressive=True),
        "grey.jpg": saved(GREY),
        "cmyk.jpg": saved(NOISE.convert("CMYK")),
        "cmyk.tif": saved(NOISE.convert("CMYK")),
        "lab.tif": saved(Image.merge("LAB", NOISE.split())),
        "deep.png": saved(deep),
        "deep.tiff": saved(deep),
        "deep.pgm": saved(deep),
        "integers.tif": saved(Image.fromarray(GENERATOR.integers(0, 10**6, (40, 56), dtype=np.int32))),
        "floats.tif": saved(Image.fromarray(numbers)),
        "palette.png": saved(palette),
        "palette.gif": saved(palette),
        "see-through palette.png": saved(palette, transparency=3),
        "see-through.png": saved(clear),
        "see-through grey.png": saved(clear.convert("LA")),
        "bits.png": saved(GREY.convert("1")),
        "bits.tif": saved(GREY.convert("1"), compression="group4"),
        "turned.jpg": saved(NOISE, exif=exif),
        "turned.png": saved(NOISE, exif=exif),
        "broken exif.jpg": saved(NOISE, exif=broken_exif),
        "moving.gif": saved(frames[0], **several),
        "moving.png": saved(frames[0], **several),
        "pages.tif": saved(frames[0], **several),
        "plain.bmp": saved(NOISE),
        "plain.ppm": saved(NOISE),
        "plain.tga": saved(NOISE),
        "icon.ico": saved(NOISE, sizes=[(32, 32)]),
        "png called.jpg": saved(NOISE, format="PNG"),
        "one pixel.png": saved(Image.new("RGB", (1, 1), "red")),
        "thin.png": saved(NOISE.resize((150, 1))),
        "rubbish behind.jpg": lambda path: (NOISE.save(path), path.write_bytes(path.read_bytes() + b"\0rubbish" * 99)),
        "new\nline.png": saved(NOISE),
        "cr\rand\ttab.png": saved(NOISE),
        "back\\slash.png": saved(NOISE),
        "-dash, comma \"quote\" 'tick' ; $(echo) `x` %s {}.png": saved(NOISE),
        "caf\u00e9.png": saved(NOISE),
        "cafe\u0301.png": saved(NOISE),  # looks the same and is another name
        "猫 🐈.png": saved(NOISE),
        "l" * 251 + ".png": saved(NOISE),
        "/".join(f"{level}" for level in range(30)) + "/deep.png": saved(NOISE),
        "folder.png/inside.png": saved(NOISE),
        "a copy.png": saved(NOISE),
        os.fsdecode(b"latin \xe9.png"): saved(NOISE),
    }
    if int(PIL.__version__.partition(".")[0]) >= 13:  # earlier ones write such a file and call it truncated
        files["ycc.tif"] = saved(NOISE.convert("YCbCr"))
    if features.check("webp"):
        files |= {"plain.webp": saved(NOISE), "see-through.webp": saved(clear, lossless=True)}
        files |= {"moving.webp": saved(frames[0], **several)}
    if features.check("jpg_2000"):
        files |= {"plain.jp2": saved(NOISE)}
    if features.check("avif"):
        files |= {"plain.avif": saved(NOISE)}
    return {root / name: write for name, write in files.items()}


def bad_files(root):
    """Files that cannot be read: name -> (how to write it, what errors.csv says)."""

    def holding(content):
        return lambda path: path.write_bytes(content)

    def cut(suffix, keep=0.5):
        def write(path):
            NOISE.save(path)
            path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

        return write

    def wrong_checksum(path):
        NOISE.save(path)
        content = bytearray(path.read_bytes())
        content[29] ^= 255  # of the header
        path.write_bytes(content)

    files = {
        "cut.jpg": (cut("jpg"), "truncated"),
        "cut early.jpg": (cut("jpg", 0.02), ""),
        "cut.png": (cut("png"), "truncated"),
        "cut.gif": (cut("gif"), "truncated"),
        "cut.bmp": (cut("bmp"), "truncated"),
        "cut.tif": (cut("tif"), ""),
        "wrong checksum.png": (wrong_checksum, ""),
        "empty.jpg": (holding(b""), "empty file"),
        "text.png": (holding(b"this is no image"), "not an image of a known format"),
        "page.jpg": (holding(b"<html><body>404 Not Found</body></html>"), "not an image of a known format"),
        "random.jpg": (holding(GENERATOR.bytes(5000)), "not an image of a known format"),
        "jpeg by its first bytes.jpg": (holding(b"\xff\xd8\xff\xe0" + GENERATOR.bytes(500)), ""),
        "pickle.png": (holding(pickle.dumps({"a": 1})), "not an image of a known format"),
        "script.jpg": (holding(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nquit\n"), "not an image of a known"),
        "drawing.png": (holding(b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"), "not an image"),
        "bomb.png": (holding(png_that_claims(10_000, 10_000)), "10000x10000 pixels are more"),
        "large bomb.png": (holding(png_that_claims(2**20, 2**20)), "bomb"),
        "endless strip.png": (holding(png_that_claims(60_000, 1)), "one side more than"),
        "pipe.png": (os.mkfifo, "not a regular file"),
        "nowhere.png": (lambda path: path.symlink_to(root / "not there.png"), "no such file"),
        "itself.png": (lambda path: path.symlink_to(path), "symbolic links"),
    }
    if features.check("webp"):
        files |= {"cut.webp": (cut("webp"), "")}
    return {root / name: content for name, content in files.items()}


pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    place = tmp_path_factory.mktemp("nasty")
    root = place / "photos"
    good, bad = good_files(root), bad_files(root)
    for path, write in [*good.items(), *((path, write) for path, (write, _) in bad.items())]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    (root / "0" / "up").symlink_to(root)  # a loop
    (root / "linked.png").symlink_to(root / "plain.png")
    good[root / "linked.png"] = None
    for other in (".hidden.png", "Thumbs.db", "notes.txt", "film.mp4", ".cache/x.png"):  # not images, or hidden
        (root / other).parent.mkdir(exist_ok=True)
        (root / other).write_bytes(b"x")
    save_tiny_clip(place / "model")
    (place / "classes.txt").write_text("\n".join(NAMES))
    options = f"--images {root} --vlm local-dir:{place}/model --classes {place}/classes.txt --batch_size 8 --block_size 16"
    main([*options.split(), "--output_dir", str(place / "ann"), "--workers", "2"])
    return place, {str(p.relative_to(root)): content for p, content in good.items()}, {
        str(p.relative_to(root)): reason for p, (_, reason) in bad.items()
    }  # fmt: skip


def test_every_file_is_annotated_or_listed_with_its_reason(corpus):
    place, good, bad = corpus
    assert len(good) + len(bad) >= 70
    store = AnnotationStore.open(place / "ann")
    assert set(store.paths) == set(good) | set(bad) and len(store) == len(good) + len(bad)
    assert store.paths == sorted(store.paths, key=os.fsencode)
    assert {path for path, unreadable in zip(store.paths, store.unreadable) if unreadable} == set(bad)
    with (place / "ann" / "errors.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        listed = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert set(listed) == set(bad)
    for path, words in bad.items():
        assert words in listed[path] and "\n" not in listed[path] and str(place) not in listed[path] and listed[path]
    assert (store.votes()[store.unreadable] == -1).all() and (store.votes()[~store.unreadable] >= 0).all()
    assert candidate_sets(store)[store.unreadable].all()


def test_copies_and_turned_images_are_seen_as_what_they_are(corpus):
    store = AnnotationStore.open(corpus[0] / "ann")
    seen = dict(zip(store.paths, store.features().astype(np.float32)))

    def alike(one, two):
        return np.abs(seen[one] - seen[two]).max() < 0.01

    for same in ("a copy.png", "linked.png", "new\nline.png", "plain.bmp", "plain.ppm", "plain.tga", "png called.jpg"):
        assert alike("plain.png", same), same
    assert not alike("turned.png", "plain.png") and not alike("grey.jpg", "plain.png")
    assert alike("moving.gif", "moving.png") and alike("moving.png", "pages.tif")  # the first frame
    report = (corpus[0] / "ann" / "report.html").read_text(encoding="utf-8")
    assert "images look to the model like copies of others" in report and "&lt;" not in report and "a copy.png = " in report


def test_more_errors_than_allowed_stop_the_job(corpus, capsys):
    place, _, bad = corpus
    output = place / "strict"
    options = f"--images {place}/photos --vlm local-dir:{place}/model --classes {place}/classes.txt --output_dir {output}"
    with pytest.raises(SystemExit) as raised:
        main([*options.split(), "--max_errors", "5", "--block_size", "16", "--workers", "0"])
    assert raised.value.code == 2
    line = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert len(line) == 1 and "images cannot be read and --max_errors is 5" in line[0]
    main([*options.split(), "--max_errors", str(len(bad)), "--block_size", "16", "--workers", "0"])
    assert AnnotationStore.open(output).unreadable.sum() == len(bad)
    assert Path(output / "errors.csv").read_bytes() == Path(place / "ann" / "errors.csv").read_bytes()
