"""The decoded images of an image list as one file that all processes and all later runs share.

A folder of its own, named by image list, size, channels and resize mode, so that any number lie beside each other:

    manifest.json             schema and job: image list, side, channels, resize mode, images a block
    pixels.u8                 uint8 (N, c, H, W), image after image in the order of the list; zeros for unreadable ones
    blocks/00000.safetensors  written when the images of a block are on the disk: crc32 uint32 (n,), one an image, and why
                              images could not be read
    errors.csv                path and reason of every unreadable image; written last

Blocks are claimed, checked and gone on with as those of an annotation store are: any number of processes, of one job or of
several, decode them together, and killed anywhere they leave whole ones. Two that decode the same block write the same
bytes. Blocks begin where pages do, so that no page has two writers, which would matter on network disks.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL

import coreg
from coreg.data.decode import Resize, decode
from coreg.data.images import ImageList, list_hash
from coreg.data.pixels import CHUNK_BYTES, StoredPixels, write_at
from coreg.errors import UserError
from coreg.files import making_folder, reason_of, write_atomically
from coreg.records import Number, RecordError, hash_of, read_record
from coreg.store.blocks import DamagedBlockError, read_block
from coreg.store.manifest import set_name
from coreg.store.writer import BlockWriter

SCHEMA, VERSION = "coreg-pixels", 1
BLOCK_BYTES = 64 << 20  # of a block, as near as pages allow
PAGE = 4096
COMPARED = 8  # images that are decoded again when a file is shared, to see that they are the same
JOB = ("images", "size", "channels", "resize")  # what the folder is named by
MANIFEST = {
    "schema": str,
    "version": object,
    "images": {"count": Number(1), "sha256": str, "name": str},
    "size": Number(1, 8192),
    "channels": Number(1, 3),
    "resize": str,
    "block_size": Number(1),
}
CONTENT = ("errors.csv", "blocks", "claims", "pixels.u8", "manifest.json")
REMEDY = "what is decoded is kept: free some space and run the same command again, or give another --pixels_dir"


def make_manifest(images: ImageList, size: int, channels: int, resize: Resize) -> dict[str, Any]:
    """The manifest of the decoded images of a list."""
    length = size * size * channels
    step = PAGE // math.gcd(PAGE, length)  # images after which a page ends, too
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "images": {"count": len(images), "sha256": list_hash(images.paths), "name": set_name(images.spec)},
        "size": size,
        "channels": channels,
        "resize": resize,
        "block_size": step * max(1, BLOCK_BYTES // (step * length)),
        "versions": {"coreg": coreg.__version__, "pillow": PIL.__version__},
    }


def _hash(manifest: dict[str, Any], *more: str) -> str:
    return hash_of({key: manifest[key] for key in (*JOB, *more)})


def folder_name(manifest: dict[str, Any]) -> str:
    """Such as `32x32x3-squash-0123456789ab`."""
    size, channels, resize = (manifest[key] for key in ("size", "channels", "resize"))
    return f"{size}x{size}x{channels}-{resize}-{_hash(manifest)[:12]}"


def read_manifest(root: Path) -> dict[str, Any]:
    """What manifest.json of a folder of decoded images holds.

    Raises:
        UserError: there is none, or another version wrote it.
    """
    try:
        manifest = read_record(root / "manifest.json", MANIFEST)
        if (manifest["schema"], manifest["version"]) != (SCHEMA, VERSION):
            raise RecordError(f"schema {manifest['schema']} version {manifest['version']}, expected {SCHEMA} {VERSION}")
    except RecordError as error:
        raise UserError(
            f"{root} holds no decoded images (manifest.json: {error}); remove that folder, or give another --pixels_dir"
        ) from None
    return manifest


class PixelWriter(BlockWriter):
    """Writes decoded images, and reads them when all are there."""

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        """Prepare to write; with what is there already, blocks are as long as they were."""
        if (root / "manifest.json").exists():
            manifest = manifest | {"block_size": read_manifest(root)["block_size"]}
        super().__init__(root, manifest, _hash(manifest, "block_size"), REMEDY)
        self.path = root / "pixels.u8"
        self.shape = (manifest["channels"], manifest["size"], manifest["size"])
        self.length = math.prod(self.shape)
        self.bytes = manifest["images"]["count"] * self.length

    @property
    def finished(self) -> bool:
        """Whether all images are there."""
        return (self.root / "errors.csv").exists() and self.path.exists() and self.path.stat().st_size == self.bytes

    def forget(self, blocks: Iterable[int]) -> None:
        """Let blocks be decoded again."""
        for index in blocks:
            (self.root / "errors.csv").unlink(missing_ok=True)  # it says "finished"
            self.files[index].unlink(missing_ok=True)
            self._errors.pop(index, None)

    def decode_block(self, images: ImageList, index: int, workers: int) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """Decode the images of block `index` and write them; gives what `write` then takes, the record that they are there.

        Raises:
            UserError: the disk is full.
        """
        rows, manifest = self.rows(index), self.manifest
        errors: dict[int, str] = {}
        checksums, step = [], max(1, CHUNK_BYTES // self.length)
        try:
            descriptor = os.open(self.path, os.O_WRONLY)
            try:
                for start in range(rows.start, rows.stop, step):
                    part = np.arange(start, min(start + step, rows.stop))
                    size, channels = manifest["size"], manifest["channels"]
                    pixels = decode(images, part, size, channels, workers, errors, manifest["resize"]).numpy()
                    write_at(descriptor, pixels, start * self.length)
                    checksums += [zlib.crc32(image) for image in pixels]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"cannot write {self.path} ({reason_of(error)}), which takes {gigabytes(self.bytes)}; {REMEDY}"
            ) from None
        return {"crc32": np.array(checksums, dtype=np.uint32)}, errors

    def open(self) -> tuple[StoredPixels, dict[int, str]]:
        """The images, when all of them are there, and row -> reason of those that could not be read.

        Raises:
            UserError: the record of a block is damaged.
        """
        checksums, errors = [], {}
        for index, file in enumerate(self.files):
            try:
                tensors, reasons, _ = read_block(file, index, self.job)
            except DamagedBlockError as error:
                raise UserError(f"{file} is damaged: {error}; run the same command again") from None
            checksums.append(tensors["crc32"])
            errors |= reasons
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({error.strerror}); run the same command again") from None
        return StoredPixels(str(self.path), descriptor, self.shape, np.concatenate(checksums)), errors


def start_folder(root: Path, manifest: dict[str, Any], images: ImageList, wanted: np.ndarray) -> list[str]:
    """Make the folder, or go on with the one of the same images; one process of a job calls this.

    Blocks in which one of the rows `wanted` could not be read are decoded again: it could be read at some time.

    Returns:
        one line for each block whose record was damaged.

    Raises:
        UserError: the disk has no room for it, the folder cannot be written, or holds other images of these names.
    """
    new, made = PixelWriter(root, manifest), (root / "manifest.json").exists
    if not made():
        _check_room(new)
        try:
            # All at once: a folder that is killed half-way is not taken for one.
            with making_folder(root, "give another --pixels_dir") as folder:
                (folder / "blocks").mkdir()
                _make_file(folder / new.path.name, new.bytes)
                write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        except UserError:
            if not made():  # by another job at the same time either
                raise
    writer = PixelWriter(root, manifest)
    if not writer.path.is_file() or writer.path.stat().st_size != writer.bytes:
        _check_room(writer)
        writer.forget(range(len(writer.files)))
        _make_file(writer.path, writer.bytes)
    damaged = writer.discard_damaged()
    lost = np.intersect1d(np.array(list(writer.unreadable()), dtype=np.int64), wanted)
    writer.forget(np.unique(lost // writer.manifest["block_size"]).tolist())
    _compare(writer, images)
    if not writer.finished:
        _check_room(writer)
    return damaged


def _make_file(path: Path, length: int) -> None:
    """A file of zeros that takes no room yet."""
    try:
        with path.open("ab") as file:
            file.truncate(length)
    except OSError as error:
        raise UserError(f"cannot write {path} ({reason_of(error)}); give another --pixels_dir") from None


def _check_room(writer: PixelWriter) -> None:
    """Raise a UserError where what is still to be written is more than the disk has left."""
    place = next(place for place in (writer.root, *writer.root.absolute().parents) if place.exists())
    missing = writer.bytes - (writer.path.stat().st_blocks * 512 if writer.path.exists() else 0)
    free = shutil.disk_usage(place).free
    if missing > free:
        raise UserError(
            f"{writer.manifest['images']['count']} decoded images take {gigabytes(writer.bytes)} in {writer.root}, and for "
            f"{gigabytes(missing)} of them the disk has {gigabytes(free)} left; {REMEDY}"
        )


def _compare(writer: PixelWriter, images: ImageList) -> None:
    """Decode a few images again that are there: others may have the same names.

    Raises:
        UserError: they are others.
    """
    there = [index for index, file in enumerate(writer.files) if file.exists()]
    # two or more of a block, so that of a single block it is not the first image alone
    spread = [np.linspace(rows.start, rows.stop - 1, COMPARED).astype(np.int64) for rows in map(writer.rows, there)]
    rows = np.unique(np.concatenate(spread)) if spread else np.zeros(0, dtype=np.int64)
    if len(rows) > COMPARED:
        rows = rows[np.linspace(0, len(rows) - 1, COMPARED).astype(np.int64)]
    failed, (c, side, _) = writer.unreadable(), writer.shape
    anew = decode(images, rows, side, c, 1, failed, writer.manifest["resize"]).numpy()
    stored = np.empty_like(anew)
    with writer.path.open("rb") as file:
        StoredPixels(str(writer.path), file.fileno(), writer.shape).read(rows, stored)
    for row, image, here in zip(rows.tolist(), anew, stored):
        if row not in failed and not np.array_equal(image, here):
            raise UserError(
                f"{writer.root} holds other pixels of {images.paths[row]!r} than {images.spec} (another set of the same "
                f"names, another version of Pillow, or damage): give another --pixels_dir, or type python -m coreg.store "
                f"delete {writer.root}"
            )


def gigabytes(count: int) -> str:
    """A number of bytes for a person."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def pixel_folders(places: list[Path]) -> list[Path]:
    """Folders of decoded images that are one of `places`, lie in one, or in the `pixels` of a store that is one."""
    found = []
    for place in places:
        for folder in (place, *sorted(place.glob("*")), *sorted(place.glob("pixels/*"))):
            record = folder / "manifest.json"
            try:
                if record.is_file() and read_record(record, {"schema": str})["schema"] == SCHEMA:
                    found.append(folder)
            except RecordError:
                continue
    return found


def describe(root: Path) -> str:
    """One line about a folder of decoded images, for a person."""
    writer = PixelWriter(root, read_manifest(root))
    there = sum(file.exists() for file in writer.files)
    state = "complete" if writer.finished else f"{there} of {len(writer.files)} blocks"
    taken = writer.path.stat().st_blocks * 512 if writer.path.exists() else 0
    bad = len(writer.unreadable())
    return (
        f"{root}: {writer.manifest['images']['count']} images, {gigabytes(taken)} of {gigabytes(writer.bytes)}, {state}, "
        f"{bad} unreadable"
    )


def delete(root: Path) -> None:
    """Remove a folder of decoded images; a training that has it open goes on with it.

    Raises:
        UserError: it is something else, or cannot be removed.
    """
    read_manifest(root)
    others = sorted(path.name for path in root.iterdir() if path.name not in CONTENT and not path.name.startswith(".tmp."))
    if others:
        raise UserError(f"{root} holds {others[0]} besides decoded images; move it away, then delete them")
    try:
        shutil.rmtree(root)
    except OSError as error:
        raise UserError(f"cannot remove {root} ({error.strerror}); remove it by hand") from None
