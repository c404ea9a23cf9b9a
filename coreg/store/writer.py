"""Writing an annotation store block by block."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from coreg.data.images import ImageList, escape
from coreg.errors import UserError
from coreg.files import making_folder, write_atomically
from coreg.plaintext import csv_rows
from coreg.store.blocks import (
    REMEDY,
    BadEvidenceError,
    DamagedBlockError,
    check_evidence,
    read_block,
    read_head,
    write_block,
)
from coreg.store.manifest import JOB, DamagedManifestError, block_files, job_hash, moved, read_manifest, set_name

CHECKSUMS = "checksums.json"  # {"samples.safetensors": sha256}; not in that file, whose bytes the store's hash covers


def continued(root: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Make sure that `root` is free, or holds a store of this very job, wherever its images lay then.

    Returns:
        The manifest to go on with: `manifest` itself for a new store; the one that is there, with the images where they
        are now; or, where that one is damaged and the blocks are of this job, what it has to be.

    Raises:
        UserError: it holds something else; the message says what differs.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return manifest
    if not root.is_dir() or not any((root / name).exists() for name in ("manifest.json", "blocks")):
        raise UserError(f"{root} holds other things than an annotation store; give an empty or new --output_dir")
    try:
        there = read_manifest(root)
    except DamagedManifestError:
        if (mended := _of_the_blocks(root, manifest)) is not None:
            return mended
        if (root / "samples.safetensors").exists() and not any((root / "blocks").glob("*")):  # nothing to lose
            return manifest
        raise UserError(
            f"{root}: manifest.json is missing or damaged, and the blocks were not made by this command; run the one that "
            f"made them, restore manifest.json from a copy, or give another --output_dir"
        ) from None
    here = manifest["images"]
    names = [set_name(images["spec"]) for images in (there["images"], here)]
    wanted = manifest | {"images": here if names[0] != names[1] else here | {"spec": there["images"]["spec"]}}
    for key in JOB:
        if there.get(key) != wanted.get(key):
            if (mended := _of_the_blocks(root, manifest)) is not None:
                return mended
            raise UserError(
                f"{root} holds the annotations of another job: {key} {difference(there.get(key), wanted.get(key))}; "
                f"give another --output_dir or remove that folder"
            )
    return moved(there, here["spec"], manifest["data_root"])


def _of_the_blocks(root: Path, manifest: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of this job in the version of the first block that can be read; None where that is of another job."""
    spec = manifest["images"]["spec"]
    places = [spec] if set_name(spec) else [spec, os.path.realpath(spec)]  # version 1 had all links resolved
    for file in block_files(root, manifest):
        try:
            job, _ = read_head(file)
        except DamagedBlockError:
            continue
        old = [manifest | {"version": 1, "images": manifest["images"] | {"spec": place}} for place in places]
        fitting = next((one for one in (manifest, *old) if job_hash(one) == job), None)
        return fitting and moved(fitting, spec, manifest["data_root"])
    return None


def difference(there: Any, here: Any) -> str:
    """In words, the first place where two values of a manifest differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        key = next(key for key in {**there, **here} if there.get(key) != here.get(key))
        return f"{key} {difference(there.get(key), here.get(key))}"
    if isinstance(there, list) and isinstance(here, list):
        if len(there) != len(here):
            return f"({len(there)} there, {len(here)} asked for)"
        return next(difference(a, b) for a, b in zip(there, here) if a != b)
    return f"({_short(there)} there, {_short(here)} asked for)"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _discard(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:  # a folder, of which nobody knows what is in it
        raise UserError(f"{file} cannot be removed ({error.strerror}); remove it and run the same command again") from None


class BlockWriter:
    """Writes a folder of blocks one by one; several writers, in processes that know nothing of each other, may share it."""

    def __init__(self, root: Path, manifest: dict[str, Any], job: str, remedy: str = REMEDY) -> None:
        """Prepare to write.

        Args:
            root: the folder.
            manifest: with `images` (their `count`) and `block_size`.
            job: hash (hex) of the job that the blocks belong to.
            remedy: what a person can do when a block cannot be written.
        """
        self.root, self.manifest, self.job, self.remedy = root, manifest, job, remedy
        self.files = block_files(root, manifest)
        self._errors: dict[int, dict[int, str]] = {}

    def rows(self, index: int) -> range:
        """The rows of block `index`."""
        size = self.manifest["block_size"]
        return range(index * size, min((index + 1) * size, self.manifest["images"]["count"]))

    def is_written(self, index: int) -> bool:
        """Whether block `index` is there and whole; a damaged one counts as not written."""
        try:
            read_block(self.files[index], index, self.job)
        except DamagedBlockError:
            return False
        return True

    def discard_damaged(self) -> list[str]:
        """Remove every block that is not what was written, so that what is there can be relied on.

        Returns:
            One line for each damaged block, with what was wrong.

        Raises:
            UserError: something lies there that cannot be removed, such as a folder.
        """
        damaged = []
        for index, file in enumerate(self.files):
            if file.exists():
                try:
                    read_block(file, index, self.job)
                except DamagedBlockError as error:
                    damaged.append(f"{file.name}: {error}")
                    _discard(file)
        if not all(file.exists() for file in self.files):
            _discard(self.root / "errors.csv")  # it says "finished"
        return damaged

    def write(self, index: int, tensors: dict[str, np.ndarray], errors: dict[int, str]) -> None:
        """Write block `index` as it is; `errors` maps rows of the whole list to why the image could not be read."""
        try:
            write_block(self.files[index], index, self.job, tensors, errors, self.remedy)
        except UserError:
            # Whoever took this block over because we seemed dead may have finished the job and cleared up after us.
            if not self.is_written(index):
                raise

    def unreadable(self) -> dict[int, str]:
        """Rows that could not be read in the blocks written so far, by any process, with the reasons."""
        for index, file in enumerate(self.files):
            if index not in self._errors and file.exists():
                with contextlib.suppress(DamagedBlockError):  # counts as not written
                    self._errors[index] = read_head(file)[1]
        return {row: reason for index in sorted(self._errors) for row, reason in self._errors[index].items()}

    def complete(self, paths: Iterable[str], safe_csv: bool = False) -> None:
        """Write errors.csv (see `csv_rows`), which ends the job; every block must be there. One process calls this.

        Raises:
            UserError: a block was damaged since, or errors.csv cannot be written.
        """
        reasons: dict[int, str] = {}
        for index, file in enumerate(self.files):
            try:
                reasons |= read_block(file, index, self.job)[1]
            except DamagedBlockError as error:
                raise UserError(f"{file} is damaged: {error}; run the same command again") from None
        write_atomically(self.root / "errors.csv", errors_csv(paths, reasons, safe_csv), self.remedy)
        for leftover in (self.root / "blocks").glob(".tmp.*"):  # of writers that were killed
            leftover.unlink(missing_ok=True)


class StoreWriter(BlockWriter):
    """Writes an annotation store."""

    def __init__(self, root: Path, manifest: dict[str, Any], remedy: str = REMEDY) -> None:
        """Prepare to write; `manifest` is of the job (see `make_manifest`), or what `continued` gives of a folder there."""
        super().__init__(root, manifest, job_hash(manifest), remedy)

    def start(self, images: ImageList) -> None:
        """Make the folder with everything but blocks, or go on with the store of the same job.

        One process of a job calls this; if several jobs do at the same time, one of them makes the folder.

        Raises:
            UserError: the folder holds something else, or cannot be written.
        """
        is_new = not any((self.root / name).exists() for name in ("manifest.json", "blocks"))
        self.manifest = continued(self.root, self.manifest)
        self.job = job_hash(self.manifest)
        labels = np.full(len(images), -1) if images.labels is None else images.labels
        tables = {"label": labels.astype(np.int32), "split": images.split.astype(np.uint8)}
        samples = save(tables if images.tags is None else tables | {"tags": images.tags.astype(np.int8)})
        content = {
            "images.txt": b"".join(os.fsencode(escape(path)) + b"\n" for path in images.paths),
            "samples.safetensors": samples,
            CHECKSUMS: _as_json({"samples.safetensors": hashlib.sha256(samples).hexdigest()}),
            "manifest.json": _as_json(self.manifest),
        }
        if not is_new:
            self._renew(content)
            return
        try:
            # All at once: a folder that is killed half-way is not taken for a store.
            with making_folder(self.root, "give another --output_dir") as folder:
                (folder / "blocks").mkdir()
                for name, text in content.items():
                    write_atomically(folder / name, text)
        except UserError:
            if not (self.root / "manifest.json").exists():
                raise
            self.start(images)  # another job made it in the meantime

    def _renew(self, content: dict[str, bytes]) -> None:
        """Write what is missing, damaged, or not what it was: labels and the images' place are no part of the job."""
        try:
            (self.root / "blocks").mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.root / 'blocks'}: {error.strerror}; give another --output_dir") from None
        for name, text in content.items():
            file = self.root / name
            if not file.is_file() or file.read_bytes() != text:
                write_atomically(file, text)

    def write(self, index: int, tensors: dict[str, np.ndarray], errors: dict[int, str]) -> None:
        """Write block `index`; rows in `errors` (numbers in the whole list) abstain: votes -1, uniform probabilities.

        Where candidate sets were drawn no image is opened, and there are no such rows.

        Args:
            index: which block.
            tensors: votes int16 (n, T), probs float16 (n, C) and, where there are any, features float16 (n, D),
                tiles float16 (n, M, D) and answers (see `blocks.pack_answers`); or candidates bool (n, C) alone.
            errors: row number -> why the image could not be read.

        Raises:
            UserError: it cannot be written, or is no evidence, such as NaN.
        """
        rows = self.rows(index)
        bad = [row - rows.start for row in errors]
        tensors = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
        for name, value in (("votes", -1), ("probs", 1 / len(self.manifest["class_names"])), ("features", 0), ("tiles", 0)):
            if name in tensors:
                tensors[name][bad] = value
        try:
            check_evidence(tensors, errors, rows, self.manifest)
        except BadEvidenceError as error:
            raise UserError(
                f"{self.root}: block {index} is not written: {describe(error, self.root, self.manifest)}"
            ) from None
        super().write(index, tensors, errors)

    def write_all(
        self, images: ImageList, part: Callable[[slice], dict[str, np.ndarray]], reasons: Mapping[int, str] | None = None
    ) -> None:
        """Make the folder, or go on with it, write every block, and complete the store.

        Args:
            part: the tensors of some rows. reasons: row number -> why the image could not be read.
        """
        self.start(images)
        self.discard_damaged()
        for index in range(len(self.files)):
            rows = self.rows(index)
            errors = {row: reasons[row] for row in rows if row in reasons} if reasons else {}
            self.write(index, part(slice(rows.start, rows.stop)), errors)
        self.complete(images.paths)


def errors_csv(paths: Iterable[str], reasons: dict[int, str], safe_csv: bool) -> bytes:
    """The content of errors.csv, which follows from the blocks: path and reason of every image that could not be read."""
    text = io.StringIO(newline="")
    write = csv_rows(text, safe_csv)
    write(["path", "reason"])
    for row, path in enumerate(paths) if reasons else ():
        if row in reasons:
            write([path, reasons[row]])
    return os.fsencode(text.getvalue())


def describe(error: BadEvidenceError, root: Path, manifest: dict[str, Any]) -> str:
    """What is wrong with an image's evidence, and what a person can do about it."""
    if error.row is None:
        return f"{error}; annotate again into a new --output_dir"
    name = str(error.row)
    with contextlib.suppress(OSError, IndexError):
        name = repr(os.fsdecode((root / "images.txt").read_bytes().split(b"\n")[error.row]))
    what = f"image {name}: {error}"
    if manifest["model"].get("precision") == "fp16":
        return f"{what}; numbers exceed the range of fp16: annotate with --precision bf16 into a new --output_dir"
    return f"{what}; its model or weights are damaged: get them again, and annotate into a new --output_dir"


def _as_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
