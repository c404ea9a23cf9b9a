"""Tools for annotation stores: look into one, check it, take its evidence elsewhere, make one of several.

python -m coreg.annotate info ann
python -m coreg.annotate verify ann
python -m coreg.annotate health ann                     # --task multi: of several labels an image
python -m coreg.annotate export ann --output candidates.csv
python -m coreg.annotate export runs/a --format label_studio --output tasks.json
python -m coreg.annotate publish ann --output_dir published
python -m coreg.annotate compare ann1 ann2
python -m coreg.annotate merge ann1 ann2 --output_dir ann
python -m coreg.annotate refine ann --output_dir ann2
"""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coreg.annotate import tag_health
from coreg.annotate.compared import as_lines, as_page, compare
from coreg.annotate.elsewhere import FORMS, LOCAL_FILES, of_run, of_store
from coreg.annotate.health import as_text, write_report
from coreg.annotate.publish import publish
from coreg.annotate.settings import RefineConfig, ViewConfig
from coreg.annotate.summary import summary
from coreg.config import SAFE_CSV, option, parse, paths_and_options
from coreg.data.decode import UnreadableImage
from coreg.errors import UserError, exits_with_one_line
from coreg.files import check_writable, file_name, making_folder, place_below, write_atomically, writing_csv
from coreg.hub import push_to_hub
from coreg.network_options import check_pixels
from coreg.plaintext import printable
from coreg.report.record import finished_report
from coreg.settings import Place
from coreg.store.manifest import block_files, read_manifest, same_command
from coreg.store.merge import merge
from coreg.store.store import AnnotationStore
from coreg.store.texts import TEXTS
from coreg.store.writer import StoreWriter
from coreg.weak.annotators import weights_of
from coreg.weak.rules import candidate_sets

SPLITS = ("train", "test", "val")


# ---- info and verify ------------------------------------------------------------------------------------------------


def info(folder: str) -> str:
    """What a store holds, finished or not, for a person."""
    root = Path(folder)
    manifest = read_manifest(root)
    files = block_files(root, manifest)
    there = [file for file in files if file.exists()]
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    model = ", ".join(f"{key} {value}" for key, value in manifest["model"].items())
    bad = StoreWriter(root, manifest).unreadable()
    lines = [
        f"images     {manifest['images']['count']} of {manifest['images']['spec']}",
        f"model      {model}",
        f"features   {manifest['features'] or 'none'}",
        f"described  {counted(manifest.get('descriptions'))}",
        f"blocks     {len(there)} of {len(files)}, {manifest['block_size']} images each, {size / 1e6:.1f} MB in all",
        f"unreadable {len(bad)}" + "".join(f"\n  row {row}: {reason}" for row, reason in list(bad.items())[:20]),
    ]
    if len(there) == len(files) and (root / "errors.csv").exists():
        return "\n".join([*lines, summary(AnnotationStore.open(root))])
    return "\n".join([*lines, f"unfinished: {same_command(manifest)}"])


def counted(descriptions: dict[str, list[str]] | None) -> str:
    """How many descriptions there are, in words."""
    return f"by {sum(map(len, descriptions.values()))} texts beside the names" if descriptions else "by names alone"


def verify(folder: str) -> tuple[str, bool]:
    """Check every byte of a store.

    Returns:
        the result, for a person; whether the store is finished and whole.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    writer = StoreWriter(root, manifest)
    missing = [index for index, file in enumerate(writer.files) if not file.exists()]
    damaged = [index for index in range(len(writer.files)) if index not in missing and not writer.is_written(index)]
    if not missing and not damaged:
        store = AnnotationStore.open(root)  # the lists, too
        if (root / TEXTS).exists() and store.kept_texts() is None:
            return f"{root / TEXTS} is damaged: delete it, and texts are encoded again where they are needed", False
        return f"{root} is whole: {len(writer.files)} blocks, {len(store)} images, sha256 {store.hash}", True
    lines = [f"{file.name} is damaged" for file in (writer.files[index] for index in damaged)]
    lines += [f"{len(missing)} of {len(writer.files)} blocks are missing"] if missing else []
    return "\n".join([*lines, f"{same_command(manifest)}: damaged and missing blocks are made anew"]), False


# ---- health ---------------------------------------------------------------------------------------------------------


def health(folder: str, place: Place, task: str | None = None) -> str:
    """Write the report of the store in `folder`, without pictures where the images cannot be opened; gives it as text.

    Args:
        place: where the images are, if not where they were annotated. task: see `tag_health.is_tagged`.

    Raises:
        UserError: there is no such store, or it cannot be written into.
    """
    store = AnnotationStore.open(folder).at(place.images, place.data_root)
    store.need_annotator(f"python -m coreg.annotate info {shlex.quote(str(store.root))} counts how noisy the sets are")
    try:
        images = store.images()
    except UserError as error:  # moved or changed since
        print(f"note: without pictures: {printable(error)}", file=sys.stderr)
        images = None
    if tag_health.is_tagged(store, task):
        written = tag_health.as_text(store, tag_health.write_report(store, images))
    else:
        written = as_text(store, write_report(store, images))
    return written + printable(store.root / "report.html")


# ---- export ---------------------------------------------------------------------------------------------------------


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


def export(folder: str, config: ExportConfig, place: Place | None = None) -> str:
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
    place = place or Place()
    store = AnnotationStore.open(folder).at(place.images, place.data_root)
    if target.suffix == ".csv":
        _to_csv(store, target, config.candidates, config.safe_csv)
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


def _to_csv(store: AnnotationStore, target: Path, rule: str, safe_csv: bool) -> None:
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


# ---- command line ---------------------------------------------------------------------------------------------------


@dataclass
class MergeConfig:
    """Where the new store goes."""

    output_dir: str | None = option(None, "folder of the new annotation store")
    weights: Literal["equal", "agreement"] = option(
        "equal",
        "of several annotators' probabilities: all templates alike, or each annotator by what held-out agreement says of "
        "it (see compare); votes count as they are",
    )


@dataclass
class CompareConfig:
    """Where the comparison goes beside the terminal."""

    output: str | None = option(None, "an .html file for the comparison as a page")


def _compare(folders: list[str], options: list[str]) -> str:
    (config,) = parse(CompareConfig, argv=options, prog="python -m coreg.annotate compare")
    if config.output is not None:
        check_writable(Path(config.output), "--output")
    made = compare([AnnotationStore.open(folder) for folder in folders])
    if config.output is not None:
        write_atomically(config.output, as_page(made))
    return as_lines(made)


def _merge(folders: list[str], options: list[str]) -> str:
    (config,) = parse(MergeConfig, argv=options, prog="python -m coreg.annotate merge")
    if config.output_dir is None:
        raise UserError("--output_dir is missing; write: merge ann1 ann2 --output_dir ann")
    weights = None
    if config.weights == "agreement":
        made = compare([AnnotationStore.open(folder) for folder in folders])
        if made.estimated is None:
            raise UserError("held-out agreement says nothing of these annotators; leave out --weights")
        weights = weights_of(made.estimated, made.classes).tolist()
    root, done = merge(folders, config.output_dir, weights)
    weighed = f", weighed {' : '.join(f'{weight:.2f}' for weight in weights)}" if weights else ""
    return f"{root}: {done}{weighed}"


def _export(folders: list[str], options: list[str]) -> str:
    config, place = parse(ExportConfig, Place, argv=options, prog="python -m coreg.annotate export")
    return export(_only(folders), config, place)


@dataclass
class PublishConfig:
    """Where the data set goes."""

    output_dir: str | None = option(None, "new folder for evidence, card and description, without images")
    push_to_hub: str | None = option(None, "USER/NAME: upload that folder to the hub, as a private data set")


def _publish(folders: list[str], options: list[str]) -> str:
    (config,) = parse(PublishConfig, argv=options, prog="python -m coreg.annotate publish")
    if config.output_dir is None:
        raise UserError("--output_dir is missing; write: publish ann --output_dir published")
    target, store = Path(config.output_dir), AnnotationStore.open(_only(folders))
    if target.exists():
        raise UserError(f"{target} is there already; give another --output_dir")
    publish(store, target, lambda path: _to_csv(store, path, "union", safe_csv=False))
    done = f"{target}: what was seen in {len(store)} images; read its README.md before anybody else does"
    if config.push_to_hub:
        done += f"\n{push_to_hub(target, config.push_to_hub, 'dataset', 'Published by coreg')}"
    return done


@dataclass
class HealthConfig:
    """What a health report is about."""

    task: Literal["single", "multi"] | None = option(
        None, "one label an image, or several; default: several where the images carry several, or there are tiles"
    )


def _health(folders: list[str], options: list[str]) -> str:
    config, place = parse(HealthConfig, Place, argv=options, prog="python -m coreg.annotate health")
    return health(_only(folders), place, config.task)


def _only(folders: list[str]) -> str:
    if len(folders) != 1:
        raise UserError(f"write the folder of one annotation store, not {len(folders)}")
    return folders[0]


def _refine(folders: list[str], options: list[str]) -> str | None:
    config, view = parse(RefineConfig, ViewConfig, argv=options, prog="python -m coreg.annotate refine")
    if config.output_dir is None:
        raise UserError("--output_dir is missing; write for example: refine ann --output_dir ann2")
    check_pixels(view)
    # here, not above: the other tools need no networks
    from coreg.annotate.refined import refine_store
    from coreg.process import all_or_none, build_accelerator

    accelerator = build_accelerator(timeout_minutes=60)
    source = all_or_none(accelerator, lambda: AnnotationStore.open(_only(folders)))
    store = refine_store(source, Path(config.output_dir), config, view, accelerator)
    return summary(store) if accelerator.is_main_process else None


# folders and options -> a text for a person, and whether a store that was verified is whole
COMMANDS: dict[str, Callable[[list[str], list[str]], str | tuple[str, bool] | None]] = {
    "info": lambda folders, options: info(_only(folders)),
    "verify": lambda folders, options: verify(_only(folders)),
    "health": _health,
    "export": _export,
    "compare": _compare,
    "merge": _merge,
    "publish": _publish,
    "refine": _refine,
}


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> int:
    """`python -m coreg.annotate COMMAND DIR ...`; the exit code of `verify` is 1 for a store that is not whole."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        raise UserError(f"unknown command {words[0]}; write one of {', '.join(COMMANDS)} and the folder of a store")
    result = command(*paths_and_options(words[1:]))
    result, whole = result if isinstance(result, tuple) else (result, True)
    if result is not None:
        print(printable(result, lines=True))
    return 0 if whole else 1
