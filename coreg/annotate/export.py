"""Evidence in forms that other programs read: CSV, Parquet, images in a folder for each class, other programs' own."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coreg.annotate.elsewhere import FORMS, LOCAL_FILES, of_run, of_store
from coreg.config import SAFE_CSV, option
from coreg.data.decode import UnreadableImage
from coreg.errors import UserError
from coreg.files import check_writable, file_name, making_folder, place_below, write_atomically, writing_csv
from coreg.report.record import finished_report
from coreg.settings import Place
from coreg.store.store import AnnotationStore
from coreg.weak.rules import candidate_sets

SPLITS = ("train", "test", "val")


@dataclass
class ExportConfig:
    """Where evidence goes, and what of it."""

    output: str | None = option(None, "a .csv or .parquet file, or a new folder for images sorted by class")
    candidates: str = option("union", "candidate rule: union, votes:V, topk:K, prob:P, ratio:R or cumulative:P")
    safe_csv: bool = option(False, SAFE_CSV)
    format: Literal["cleanlab", "label_studio", "fiftyone"] | None = option(
        None, "what another program reads: an .npz file for cleanlab, a .json file for Label Studio or FiftyOne"
    )
    image_prefix: str = option(LOCAL_FILES, "with --format label_studio: the address of images before their path")


def export(folder: str, config: ExportConfig, place: Place) -> str:
    """Write candidate sets and probabilities in a form that other programs read; returns what was done.

    Args:
        folder: of a store; with `format` also of a finished run, whose labels.csv is taken.

    Raises:
        UserError: there is no such store, a form that is not known, or the output is there already or cannot be written.
    """
    if config.output is None:
        raise UserError("--output is missing; write for example: export ann --output candidates.csv")
    target = Path(config.output)
    if target.exists():
        raise UserError(f"{target} is there already; give another --output")
    if target.suffix:
        check_writable(target, "--output")
    if config.format:
        return _to_other_program(Path(folder), config, target)
    store = AnnotationStore.open(folder).at(place.images, place.data_root)
    if target.suffix == ".csv":
        to_csv(store, target, config.candidates, config.safe_csv)
    elif target.suffix == ".parquet":
        _to_parquet(store, target, config.candidates)
    elif target.suffix:
        raise UserError(f"{target} is of no known form; write a .csv or .parquet file, or a folder without a dot")
    else:
        with making_folder(target, "free some space or give another --output") as made:
            count = _to_folder(store, made)
        return f"{target}: {count} images sorted by their most probable class, {len(store) - count} left out as unreadable"
    return f"{target}: {len(store)} images"


def _to_other_program(folder: Path, config: ExportConfig, target: Path) -> str:
    write, suffix = FORMS[config.format]
    if target.suffix != suffix:
        raise UserError(
            f"--format {config.format} writes a {suffix} file, not {target}; give for example --output out{suffix}"
        )
    if (folder / "job.json").is_file():
        proposals = of_run(folder, list(finished_report(folder / "report.json", {"class_names": [str]})["class_names"]))
    else:
        proposals = of_store(AnnotationStore.open(folder))
    used = write(proposals, target, config.image_prefix)
    return f"{target}: {len(proposals.paths)} images; {used}"


def _rows(store: AnnotationStore, rule: str) -> Iterator[dict[str, Any]]:
    """One mapping an image: who it is, its best class, its candidates and all probabilities."""
    candidates, probs, names = candidate_sets(store, rule), store.probs(), store.class_names
    best = probs.argmax(axis=1)
    for row, path in enumerate(store.paths):
        known = store.labels is not None and store.labels[row] >= 0
        yield {
            "row": row,
            "path": path,
            "split": SPLITS[store.split[row]],
            "label": names[store.labels[row]] if known else None,
            "unreadable": bool(store.unreadable[row]),
            "best": None if store.unreadable[row] else names[best[row]],
            "probability": float(probs[row, best[row]]),
            "candidates": [names[index] for index in np.flatnonzero(candidates[row])],
            "probabilities": probs[row],
        }


def to_csv(store: AnnotationStore, target: Path, rule: str, safe_csv: bool) -> None:
    """One line an image. rule: of candidate sets. safe_csv: see `csv_rows`."""
    heads = ["row", "path", "split", "label", "unreadable", "best", "probability", "candidates"]
    with writing_csv(target, safe_csv) as write:
        write([*heads, *(f"p({name})" for name in store.class_names)])
        for row in _rows(store, rule):
            row["candidates"] = json.dumps(row["candidates"], ensure_ascii=False)
            row["probability"] = f"{row['probability']:.4g}"
            write([*(row[head] for head in heads), *(f"{share:.4g}" for share in row["probabilities"])])


def _to_parquet(store: AnnotationStore, target: Path, rule: str) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "Parquet needs pyarrow, which is not installed: pip install pyarrow, or write a .csv file"
        ) from None
    rows = list(_rows(store, rule))
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    columns["path"] = [path.encode("utf-8", "backslashreplace").decode() for path in columns["path"]]  # Parquet holds text
    columns["probabilities"] = [table.astype(np.float32) for table in columns["probabilities"]]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    write_atomically(target, file.getvalue())


def _to_folder(store: AnnotationStore, target: Path) -> int:
    """`target/SPLIT/CLASS/path`: links to files, copies of what is no file; returns how many."""
    images = store.images()
    root = getattr(images.pixels, "root", None)
    folders = [file_name(name.replace("/", "_").lstrip(".")) for name in store.class_names]
    if len(set(folders)) < len(folders):
        raise UserError(f"class names of {store.root} give the same folder names; write a .csv file instead")
    best, count = store.probs().argmax(axis=1), 0
    for row, path in enumerate(store.paths):
        if store.unreadable[row]:
            continue
        suffix = "" if root is not None or Path(path).suffix == ".png" else ".png"
        folder = target / SPLITS[store.split[row]] / folders[best[row]]
        folder.mkdir(parents=True, exist_ok=True)
        place = place_below(folder, path + suffix)
        if root is not None:
            place.symlink_to(Path(root, path))
        else:
            try:
                images.load(row).save(place, "PNG")
            except UnreadableImage as error:
                raise UserError(f"{path!r} could be read before and cannot now: {error}; annotate again") from None
        count += 1
    return count
