"""manifest.json of an annotation store: what makes a job, and where its blocks lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coreg.data.images import ImageList, list_hash
from coreg.errors import UserError

SCHEMA = "coreg-annotations"
VERSION = 1
JOB = ("class_names", "templates", "model", "images", "block_size")  # the manifest's entries that make two jobs differ


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
            `preprocessing`, `versions`, `notes` (of the image list).
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


def block_files(root: Path, manifest: dict[str, Any]) -> list[Path]:
    """The files of all blocks in order, whether they are there or not."""
    count = -(-manifest["images"]["count"] // manifest["block_size"])
    return [root / "blocks" / f"{index:05d}.safetensors" for index in range(count)]
