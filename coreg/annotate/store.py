"""The annotation store: what an annotator saw in every image, kept as evidence and not as decisions.

A store is a folder:

    manifest.json            schema and job: class names, templates, model, image list, block size, tool versions
    images.txt               one path a row; the row number is the image's identity everywhere (see `sources.escape`)
    samples.safetensors      label int32 (N,) with -1 for unknown, split uint8 (N,) with 0 = train, 1 = test
    blocks/00000.safetensors votes int16 (n, T) with -1 for abstention, probs float16 (n, C) mean over templates,
                             features float16 (n, D) where the annotator has them; b-th block = rows b*block_size ...
    errors.csv               path and reason of every unreadable image; written last, so it also says "finished"

Blocks are the unit of work. Each carries the hash of its job and the checksum of its tensors, is written to a temporary
name and then renamed; so processes that are killed anywhere leave only whole blocks, and others can go on from there.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from coreg.annotate.blocks import DamagedBlockError, read_block, write_atomically, write_block
from coreg.data.sources import ImageList, escape, list_hash, open_images, unescape
from coreg.errors import UserError

SCHEMA = "coreg-annotations"
VERSION = 1
JOB = ("class_names", "templates", "model", "images", "block_size")  # the manifest's entries that make two jobs differ


@dataclass
class AnnotationStore:
    """An opened, verified and finished store.

    Attributes:
        root: its folder.
        manifest: the content of manifest.json.
        paths: N image paths; the row number is the identity of an image.
        labels: int64 (N,), -1 where unknown, or None without any; for reporting only.
        split: uint8 (N,), 0 = train, 1 = test.
        unreadable: bool (N,), images that could not be read; all templates abstain and the probabilities are uniform.
        hash: sha256 (hex) over the job and all checksums; changes with anything that a trainer could learn from.
    """

    root: Path
    manifest: dict[str, Any]
    paths: list[str]
    labels: np.ndarray | None
    split: np.ndarray
    unreadable: np.ndarray
    hash: str

    @classmethod
    def open(cls, folder: str | Path) -> AnnotationStore:
        """Open a store and verify its schema, its completeness and every checksum.

        Raises:
            UserError: the folder is missing, no store, of another schema, unfinished or damaged.
        """
        root = Path(folder)
        manifest = read_manifest(root)
        job = job_hash(manifest)
        again = "run the same annotate_vlm.py command again"
        files = _block_files(root, manifest)
        missing = [file.name for file in files if not file.exists()]
        if missing or not (root / "errors.csv").exists():
            raise UserError(
                f"annotation store {root} is unfinished ({len(missing)} of {len(files)} blocks missing); {again}"
            )
        paths, labels, split = _read_samples(root, manifest)
        unreadable = np.zeros(len(paths), dtype=bool)
        checksums = [job, hashlib.sha256((root / "samples.safetensors").read_bytes()).hexdigest()]
        for index, file in enumerate(files):
            try:
                _, errors, checksum = read_block(file, index, job)
            except DamagedBlockError as error:
                raise UserError(f"annotation store {root} is damaged: {file.name}: {error}; {again}") from None
            unreadable[list(errors)] = True
            checksums.append(checksum)
        digest = hashlib.sha256("\n".join(checksums).encode()).hexdigest()
        known = labels.astype(np.int64) if (labels >= 0).any() else None
        return cls(root, manifest, paths, known, split, unreadable, digest)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def class_names(self) -> list[str]:
        """C class names; their order gives the class indices."""
        return self.manifest["class_names"]

    @property
    def templates(self) -> list[str]:
        """T prompt templates; index 0 is the single template."""
        return self.manifest["templates"]

    @property
    def images_spec(self) -> str:
        """What `coreg.data.sources.open_images` takes to open the images again."""
        return self.manifest["images"]["spec"]

    def votes(self) -> np.ndarray:
        """int16 (N, T): the class that each template names, -1 for abstention."""
        return self._column("votes")

    def probs(self) -> np.ndarray:
        """float16 (N, C): mean over the templates of the class probabilities."""
        return self._column("probs")

    def features(self) -> np.ndarray | None:
        """float16 (N, D): image features of length 1, zero for unreadable images; None where the annotator has none."""
        return self._column("features") if self.manifest["features"] else None

    def images(self) -> ImageList:
        """Open the images that were annotated, with labels in this store's classes.

        Raises:
            UserError: they cannot be opened, or the list is not the one that was annotated.
        """
        said = self.manifest["images"]
        images = open_images(said["spec"], self.class_names, self.manifest["data_root"])
        if list_hash(images.paths) != said["sha256"]:
            raise UserError(
                f"{said['spec']} held {said['count']} images when {self.root} was made and holds {len(images)} now, or "
                f"other names; annotate them into a new --output_dir"
            )
        return images

    def _column(self, name: str) -> np.ndarray:
        parts = []
        for file in _block_files(self.root, self.manifest):
            with safe_open(file, framework="numpy") as block:
                parts.append(block.get_tensor(name))
        return np.concatenate(parts)


def read_manifest(root: Path) -> dict[str, Any]:
    """Read a store's manifest.json.

    Raises:
        UserError: the folder is missing, holds no manifest, or one of another schema.
    """
    if not root.is_dir():
        raise UserError(f"annotation store {root} does not exist; make it with annotate_vlm.py --output_dir {root}")
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
        schema, version = manifest["schema"], manifest["version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{root} is not an annotation store: no valid manifest.json; give annotate_vlm.py's --output_dir"
        ) from None
    if (schema, version) != (SCHEMA, VERSION):
        raise UserError(
            f"{root} has schema {schema} version {version} but this coreg reads {SCHEMA} version {VERSION}; "
            f"annotate again into a new --output_dir"
        )
    if missing := [key for key in (*JOB, "features", "data_root") if key not in manifest]:
        raise UserError(f"{root}/manifest.json lacks {', '.join(missing)}; annotate again into a new --output_dir")
    return manifest


def job_hash(manifest: dict[str, Any]) -> str:
    """sha256 (hex) of what makes a job: class names, templates, model, image list and block size."""
    return hashlib.sha256(json.dumps({key: manifest[key] for key in JOB}, sort_keys=True).encode()).hexdigest()


def _block_files(root: Path, manifest: dict[str, Any]) -> list[Path]:
    count = -(-manifest["images"]["count"] // manifest["block_size"])
    return [root / "blocks" / f"{index:05d}.safetensors" for index in range(count)]


def _read_samples(root: Path, manifest: dict[str, Any]) -> tuple[list[str], np.ndarray, np.ndarray]:
    try:
        lines = (root / "images.txt").read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]
        with safe_open(root / "samples.safetensors", framework="numpy") as file:
            label, split = file.get_tensor("label"), file.get_tensor("split")
    except (SafetensorError, OSError) as error:
        raise UserError(f"annotation store {root} is damaged: {error}; annotate again into a new --output_dir") from None
    paths = [unescape(line) for line in lines]
    if list_hash(paths) != manifest["images"]["sha256"] or not len(paths) == len(label) == len(split):
        raise UserError(
            f"annotation store {root} is damaged: images.txt was changed; annotate again into a new --output_dir"
        )
    return paths, label, split


# ---- writing --------------------------------------------------------------------------------------------------------


def make_manifest(
    images: ImageList,
    class_names: Sequence[str],
    templates: Sequence[str],
    model: dict[str, str],
    block_size: int,
    **told: Any,
) -> dict[str, Any]:
    """The manifest of a job.

    Args:
        images: what is to be annotated.
        class_names: C names in order.
        templates: T prompt templates in order.
        model: `spec` and `weights`, which identify the annotator.
        block_size: images a block.
        told: what is written down but does not make another job: `features` (their length or None), `data_root`,
            `preprocessing`, `versions`.
    """
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "class_names": list(class_names),
        "templates": list(templates),
        "model": model,
        "images": {"spec": images.spec, "count": len(images), "sha256": list_hash(images.paths)},
        "block_size": block_size,
        **told,
    }


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
        self.files = _block_files(root, manifest)

    def begin(self, images: ImageList) -> None:
        """Make the folder with everything but blocks, or go on with the store of the same job. One process calls this.

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
        partial = self.root.with_name(f".{self.root.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "blocks").mkdir(parents=True)
            lists["manifest.json"] = json.dumps(self.manifest, indent=1, ensure_ascii=False).encode() + b"\n"
            for name, content in lists.items():
                write_atomically(partial / name, content)
            partial.replace(self.root)
        except OSError as error:
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

    def write(self, index: int, tensors: dict[str, np.ndarray], errors: dict[int, str]) -> None:
        """Write block `index`; rows in `errors` (numbers in the whole list) abstain: votes -1, uniform probabilities.

        Args:
            index: which block.
            tensors: votes int16 (n, T), probs float16 (n, C) and, where there are any, features float16 (n, D).
            errors: row number -> why the image could not be read.
        """
        bad = [row - self.rows(index).start for row in errors]
        tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
        tensors["votes"][bad] = -1
        tensors["probs"][bad] = 1 / tensors["probs"].shape[1]
        if "features" in tensors:
            tensors["features"][bad] = 0
        write_block(self.files[index], index, self.job, tensors, errors)

    def finish(self, paths: Sequence[str]) -> None:
        """Write errors.csv, which ends the job; every block must be there. One process calls this."""
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(["path", "reason"])
        for index, file in enumerate(self.files):
            _, errors, _ = read_block(file, index, self.job)
            table.writerows([paths[row], reason] for row, reason in errors.items())
        write_atomically(self.root / "errors.csv", os.fsencode(text.getvalue()))
        for leftover in (self.root / "blocks").glob(".*.tmp"):  # of writers that were killed
            leftover.unlink(missing_ok=True)
