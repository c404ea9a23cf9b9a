"""manifest.json of an annotation store: what makes a job, and where its images and blocks lie."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coreg.data.images import ImageList, list_hash
from coreg.data.joined import PREFIX, joined_spec
from coreg.errors import UserError
from coreg.records import Each, Maybe, Number, RecordError, check_record, hash_of, parse_record, read_record
from coreg.scripts import launched

SCHEMA = "coreg-annotations"
# of version 1: the place of the images is part of the job; up to version 2: every store has templates; up to version 3:
# none has descriptions or a temperature
VERSION = 4
DRAWN = "synthetic:"  # how the spec begins where there are candidate sets alone, drawn from true labels
PEOPLE = DRAWN + "people("  # or given by people
REFINED = "refined by "  # how the spec of a model begins whose evidence was refined
# the manifest's entries that make two jobs differ; descriptions and tiles need not be there
JOB = ("class_names", "templates", "descriptions", "model", "images", "block_size", "tiles")
MOST_BLOCKS = 1_000_000
# how well the features of a refinement tell the classes apart (`coreg.weak.trust`)
_SCORE, _SHARE = Number(-1e9, 1e9, whole=False), Number(0, 1, whole=False)
FIT = {"score": _SCORE, "shuffled": _SCORE, "hopeless": bool, "mends": bool, "annotator": _SHARE, "itself": _SHARE}
TEMPERATURE = Number(1e-3, 1e3, whole=False)
KIND = {
    "class_names": [str],
    "templates": [str],
    "descriptions": Maybe(Each([str])),
    "model": {"spec": str, "weights": str, "precision": Maybe(str), "mode": Maybe(str), "temperature": Maybe(TEMPERATURE)},
    "images": {"spec": str, "count": Number(1, 1e9), "sha256": str},
    "block_size": Number(1, 1e9),
    "features": Maybe(Number(1, 1e6)),
    "tiles": Maybe([Number(1, 32)]),
    "data_root": str,
    "hashed_spec": Maybe(str),
    "notes": Maybe([str]),
    "refined": Maybe({"source": str, "source_hash": str, "fit": Maybe(FIT)}),
}


class DamagedManifestError(UserError):
    """A store whose manifest.json is missing or is not what its writer wrote."""


def make_manifest(
    images: ImageList,
    class_names: Sequence[str],
    templates: Sequence[str],
    model: dict[str, str],
    block_size: int,
    **details: Any,
) -> dict[str, Any]:
    """The manifest of a job.

    Args:
        images: what is to be annotated.
        class_names: C names in order.
        templates: T prompt templates in order; none where candidate sets were drawn and nobody annotated.
        model: `spec` and `weights`, which identify the annotator, or how the sets were drawn and the hash of them;
            `temperature` where it is not 1.
        block_size: images a block.
        details: `descriptions`, texts by class name, and `tiles`, sides of grids (`coreg.annotate.tiles`), which are part
            of the job; and what is not: `features` (their length or None), `data_root`, `preprocessing`, `versions`,
            `notes` (of the image list), and for a store that was refined `refined`.

    Raises:
        UserError: so small blocks would be too many files.
    """
    if len(images) > MOST_BLOCKS * block_size:
        raise UserError(f"--block_size {block_size} makes too many blocks of {len(images)} images; give a larger one")
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "class_names": list(class_names),
        "templates": list(templates),
        "model": model,
        "images": {"spec": images.spec, "count": len(images), "sha256": list_hash(images.paths)},
        "block_size": block_size,
        **details,
    }


def read_manifest(root: Path) -> dict[str, Any]:
    """Read a store's manifest.json.

    Raises:
        UserError: the folder is missing, holds no manifest, a damaged one, or one of another schema.
    """
    if not root.is_dir():
        command = f"{launched('annotate_vlm.py')} --output_dir {root}"
        raise UserError(f"annotation store {root} does not exist; make it with {command}")
    if not any((root / name).exists() for name in ("manifest.json", "blocks", "samples.safetensors")):
        raise UserError(f"{root} is not an annotation store: no manifest.json; give annotate_vlm.py's --output_dir")
    try:
        manifest = read_record(root / "manifest.json", {"schema": str, "version": Number()})
        schema, version = manifest["schema"], manifest["version"]
        if schema == SCHEMA and version in range(1, VERSION + 1):
            _check(manifest)
            return manifest
    except RecordError as error:
        raise DamagedManifestError(
            f"{root} is not a valid annotation store: manifest.json is missing or damaged ({error}); run the "
            f"command that made it again, which writes manifest.json anew and keeps the blocks"
        ) from None
    raise UserError(
        f"{root} has schema {schema} version {version} but this coreg reads {SCHEMA} version 1 to {VERSION}; "
        f"annotate again into a new --output_dir"
    )


def _check(manifest: dict[str, Any]) -> None:
    check_record(manifest, KIND)
    drawn = manifest["model"]["spec"].startswith(DRAWN)
    described = manifest.get("descriptions")
    if described is not None and (set(described) != set(manifest["class_names"]) or not all(described.values())):
        raise RecordError("descriptions are not of its classes")
    for name in ("class_names",) if drawn else ("class_names", "templates"):
        if not manifest[name]:
            raise RecordError(f"{name} is empty")
    if manifest["images"]["count"] > MOST_BLOCKS * manifest["block_size"]:
        raise RecordError(f"block_size is {manifest['block_size']}, too small for {manifest['images']['count']} images")
    try:
        json.dumps(manifest, ensure_ascii=False).encode()
    except UnicodeError:
        raise RecordError("it holds what is no text") from None


def same_command(manifest: dict[str, Any]) -> str:
    """What to type where a store is unfinished or damaged: what made it, once more."""
    spec, images = manifest["model"]["spec"], manifest["images"]["spec"]
    if manifest.get("refined"):
        return "run the same python -m coreg.annotate refine command again"
    if " + " in spec or images.startswith(PREFIX):
        return "delete it and run the same python -m coreg.annotate merge command again"
    if spec.startswith(DRAWN):
        return "delete it and run the same python -m coreg.weak command again"
    return "run the same annotate_vlm.py command again"


def set_name(spec: str) -> str:
    """What in `spec` is no place: the name of a data set whose file names are made up; "" for files.

    Files are identified by the hash of their names, wherever they lie.
    """
    if spec.startswith(PREFIX):
        try:
            return joined_spec([set_name(one) for one in parse_record(spec.removeprefix(PREFIX), [str])])
        except RecordError:  # a damaged manifest
            return ""
    return spec if spec.startswith(("builtin:", "torchvision:")) else ""


def job_hash(manifest: dict[str, Any]) -> str:
    """sha256 (hex) of what makes a job: class names, templates, model, block size, and the image list without its place.

    In stores of version 1 the place of the images when they were annotated is hashed too, and stays so when they move.
    """
    job = {key: manifest[key] for key in JOB if manifest.get(key) is not None}
    if manifest["version"] > 1:
        hashed = manifest.get("hashed_spec")
        job["images"] = job["images"] | {"spec": set_name(job["images"]["spec"]) if hashed is None else hashed}
    return hash_of(job)


def moved(manifest: dict[str, Any], spec: str, data_root: str) -> dict[str, Any]:
    """The manifest of the same job whose images lie at `spec`, torchvision sets in `data_root`."""
    before, manifest = manifest["images"]["spec"], manifest | {"data_root": data_root}
    if spec == before:
        return manifest
    if manifest["version"] == 1:
        manifest |= {"version": VERSION, "hashed_spec": before}
    return manifest | {"images": manifest["images"] | {"spec": spec}}


def block_files(root: Path, manifest: dict[str, Any]) -> list[Path]:
    """The files of all blocks in order, whether they are there or not."""
    count = -(-manifest["images"]["count"] // manifest["block_size"])
    return [root / "blocks" / f"{index:05d}.safetensors" for index in range(count)]
