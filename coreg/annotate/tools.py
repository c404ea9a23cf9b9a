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

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coreg.annotate import tag_health
from coreg.annotate.compared import as_lines, as_page, compare
from coreg.annotate.export import ExportConfig, export, to_csv
from coreg.annotate.health import as_text, write_report
from coreg.annotate.publish import publish
from coreg.annotate.settings import RefineConfig, ViewConfig
from coreg.annotate.summary import summary
from coreg.config import option, parse, paths_and_options
from coreg.errors import UserError, exits_with_one_line
from coreg.files import check_writable, write_atomically
from coreg.hub import push_to_hub
from coreg.network_options import check_pixels
from coreg.plaintext import printable
from coreg.settings import Place
from coreg.store.manifest import block_files, read_manifest, same_command
from coreg.store.merge import merge
from coreg.store.store import AnnotationStore
from coreg.store.texts import TEXTS
from coreg.store.writer import StoreWriter
from coreg.weak.annotators import weights_of

# ---- info and verify ------------------------------------------------------------------------------------------------


def info(folder: str) -> str:
    """What a store holds, finished or not, for a person."""
    root = Path(folder)
    manifest = read_manifest(root)
    files = block_files(root, manifest)
    there = [file for file in files if file.exists()]
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    model = ", ".join(f"{key} {value}" for key, value in manifest["model"].items())
    bad, texts = StoreWriter(root, manifest).unreadable(), manifest.get("descriptions")
    lines = [
        f"images     {manifest['images']['count']} of {manifest['images']['spec']}",
        f"model      {model}",
        f"features   {manifest['features'] or 'none'}",
        f"described  {f'by {sum(map(len, texts.values()))} texts beside the names' if texts else 'by names alone'}",
        f"blocks     {len(there)} of {len(files)}, {manifest['block_size']} images each, {size / 1e6:.1f} MB in all",
        f"unreadable {len(bad)}" + "".join(f"\n  row {row}: {reason}" for row, reason in list(bad.items())[:20]),
    ]
    if len(there) == len(files) and (root / "errors.csv").exists():
        return "\n".join([*lines, summary(AnnotationStore.open(root))])
    return "\n".join([*lines, f"unfinished: {same_command(manifest)}"])


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


@dataclass
class HealthConfig:
    """What a health report is about."""

    task: Literal["single", "multi"] | None = option(
        None, "one label an image, or several; default: several where the images carry several, or there are tiles"
    )


def _health(folders: list[str], options: list[str]) -> str:
    """Write the report of a store, without pictures where the images cannot be opened; gives it as text."""
    config, place = parse(HealthConfig, Place, argv=options, prog="python -m coreg.annotate health")
    store = AnnotationStore.open(_only(folders)).at(place.images, place.data_root)
    store.need_annotator(f"python -m coreg.annotate info {shlex.quote(str(store.root))} counts how noisy the sets are")
    try:
        images = store.images()
    except UserError as error:  # moved or changed since
        print(f"note: without pictures: {printable(error)}", file=sys.stderr)
        images = None
    if tag_health.is_tagged(store, config.task):
        written = tag_health.as_text(store, tag_health.write_report(store, images))
    else:
        written = as_text(store, write_report(store, images))
    return written + printable(store.root / "report.html")


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
    publish(store, target, lambda path: to_csv(store, path, "union", safe_csv=False))
    done = f"{target}: what was seen in {len(store)} images; read its README.md before anybody else does"
    if config.push_to_hub:
        done += f"\n{push_to_hub(target, config.push_to_hub, 'dataset', 'Published by coreg')}"
    return done


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


def _export(folders: list[str], options: list[str]) -> str:
    config, place = parse(ExportConfig, Place, argv=options, prog="python -m coreg.annotate export")
    return export(_only(folders), config, place)


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
