"""The annotation store: what an annotator saw in every image, kept as evidence and not as decisions.

A store is a folder:

    manifest.json            schema and job: class names, templates, model, image list, block size, tool versions
    images.txt               one path a row; the row number is the image's identity everywhere (see `sources.escape`)
    texts.safetensors        features of the texts that images were compared with, of annotators that have them, see `texts`
    samples.safetensors      label int32 (N,) with -1 for unknown, split uint8 (N,): 0 train, 1 test, 2 held out; and, where
                             images have several labels, tags int8 (N, C): 1 present, -1 absent, 0 unknown
    checksums.json           sha256 of samples.safetensors; stores of version 1 have none
    blocks/00000.safetensors votes int16 (n, T) with -1 for abstention, probs float16 (n, C) mean over templates,
                             features float16 (n, D) where the annotator has them, tiles float16 (n, M, D) of M parts of
                             every image where they were asked for, answers uint8 (B,) where it answers in
                             words; or candidates bool (n, C) alone, drawn from true labels by `python -m coreg.weak`;
                             b-th block = rows b*block_size ...
    errors.csv               path and reason of every unreadable image; written last, so it also says "finished"

Blocks are the unit of work. Each carries the hash of its job and the checksum of its tensors, is written to a temporary
name and then renamed; so processes that are killed anywhere leave only whole blocks, and others can go on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load, load_file

from coreg.data.images import HELD_OUT, ImageList, Paths, absolute_path, list_hash, unescape
from coreg.data.sources import open_images
from coreg.errors import UserError
from coreg.plaintext import one_line, without_credentials
from coreg.records import RecordError, read_file, read_record
from coreg.store.blocks import BadEvidenceError, DamagedBlockError, check_evidence, read_block, stacked, unpack_answers
from coreg.store.manifest import DRAWN, PEOPLE, block_files, job_hash, make_manifest, moved, read_manifest, same_command
from coreg.store.texts import TextFeatures, read_texts
from coreg.store.writer import CHECKSUMS, StoreWriter, continued, describe, errors_csv

__all__ = ["AnnotationStore", "StoreWriter", "continued", "make_manifest", "read_manifest"]


@dataclass
class AnnotationStore:
    """An opened, verified and finished store."""

    root: Path  # its folder
    manifest: dict[str, Any]  # the content of manifest.json
    paths: Sequence[str]  # N image paths; the row number is the identity of an image
    labels: np.ndarray | None  # int64 (N,), -1 where unknown, or None without any; for reporting only
    split: np.ndarray  # uint8 (N,), 0 = train, 1 = test
    unreadable: np.ndarray  # bool (N,), images that could not be read: all templates abstain, probabilities are uniform
    hash: str  # sha256 (hex) over the job and all checksums; changes with anything that a trainer could learn from
    tags: np.ndarray | None = None  # int8 (N, C) where images have several labels, or None; for reporting only

    @classmethod
    def open(cls, folder: str | Path) -> AnnotationStore:
        """Open a store and verify its schema, its completeness and every checksum.

        Raises:
            UserError: the folder is missing, no store, of another schema, unfinished or damaged.
        """
        root = Path(folder)
        manifest = read_manifest(root)
        again = same_command(manifest)
        job = job_hash(manifest)
        files = block_files(root, manifest)
        missing = [file.name for file in files if not file.exists()]
        if missing or not (root / "errors.csv").exists():
            raise UserError(
                f"annotation store {root} is unfinished ({len(missing)} of {len(files)} blocks missing); {again}"
            )
        samples = read_samples(root, manifest)
        paths, labels = samples.paths, samples.labels
        reasons: dict[int, str] = {}
        checksums = [job, hashlib.sha256((root / "samples.safetensors").read_bytes()).hexdigest()]
        for index, file in enumerate(files):
            rows = range(index * manifest["block_size"], min((index + 1) * manifest["block_size"], len(paths)))
            try:
                tensors, errors, checksum = read_block(file, index, job)
                check_evidence(tensors, errors, rows, manifest)
            except DamagedBlockError as error:
                raise UserError(f"annotation store {root} is damaged: {file.name}: {error}; {again}") from None
            except BadEvidenceError as error:
                what = describe(error, root, manifest)
                raise UserError(f"annotation store {root} cannot be used: {file.name}: {what}") from None
            reasons |= errors
            checksums.append(checksum)
        if not _has_content(root / "errors.csv", [errors_csv(paths, reasons, safe_csv) for safe_csv in (False, True)]):
            raise UserError(f"annotation store {root} is damaged: errors.csv was changed; {again}")
        unreadable = np.zeros(len(paths), dtype=bool)
        unreadable[list(reasons)] = True
        digest = hashlib.sha256("\n".join(checksums).encode()).hexdigest()
        known = labels if labels is not None and (labels >= 0).any() else None
        return cls(root, manifest, paths, known, samples.split, unreadable, digest, samples.tags)

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
    def descriptions(self) -> dict[str, list[str]] | None:
        """Texts by class name that stood for the classes beside their names, or None."""
        return self.manifest.get("descriptions")

    @property
    def temperature(self) -> float:
        """By which the annotator's scores were divided."""
        return self.manifest["model"].get("temperature") or 1.0

    @property
    def drawn(self) -> bool:
        """Whether there are candidate sets alone, drawn from true labels or given by people: no votes and no features."""
        spec = self.manifest["model"]["spec"]
        return spec.startswith(DRAWN) and " + " not in spec  # merged with others' votes, sets were votes like theirs

    def need_annotator(self, remedy: str = "make another one with annotate_vlm.py") -> None:
        """Raise a UserError where no annotator did."""
        if self.drawn:
            origin = "people gave" if self.manifest["model"]["spec"].startswith(PEOPLE) else "were drawn from true labels"
            raise UserError(
                f"the store {self.root} holds candidate sets that {origin}, and this needs what an annotator said; {remedy}"
            )

    def need_same(self, sha256: str, class_names: Sequence[str], option: str) -> None:
        """Raise a UserError unless this store, which `option` names, is of these images and classes.

        Args:
            sha256: `list_hash` of the images. class_names: in order.
        """
        if self.manifest["images"]["sha256"] != sha256:
            raise UserError(f"{option} {self.root} is of other images; annotate the same ones")
        if self.class_names != list(class_names):
            pairs = zip(self.class_names, class_names)
            names = next((f"{a!r} for {b!r}" for a, b in pairs if a != b), f"{len(self.class_names)} classes")
            raise UserError(f"{option} {self.root} has other classes ({names}); annotate with the same --classes")

    def need_features(self, remedy: str = "annotate the images again") -> None:
        """Raise a UserError where the annotator left no features."""
        if self.manifest["features"] is None:
            raise UserError(f"{self.root} keeps no features, its annotator gives none; {remedy}")

    def rows_of(self, split: int) -> np.ndarray:
        """int64 (n,): the images of a split that could be read."""
        return np.flatnonzero((self.split == split) & ~self.unreadable)

    def drawn_sets(self) -> np.ndarray:
        """bool (N, C): the candidate sets of a store in which they were drawn."""
        # up to version 2 such stores had votes of made-up templates, and probabilities that are uniform over the set
        return self._column("probs") > 0 if self.templates else self._column("candidates")

    @property
    def images_spec(self) -> str:
        """Where the images are, as reports say it: what `coreg.data.sources.open_images` takes, without credentials."""
        return without_credentials(self.manifest["images"]["spec"])

    def votes(self) -> np.ndarray:
        """int16 (N, T): the class that each template names, -1 for abstention.

        Raises:
            UserError: nobody annotated.
        """
        self.need_annotator()
        return self._column("votes")

    def probs(self) -> np.ndarray:
        """float16 (N, C): mean over the templates of the class probabilities; uniform over a set that was drawn."""
        if not self.drawn:
            return self._column("probs")
        sets = self.drawn_sets()
        return sets * (1 / sets.sum(axis=1, keepdims=True)).astype(np.float16)

    def features(self) -> np.ndarray | None:
        """float16 (N, D): image features of length 1, zero for unreadable images; None where the annotator has none."""
        return self._column("features") if self.manifest["features"] else None

    def tiles(self) -> np.ndarray | None:
        """float16 (N, M, D): features of parts of the images, see `coreg.annotate.tiles`; None where there are none."""
        return self._column("tiles") if self.manifest.get("tiles") else None

    def kept_texts(self) -> TextFeatures | None:
        """What the annotator's text side says of texts; None where nothing is kept, as in stores of earlier versions."""
        return read_texts(self.root, self.manifest)

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
        return None if packed[0] is None else [row for part in packed if part is not None for row in unpack_answers(part)]

    def at(self, images: str | None, data_root: str | None) -> AnnotationStore:
        """This store with its images in another place than the one they were annotated in, where one is given.

        Args:
            images: what `open_images` takes. data_root: where torchvision data sets lie.
        """
        spec = self.manifest["images"]["spec"] if images is None else images
        spec = str(absolute_path(spec)) if Path(spec).exists() else spec
        place = self.manifest["data_root"] if data_root is None else str(absolute_path(data_root))
        return dataclasses.replace(self, manifest=moved(self.manifest, spec, place))

    def unrefined(self) -> AnnotationStore | None:
        """The store as its annotator gave it: itself, or what it was refined from; None where that is gone or another."""
        if "refined" not in self.manifest:
            return self
        try:
            source = AnnotationStore.open(self.manifest["refined"]["source"])
        except UserError:
            return None
        return source if source.hash == self.manifest["refined"]["source_hash"] else None

    def need_unrefined(self, remedy: str = "annotate the images again") -> AnnotationStore:
        """As `unrefined`.

        Raises:
            UserError: it is gone or another; `remedy` is what a person can do then.
        """
        annotated = self.unrefined()
        if annotated is None:
            raise UserError(f"{self.root} is refined, and the store that it was refined from is gone; {remedy}")
        return annotated

    def image_list(self) -> ImageList:
        """The images that were annotated, as they are recorded: without their pixels."""
        return ImageList(self.images_spec, self.paths, self.labels, self.split, None, _no_pixels, tags=self.tags)

    def images(self) -> ImageList:
        """Open the images that were annotated, with the labels that the store has of them.

        Raises:
            UserError: they cannot be opened, or the list is not the one that was annotated.
        """
        there = self.manifest["images"]
        try:
            # without class names: those of a store that was scored anew may be fewer than the list's own labels name
            images = open_images(there["spec"], data_root=self.manifest["data_root"])
        except UserError as error:
            raise UserError(
                f"the images of {self.root} cannot be opened: {error}; if they were moved, say with --images where to"
            ) from None
        if list_hash(images.paths) != there["sha256"]:
            raise UserError(
                f"{there['spec']} held {there['count']} images when {self.root} was made and holds {len(images)} now, or "
                f"other names; name the place of those images with --images, or annotate into a new --output_dir"
            )
        return dataclasses.replace(images, labels=self.labels, split=self.split, tags=self.tags)

    def _column(self, name: str) -> np.ndarray:
        def parts() -> Iterator[np.ndarray]:
            for file in block_files(self.root, self.manifest):
                with safe_open(file, framework="numpy") as block:
                    yield block.get_tensor(name)

        return stacked(parts(), len(self))


def _no_pixels(_: int) -> None:
    return None


def read_samples(root: Path, manifest: dict[str, Any]) -> ImageList:
    """The images of a store, finished or not; labels are -1 where unknown, of all images too, and pixels None.

    Raises:
        UserError: they are damaged.
    """
    damaged, count = f"annotation store {root} is damaged", manifest["images"]["count"]
    again = same_command(manifest)
    name = "images.txt"
    try:
        lines = read_file(root / name).split(b"\n")[:-1]
        name = "samples.safetensors"
        samples = read_file(root / name)
        tensors = load(samples)
        name = CHECKSUMS
        wanted = read_record(root / name, {"samples.safetensors": str}) if (root / name).exists() else {}
    except Exception as error:  # safetensors lets many kinds through
        raise UserError(f"{damaged}: {name}: {one_line(error)}; {again}") from None
    paths = Paths([os.fsencode(unescape(os.fsdecode(line))) if b"\\" in line else line for line in lines])
    if list_hash(paths) != manifest["images"]["sha256"]:
        raise UserError(f"{damaged}: images.txt was changed; {again}")
    kinds = {name: (table.dtype.name, table.shape) for name, table in tensors.items()}
    expected = {"label": ("int32", (count,)), "split": ("uint8", (count,))}
    several = {"tags": ("int8", (count, len(manifest["class_names"])))}
    if kinds not in (expected, expected | several) or len(paths) != count:
        raise UserError(f"{damaged}: samples.safetensors does not hold labels and splits of {count} images; {again}")
    label, split, tags = tensors["label"].astype(np.int64), tensors["split"], tensors.get("tags")
    strange = tags is not None and tags.size > 0 and (tags.min() < -1 or tags.max() > 1)
    if strange or label.min() < -1 or label.max() >= len(manifest["class_names"]) or split.max() > HELD_OUT:
        raise UserError(f"{damaged}: samples.safetensors holds labels or splits that there are not; {again}")
    if wanted and hashlib.sha256(samples).hexdigest() != wanted["samples.safetensors"]:
        raise UserError(f"{damaged}: samples.safetensors was changed; {again}")
    return ImageList(manifest["images"]["spec"], paths, label, split, None, _no_pixels, tags=tags)


def _has_content(file: Path, contents: list[bytes]) -> bool:
    """Whether a file holds one of `contents`."""
    try:
        return read_file(file) in contents
    except RecordError:
        return False
