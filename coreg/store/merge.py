"""One store from several: parts of one job, other images, or other annotators of the same images."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coreg.data.images import ImageList
from coreg.data.joined import joined_labels, joined_paths, joined_spec
from coreg.errors import UserError
from coreg.files import making_folder
from coreg.store.blocks import DamagedBlockError, pack_answers, read_block, unpack_answers
from coreg.store.manifest import block_files, job_hash, make_manifest, read_manifest, set_name
from coreg.store.store import AnnotationStore, read_samples
from coreg.store.texts import read_texts, write_texts
from coreg.store.writer import StoreWriter

REMEDY = "nothing is kept: free some space, or give another --output_dir"


def merge(folders: Sequence[str], output: str, weights: Sequence[float] | None = None) -> tuple[Path, str]:
    """Make one store from several; what they have in common says how.

    * Stores of the same job, finished or not: every whole block of any of them. Missing blocks are then annotated by the
      command that began them.
    * Other images, but the same class names, templates and model: all images, part by part.
    * The same images and class names, but other models or templates: the votes of all templates side by side, and the mean
      of the probabilities over all templates. Candidate rules then work on all annotators together.

    Args:
        weights: of the annotators' probabilities, one a store, where they are of the same images; None: all alike.

    Returns:
        the new store's folder, and what was done, for a person.

    Raises:
        UserError: the stores do not fit together, are damaged, or `output` is taken.
    """
    root = Path(output)
    if len(folders) < 2:
        raise UserError("merge needs at least two stores: python -m coreg.annotate merge ann1 ann2 --output_dir ann")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} is there already; give a new --output_dir")
    manifests = [read_manifest(Path(folder)) for folder in folders]
    same_job = len({job_hash(manifest) for manifest in manifests}) == 1
    stores = [] if same_job else _fitting(folders)
    with making_folder(root, REMEDY) as folder:
        if same_job:
            done = _same_job([Path(name) for name in folders], manifests[0], folder)
        elif len({images_of(store) for store in stores}) == 1:
            done = _side_by_side(stores, folder, weights or [1.0] * len(stores))
        else:
            done = _one_after_the_other(stores, folder)
    return root, done.replace(str(folder), str(root))


def images_of(store: AnnotationStore) -> tuple[str, str]:
    """What identifies the images of a store, wherever those lie."""
    return set_name(store.images_spec), store.manifest["images"]["sha256"]


def _fitting(folders: Sequence[str]) -> list[AnnotationStore]:
    """The stores, if they can be merged.

    Raises:
        UserError: they cannot, or one is unfinished or damaged.
    """
    stores = [AnnotationStore.open(folder) for folder in folders]
    first = stores[0]
    for store in stores[1:]:
        if store.class_names != first.class_names:
            raise UserError(f"{store.root} has other class names than {first.root}; stores that are merged have the same")
    if len({images_of(store) for store in stores}) == 1:
        return stores
    for store in stores[1:]:
        for key in ("templates", "descriptions", "model", "tiles"):
            if store.manifest.get(key) != first.manifest.get(key):
                raise UserError(
                    f"{store.root} has other images and another {key} than {first.root}; stores are merged that have "
                    f"the same images, or the same model and templates"
                )
    return stores


def _same_job(folders: list[Path], manifest: dict[str, Any], root: Path) -> str:
    writer = StoreWriter(root, manifest, REMEDY)
    samples = _samples_of(folders)
    writer.start(samples)
    _keep_texts(folders, manifest, root)
    count = 0
    for index, target in enumerate(writer.files):
        for folder in folders:
            file = folder / "blocks" / target.name
            try:
                read_block(file, index, writer.job)
            except DamagedBlockError:  # missing here, or damaged: another part may have it
                continue
            shutil.copyfile(file, target)
            count += 1
            break
    if count < len(writer.files):
        missing = f"{count} of {len(writer.files)} blocks are there"
        return f"{missing}; annotate the others with the same annotate_vlm.py command and --output_dir {root}"
    writer.complete(samples.paths)
    return f"all {count} blocks are there"


def _keep_texts(folders: Sequence[Path], manifest: dict[str, Any], root: Path) -> None:
    """Write the texts of the first part that has some, all parts being by one annotator."""
    kept = next((texts for folder in folders if (texts := read_texts(folder, manifest)) is not None), None)
    if kept is not None:
        write_texts(root, manifest, kept)


def _samples_of(folders: list[Path]) -> ImageList:
    """The images from the first part in which they are whole."""
    for folder in folders[:-1]:
        with contextlib.suppress(UserError):
            return read_samples(folder, read_manifest(folder))
    return read_samples(folders[-1], read_manifest(folders[-1]))


def _side_by_side(stores: list[AnnotationStore], root: Path, weights: Sequence[float]) -> str:
    """Columns: all templates of all annotators."""
    first = stores[0]
    specs = [store.manifest["model"]["spec"] for store in stores]
    names = [template for store in stores for template in store.templates]
    if len(set(names)) < len(names):
        names = [f"{spec}: {template}" for spec, store in zip(specs, stores) for template in store.templates]
    counted = [] if len(set(weights)) == 1 else [f"{weight:.4f}" for weight in weights]
    identity = hashlib.sha256("\n".join([*(store.hash for store in stores), *counted]).encode()).hexdigest()
    images = first.image_list()
    writer = _writer(root, images, stores, names, {"spec": " + ".join(specs), "weights": f"sha256 {identity}"}, None)
    votes = [store.votes() for store in stores]
    probs = [store.probs() for store in stores]
    counts = [weight * len(store.templates) for weight, store in zip(weights, stores)]
    unreadable = np.logical_and.reduce([store.unreadable for store in stores])
    reasons = {row: why for row, why in StoreWriter(first.root, first.manifest).unreadable().items() if unreadable[row]}

    def part(rows: slice) -> dict[str, np.ndarray]:
        mean = sum(count * table[rows].astype(np.float32) for count, table in zip(counts, probs)) / sum(counts)
        return {"votes": np.concatenate([table[rows] for table in votes], axis=1), "probs": mean.astype(np.float16)}

    # What one annotator could read can be read: the others abstain there, as they did.
    writer.write_all(images, part, reasons)
    return f"{len(stores)} annotators of the same {len(first)} images, {len(names)} templates in all"


def _one_after_the_other(stores: list[AnnotationStore], root: Path) -> str:
    """Rows: all images of all parts."""
    specs = [store.images_spec for store in stores]
    paths = joined_paths([store.paths for store in stores])
    labels, split, tags = joined_labels([store.image_list() for store in stores])
    images = ImageList(joined_spec(specs), paths, labels, split, None, pixels=lambda row: None, tags=tags)
    first = stores[0]
    model, features = first.manifest["model"], first.manifest["features"]
    writer = _writer(root, images, stores, first.templates, model, features, first.descriptions)
    writer.start(images)
    _keep_texts([store.root for store in stores], first.manifest, root)
    waiting: list[dict[str, np.ndarray]] = []
    errors: dict[int, str] = {}
    index = 0
    for tensors, bad in _blocks_of(stores):
        waiting.append(tensors)
        errors |= bad
        while index < len(writer.files) and sum(len(part["votes"]) for part in waiting) >= len(writer.rows(index)):
            rows = writer.rows(index)
            whole = _concatenated(waiting)
            here, waiting = _split(whole, len(rows))
            writer.write(index, here, {row: errors.pop(row) for row in sorted(errors) if row in rows})
            index += 1
    writer.complete(paths)
    return f"{len(paths)} images of {len(stores)} parts"


def _blocks_of(stores: list[AnnotationStore]) -> Iterator[tuple[dict[str, np.ndarray], dict[int, str]]]:
    offset = 0
    for store in stores:
        job = job_hash(store.manifest)
        for index, file in enumerate(block_files(store.root, store.manifest)):
            tensors, bad, _ = read_block(file, index, job)
            yield tensors, {row + offset: reason for row, reason in bad.items()}
        offset += len(store)


def _concatenated(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    whole = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        if name == "answers":
            whole[name] = pack_answers([row for piece in pieces for row in unpack_answers(piece)])
        else:
            whole[name] = np.concatenate(pieces)
    return whole


def _split(whole: dict[str, np.ndarray], count: int) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """The first `count` rows, and what is left, if anything."""
    rest = len(whole["votes"]) - count
    here, there = {}, {}
    for name, table in whole.items():
        if name == "answers":
            answers = unpack_answers(table)
            here[name], there[name] = pack_answers(answers[:count]), pack_answers(answers[count:])
        else:
            here[name], there[name] = table[:count], table[count:]
    return here, [there] if rest else []


def _writer(
    root: Path,
    images: ImageList,
    stores: list[AnnotationStore],
    templates: Sequence[str],
    model: dict[str, str],
    features: int | None,
    descriptions: dict[str, list[str]] | None = None,
) -> StoreWriter:
    manifest = stores[0].manifest
    kept = {key: manifest.get(key) for key in ("data_root", "preprocessing", "versions")} | {"descriptions": descriptions}
    if features and manifest.get("tiles"):
        kept["tiles"] = manifest["tiles"]
    size, names = manifest["block_size"], manifest["class_names"]
    manifest = make_manifest(images, names, templates, model, size, features=features, **kept)
    return StoreWriter(root, manifest, REMEDY)
