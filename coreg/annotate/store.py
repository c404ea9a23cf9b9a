"""The annotation store: what an annotator saw in every image, kept as evidence and not as decisions.

A store is a folder:

    manifest.json            schema and job: class names, templates, model, image list, block size, tool versions
    images.txt               one path a row; the row number is the image's identity everywhere (see `sources.escape`)
    samples.safetensors      label int32 (N,) with -1 for unknown, split uint8 (N,): 0 train, 1 test, 2 held out
    blocks/00000.safetensors votes int16 (n, T) with -1 for abstention, probs float16 (n, C) mean over templates,
                             features float16 (n, D) where the annotator has them, answers uint8 (B,) where it answers in
                             words; b-th block = rows b*block_size ...
    errors.csv               path and reason of every unreadable image; written last, so it also says "finished"

Blocks are the unit of work. Each carries the hash of its job and the checksum of its tensors, is written to a temporary
name and then renamed; so processes that are killed anywhere leave only whole blocks, and others can go on from there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from coreg.annotate.blocks import DamagedBlockError, read_block, unpack_answers
from coreg.annotate.manifest import block_files, job_hash, make_manifest, read_manifest
from coreg.annotate.writer import StoreWriter, refuse_other_job
from coreg.data.images import ImageList, Paths, list_hash, unescape
from coreg.data.sources import open_images
from coreg.errors import UserError

__all__ = ["AnnotationStore", "StoreWriter", "make_manifest", "read_manifest", "refuse_other_job"]


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
    paths: Sequence[str]
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
        files = block_files(root, manifest)
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

    def parts(self) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Rows int64 (n,) and tensors of one block after another, for what is not to be in memory all at once."""
        start = 0
        for file in block_files(self.root, self.manifest):
            tensors = load_file(file)
            yield np.arange(start, start + len(tensors["votes"])), tensors
            start += len(tensors["votes"])

    def answers(self) -> list[list[str]] | None:
        """What a chat model answered, N lists of T texts; None where the annotator does not answer in words."""
        packed = [load_file(file).get("answers") for file in block_files(self.root, self.manifest)]
        return None if packed[0] is None else [row for part in packed for row in unpack_answers(part)]

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
        for file in block_files(self.root, self.manifest):
            with safe_open(file, framework="numpy") as block:
                parts.append(block.get_tensor(name))
        return np.concatenate(parts)


def _read_samples(root: Path, manifest: dict[str, Any]) -> tuple[Paths, np.ndarray, np.ndarray]:
    try:
        lines = (root / "images.txt").read_bytes().split(b"\n")[:-1]
        with safe_open(root / "samples.safetensors", framework="numpy") as file:
            label, split = file.get_tensor("label"), file.get_tensor("split")
    except (SafetensorError, OSError) as error:
        raise UserError(f"annotation store {root} is damaged: {error}; annotate again into a new --output_dir") from None
    paths = paths_of_lines(lines)
    if list_hash(paths) != manifest["images"]["sha256"] or not len(paths) == len(label) == len(split):
        raise UserError(
            f"annotation store {root} is damaged: images.txt was changed; annotate again into a new --output_dir"
        )
    return paths, label, split


def paths_of_lines(lines: Sequence[bytes]) -> Paths:
    """The paths of the lines of images.txt."""
    return Paths([os.fsencode(unescape(os.fsdecode(line))) if b"\\" in line else line for line in lines])


if __name__ == "__main__":
    from coreg.annotate.tools import main

    raise SystemExit(main())
