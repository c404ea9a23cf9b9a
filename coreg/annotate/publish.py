"""A store as a data set that others may have: its evidence, a card, and a description in Croissant; never an image.

    python -m coreg.annotate publish ann --output_dir published
    python -m coreg.annotate publish ann --output_dir published --push_to_hub USER/NAME   as a private data set

Folders of whoever made it are not in it: of absolute paths only the last part stays.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coreg.export.card import escaped, public_name
from coreg.files import making_folder, sha256_of, write_atomically
from coreg.store.blocks import read_block
from coreg.store.manifest import block_files, job_hash
from coreg.store.store import AnnotationStore
from coreg.store.texts import read_texts, write_texts
from coreg.store.writer import StoreWriter

REMEDY = "free some space or give another --output_dir"
TABLE = "annotations.csv"
SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (float("inf"), "n>1M"))
_TERMS = (
    "column conformsTo data dataType equivalentProperty examples extract field fileProperty fileObject fileSet format "
    "includes isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate "
    "separator source subField transform"
)
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{term: f"cr:{term}" for term in _TERMS.split()},
    "citeAs": "cr:citeAs",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "sc": "https://schema.org/",
}


def published(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest without the folders of whoever made it."""
    model = manifest["model"] | {"spec": public_name(manifest["model"]["spec"])}
    images = manifest["images"] | {"spec": public_name(manifest["images"]["spec"])}
    clean = manifest | {"model": model, "images": images, "data_root": ""}
    if "refined" in manifest:
        refined = dict(manifest["refined"])
        refined["source"] = public_name(refined["source"])
        if "model" in refined:
            refined["model"] = refined["model"] | {"spec": public_name(refined["model"]["spec"])}
        clean["refined"] = refined
    return clean


def publish(store: AnnotationStore, target: Path, write_table: Callable[[Path], None]) -> None:
    """Write the folder, whole or not at all.

    Args:
        write_table: writes the store as a CSV file.

    Raises:
        UserError: the folder is there already or cannot be written.
    """
    manifest, job = published(store.manifest), job_hash(store.manifest)
    with making_folder(target, REMEDY) as made:
        writer = StoreWriter(made, manifest, REMEDY)
        writer.start(store.image_list())
        for index, file in enumerate(block_files(store.root, store.manifest)):
            tensors, unreadable, _ = read_block(file, index, job)
            writer.write(index, tensors, unreadable)
        writer.complete(store.paths)
        if (kept := read_texts(store.root, store.manifest)) is not None:
            write_texts(made, manifest, kept)
        write_table(made / TABLE)
        write_atomically(made / "README.md", card(store, manifest))
        files = {path.relative_to(made).as_posix(): sha256_of(path) for path in sorted(made.rglob("*")) if path.is_file()}
        with (made / TABLE).open(encoding="utf-8", errors="surrogateescape", newline="") as table:
            columns = next(csv.reader(table))
        described = croissant(target.name, manifest, files, columns)
        write_atomically(made / "croissant.json", json.dumps(described, ensure_ascii=True, indent=1) + "\n")


def croissant(name: str, manifest: dict[str, Any], files: dict[str, str], columns: list[str]) -> dict[str, Any]:
    """The folder in MLCommons' Croissant 1.0 (JSON-LD).

    Args:
        files: path in the folder -> SHA-256 (hex). columns: of annotations.csv.
    """
    kinds = {"csv": "text/csv", "json": "application/json", "txt": "text/plain", "md": "text/markdown"}
    distribution = [
        {
            "@type": "cr:FileObject",
            "@id": file,
            "name": file,
            "contentUrl": file,
            "encodingFormat": kinds.get(file.rpartition(".")[2], "application/octet-stream"),
            "sha256": checksum,
        }
        for file, checksum in files.items()
    ]
    types = {"row": "sc:Integer", "unreadable": "sc:Boolean", "probability": "sc:Float"}
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"annotations/{number}",
            "name": column,
            "dataType": types.get(column, "sc:Float" if column.startswith("p(") else "sc:Text"),
            "source": {"fileObject": {"@id": TABLE}, "extract": {"column": column}},
        }
        for number, column in enumerate(columns)
    ]
    records = {"@type": "cr:RecordSet", "@id": "annotations", "name": "annotations", "field": fields}
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": f"What {manifest['model']['spec']} sees in {manifest['images']['count']} images: votes, "
        f"probabilities and features. No image is in it.",
        "version": f"{manifest['version']}.0.0",
        "distribution": distribution,
        "recordSet": [records],
    }


def card(store: AnnotationStore, manifest: dict[str, Any]) -> str:
    """The README of the data set, Markdown with the hub's front matter; what came from outside is escaped."""
    size = next(name for limit, name in SIZES if len(store) < limit)
    known = int((store.labels >= 0).sum()) if store.labels is not None else 0
    source, model = escaped(manifest["images"]["spec"]), escaped(manifest["model"]["spec"])
    lines = [
        "---",
        "task_categories:",
        "- image-classification",
        "tags:",
        "- coreg",
        "- croissant",
        "- weak-supervision",
        "- partial-label",
        "size_categories:",
        f"- {size}",
        "---",
        "",
        f"# What {model} sees in {source}",
        "",
        f"Annotations of {len(store)} images by {model}, {len(store.class_names)} classes, {len(store.templates)} "
        f"templates: votes, probabilities and features, and no image. True labels of {known} images are in it.",
        "",
        "## How to use it",
        "",
        "    coreg-train --annotations FOLDER --images IMAGES --output_dir runs/a",
        "",
        f"with the Python package coreg installed, where `FOLDER` holds this file and `IMAGES` is {source}, whose file",
        "names have to be those of images.txt. `annotations.csv` has one row an image, for other programs;",
        "`croissant.json` describes it.",
        "",
        "## Classes",
        "",
        *(f"{number}. {escaped(name)}" for number, name in enumerate(store.class_names)),
        "",
        "## Limits",
        "",
        "- Votes and probabilities are a model's, with its mistakes and whatever it learned of people and places.",
        "- File names of the images are in it, and labels. Whoever owns the images says whether those may be published.",
    ]
    return "\n".join(lines) + "\n"
