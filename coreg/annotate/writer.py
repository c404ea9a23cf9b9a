"""Writing an annotation store block by block."""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from coreg.annotate.blocks import DamagedBlockError, read_block, read_errors, write_block
from coreg.annotate.manifest import JOB, block_files, job_hash, read_manifest
from coreg.data.images import ImageList, escape
from coreg.errors import UserError
from coreg.files import write_atomically
from coreg.plaintext import csv_rows


def refuse_other_job(root: Path, manifest: dict[str, Any]) -> None:
    """Make sure that `root` is free, or holds a store of this very job.

    Raises:
        UserError: it holds something else; the message says what differs.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    if not (root / "manifest.json").exists():
        raise UserError(f"{root} holds other things than an annotation store; give an empty or new --output_dir")
    there = read_manifest(root)
    for key in JOB:
        if there[key] != manifest[key]:
            raise UserError(
                f"{root} holds the annotations of another job: {key} {_difference(there[key], manifest[key])}; "
                f"give another --output_dir or remove that folder"
            )


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        key = next(key for key in {**there, **here} if there.get(key) != here.get(key))
        return f"{key} {_difference(there.get(key), here.get(key))}"
    if isinstance(there, list) and isinstance(here, list):
        if len(there) != len(here):
            return f"({len(there)} there, {len(here)} asked for)"
        return next(_difference(a, b) for a, b in zip(there, here) if a != b)
    return f"({there!r} there, {here!r} asked for)"


class StoreWriter:
    """Writes a store block by block; several writers, in processes that know nothing of each other, may share a folder."""

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        self.root, self.manifest, self.job = root, manifest, job_hash(manifest)
        self.files = block_files(root, manifest)
        self._errors: dict[int, dict[int, str]] = {}

    def begin(self, images: ImageList) -> None:
        """Make the folder with everything but blocks, or go on with the store of the same job.

        One process of a job calls this; if several jobs do at the same time, one of them makes the folder.

        Raises:
            UserError: the folder holds something else, or cannot be written.
        """
        refuse_other_job(self.root, self.manifest)
        labels = np.full(len(images), -1) if images.labels is None else images.labels
        samples = save({"label": labels.astype(np.int32), "split": images.split.astype(np.uint8)})
        lists = {"images.txt": b"".join(os.fsencode(escape(path)) + b"\n" for path in images.paths)}
        lists["samples.safetensors"] = samples
        if (self.root / "manifest.json").exists():
            for name, content in lists.items():  # labels may have come or changed since: they are no part of the job
                file = self.root / name
                if not file.exists() or file.read_bytes() != content:
                    write_atomically(file, content)
            return
        # All at once: a folder that is killed half-way is not taken for a store.
        partial = self.root.with_name(f".{self.root.name}.{secrets.token_hex(4)}.partial")
        try:
            for old in self.root.parent.glob(f".{self.root.name}.*.partial"):
                shutil.rmtree(old, ignore_errors=True)
            (partial / "blocks").mkdir(parents=True)
            lists["manifest.json"] = json.dumps(self.manifest, indent=1, ensure_ascii=False).encode() + b"\n"
            for name, content in lists.items():
                write_atomically(partial / name, content)
            partial.replace(self.root)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if (self.root / "manifest.json").exists():  # another job made it in the meantime
                refuse_other_job(self.root, self.manifest)
                return
            raise UserError(f"cannot make {self.root}: {error.strerror}; give another --output_dir") from None

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
        """
        damaged = []
        for index, file in enumerate(self.files):
            if file.exists():
                try:
                    read_block(file, index, self.job)
                except DamagedBlockError as error:
                    damaged.append(f"{file.name}: {error}")
                    file.unlink(missing_ok=True)
        if not all(file.exists() for file in self.files):
            (self.root / "errors.csv").unlink(missing_ok=True)  # it says "finished"
        return damaged

    def write(self, index: int, tensors: dict[str, np.ndarray], errors: dict[int, str]) -> None:
        """Write block `index`; rows in `errors` (numbers in the whole list) abstain: votes -1, uniform probabilities.

        Args:
            index: which block.
            tensors: votes int16 (n, T), probs float16 (n, C) and, where there are any, features float16 (n, D) and
                answers (see `blocks.pack_answers`).
            errors: row number -> why the image could not be read.
        """
        bad = [row - self.rows(index).start for row in errors]
        tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
        tensors["votes"][bad] = -1
        tensors["probs"][bad] = 1 / tensors["probs"].shape[1]
        if "features" in tensors:
            tensors["features"][bad] = 0
        try:
            write_block(self.files[index], index, self.job, tensors, errors)
        except UserError:
            # Whoever took this block over because we seemed dead may have finished the job and cleared up behind us.
            if not self.is_written(index):
                raise

    def unreadable(self) -> dict[int, str]:
        """Rows that could not be read in the blocks written so far, by any process, with the reasons."""
        for index, file in enumerate(self.files):
            if index not in self._errors and file.exists():
                self._errors[index] = read_errors(file)
        return {row: reason for index in sorted(self._errors) for row, reason in self._errors[index].items()}

    def finish(self, paths: Iterable[str], safe_csv: bool = False) -> None:
        """Write errors.csv (see `csv_rows`), which ends the job; every block must be there. One process calls this."""
        text = io.StringIO(newline="")
        write = csv_rows(text, safe_csv)
        write(["path", "reason"])
        reasons: dict[int, str] = {}
        for index, file in enumerate(self.files):
            reasons |= read_block(file, index, self.job)[1]
        for row, path in enumerate(paths):
            if row in reasons:
                write([path, reasons[row]])
        write_atomically(self.root / "errors.csv", os.fsencode(text.getvalue()))
        for leftover in (self.root / "blocks").glob(".tmp.*"):  # of writers that were killed
            leftover.unlink(missing_ok=True)
