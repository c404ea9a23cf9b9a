"""Annotate unlabelled images with a vision-language model: images + class names -> annotation store.

    accelerate launch annotate_vlm.py
        annotates the built-in handwritten digits with the built-in tiny CLIP, into runs/demo/annotations

    accelerate launch annotate_vlm.py --images photos --classes classes.txt --vlm ViT-B-32/openai --output_dir ann
        annotates a folder of one's own; classes.txt has one class name a line

    accelerate launch annotate_vlm.py --images photos --classes classes.txt --vlm chat:llava-1.5-7b-hf --output_dir ann
        asks a chat model that was downloaded into the folder llava-1.5-7b-hf

    accelerate launch annotate_vlm.py --images photos --vlm run:runs/tuned --output_dir ann_tuned
        annotates with the networks of a finished run, such as an annotator that was tuned on its own candidate sets

    accelerate launch annotate_vlm.py --rescore ann --classes other.txt --output_dir ann2
        judges the same images under other class names or templates, from the features in ann; no image is read

    accelerate launch annotate_vlm.py --rescore ann --descriptions names.json --output_dir ann2
        judges them again by names and descriptions, {"crow": ["a black bird with a black bill"], ...}

Every image is judged under every prompt template. The store keeps the evidence (votes, mean probabilities, features) block
by block; nothing is decided yet. The same command again goes on where it was stopped, with any number of processes, which
may also be started one by one on several machines that share the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coreg.annotate.settings import GLYPH_CLIP, AnnotateConfig
from coreg.config import check_bounds, parse
from coreg.errors import UserError, exits_with_one_line


@exits_with_one_line
def read_settings(argv: Sequence[str] | None = None) -> AnnotateConfig:
    """The job, as the command line has it."""
    (config,) = parse(AnnotateConfig, argv=argv, prog="annotate_vlm.py", description=__doc__)
    return config


if __name__ == "__main__":
    read_settings()  # what is wrong with it is reported before the imports below, which take seconds

import dataclasses
import platform
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import PIL
import torch
import transformers
from accelerate import Accelerator, PartialState

import coreg
from coreg.annotate import tag_health
from coreg.annotate.annotators import SAME, Annotator, ClipAnnotator, load_annotator
from coreg.annotate.chat import CHAT_TEMPLATES
from coreg.annotate.exported import RUN_TEMPLATES
from coreg.annotate.health import REPORTS, notes_of, write_report
from coreg.annotate.models import PRECISIONS, ModelSpec, resolve
from coreg.annotate.prompts import TEMPLATES, read_descriptions, read_templates
from coreg.annotate.scores import TextSide, kept_side
from coreg.annotate.summary import summary
from coreg.annotate.texts import compare_texts
from coreg.annotate.textual import model_of
from coreg.annotate.tiles import TiledAnnotator, checked_grids
from coreg.annotate.work import annotated, every_block, rescored
from coreg.data.class_names import read_class_names
from coreg.data.images import ImageList, absolute_path, list_hash, translated
from coreg.data.sources import BUILT_IN, open_images, require_readable
from coreg.data.tags import translated_tags
from coreg.demo.annotator import demo_templates
from coreg.export.folder import read_settings as read_export
from coreg.plaintext import printable
from coreg.process import build_accelerator, main_process_decides
from coreg.store.store import AnnotationStore, StoreWriter, continued, make_manifest
from coreg.store.texts import TextFeatures, read_texts, write_texts


@dataclass
class Job:
    """What the main process knows before anything is written."""

    manifest: dict[str, Any]  # of the store; of a new one, but for what only the loaded model can tell
    model: ModelSpec | None  # the annotator's; None where the store that is judged again keeps all texts
    finished: bool  # whether the store is there and whole


def annotate(config: AnnotateConfig, accelerator: Accelerator | None = None) -> AnnotationStore:
    """Make the annotation store, or finish it, or find it finished.

    Args:
        config: the job.
        accelerator: the process group; by default a new one.

    Returns:
        The verified store, on every process.

    Raises:
        UserError: something in the job is wrong; nothing has been written then. Or more than `max_errors` images cannot
            be read; what was annotated is kept.
    """
    check_bounds(config)
    accelerator = accelerator or build_accelerator(timeout_minutes=60)
    root = Path(config.output_dir)
    # The main process reads the files and everyone believes it; it keeps the list that it opened.
    opened: list[ImageList] = []
    make_job = job_on_store if config.rescore else job_on_images
    job: Job = main_process_decides(accelerator, lambda: make_job(config, opened))
    if job.finished:
        accelerator.print(f"{printable(root)} holds these annotations already: nothing to do")
        store = AnnotationStore.open(root)
        if accelerator.is_main_process and not all((root / name).exists() for name in REPORTS):
            write_health(config, store, opened)  # a disk was full, perhaps
        return store
    manifest = job.manifest
    if not opened and not config.rescore:
        opened.append(open_images(config.images, manifest["class_names"], config.data_root))
        if list_hash(opened[0].paths) != manifest["images"]["sha256"]:
            raise UserError(
                f"{config.images} looks different to process {accelerator.process_index}; put it on a shared disk"
            )

    # The text side is encoded once, here; from now on an image costs one pass through the image tower.
    if config.vlm == GLYPH_CLIP and config.images not in BUILT_IN:
        accelerator.print(f"note: {GLYPH_CLIP} reads single digits and nothing else; name another model with --vlm")
    source = AnnotationStore.open(config.rescore) if config.rescore else None
    annotator, preprocessing, notes, kept = judge_of(job, source, config.chat_mode, accelerator.device)
    if manifest.get("tiles") and not config.rescore:
        annotator = TiledAnnotator(annotator, manifest["tiles"])
    for note in notes:
        accelerator.print(f"note: {printable(note)}")
    details = {"features": annotator.features, "preprocessing": preprocessing, "versions": versions()}
    writer = StoreWriter(root, manifest | details)
    main_process_decides(accelerator, lambda: start(writer, opened[0], kept))
    for line in main_process_decides(accelerator, writer.discard_damaged):
        accelerator.print(f"damaged, annotated again: {printable(line)}")

    if source is not None:
        evidence = partial(rescored, source=source, annotator=annotator, batch_size=config.batch_size)
    else:
        more = {"batch_size": config.batch_size, "workers": config.workers}
        evidence = partial(annotated, images=opened[0], annotator=annotator, writer=writer, **more)
    limits = {"safe_csv": config.safe_csv, "max_errors": config.max_errors}
    progress = every_block(writer, opened[0].paths, accelerator, evidence, **limits)
    if progress.few_bits:
        print(
            f"note: {progress.few_bits} images of 16 bits a channel have no value above a quarter of the range and are "
            f"nearly black; scale them to the full range, or write TIFF files that say how many bits they use"
        )
    store = AnnotationStore.open(root)
    if accelerator.is_main_process:
        write_health(config, store, opened)
    return store


def judge_of(
    job: Job, source: AnnotationStore | None, chat_mode: str, device: torch.device
) -> tuple[Annotator | TextSide, dict[str, Any], list[str], Callable[[], TextFeatures | None]]:
    """What judges images, its preprocessing, notes for the person, and what makes the texts that its store keeps.

    Raises:
        UserError: the model cannot be had, or two classes are the same to it.
    """
    manifest = job.manifest
    names, templates, descriptions = manifest["class_names"], manifest["templates"], manifest.get("descriptions")
    temperature = manifest["model"].get("temperature") or 1.0
    if job.model is None:
        side = kept_side(source, templates, names, descriptions, temperature, device)
        spec, uncut = manifest["model"]["spec"], torch.zeros(len(names), dtype=torch.bool)
        notes = compare_texts(side.text, uncut, templates, names, spec, SAME[PRECISIONS[manifest["model"]["precision"]]])
        return side, source.manifest["preprocessing"], notes, source.kept_texts
    precision = manifest["model"]["precision"]
    annotator = load_annotator(job.model, templates, names, device, precision, chat_mode, descriptions, temperature)
    kept = annotator.kept_texts if isinstance(annotator, ClipAnnotator) else lambda: None
    return annotator, annotator.preprocessing, annotator.notes, kept


def start(writer: StoreWriter, images: ImageList, kept: Callable[[], TextFeatures | None]) -> None:
    """Make the folder or go on with it, and let it keep the texts that images are compared with.

    Raises:
        UserError: it holds something else, or cannot be written.
    """
    writer.start(images)
    if read_texts(writer.root, writer.manifest) is None and (texts := kept()) is not None:
        write_texts(writer.root, writer.manifest, texts)


def write_health(config: AnnotateConfig, store: AnnotationStore, opened: list[ImageList]) -> None:
    """The health report, of one label an image or of several."""
    write = tag_health.write_report if tag_health.is_tagged(store, config.task) else write_report
    write(store, None if config.rescore else opened[0])


def job_on_images(config: AnnotateConfig, opened: list[ImageList]) -> Job:
    """Check the whole job before anything is written.

    Args:
        config: the job.
        opened: takes the image list.

    Raises:
        UserError: the first thing that is wrong.
    """
    if config.task == "multi" and config.vlm.startswith(("chat:", "run:")):
        raise UserError(f"--task multi compares images with texts, which {config.vlm} does not; name another with --vlm")
    model = resolve(config.vlm)
    for name in ("descriptions", "temperature"):
        if getattr(config, name) is not None and model.kind in ("chat", "run"):
            kind = "a chat model" if model.kind == "chat" else "a finished run"
            raise UserError(f"--{name} is for models of the CLIP family, and {model.spec} is {kind}; leave it out")
    class_names = read_class_names(config.classes) if config.classes else None
    if model.kind == "run":
        class_names = classes_of_run(config, model, class_names)
    usual = {"chat": CHAT_TEMPLATES, "run": RUN_TEMPLATES}.get(model.kind, TEMPLATES)
    usual = demo_templates() if model.spec == GLYPH_CLIP else usual
    templates = read_templates(config.templates) if config.templates else usual
    images = open_images(config.images, class_names, config.data_root)
    opened.append(images)
    class_names = class_names or images.class_names
    if class_names is None:
        raise UserError(
            f"{config.images} says no class names: write them into classes.txt, one a line, and add --classes classes.txt"
        )
    identity = {"spec": model.spec, "weights": model.weights, "precision": config.precision}
    if model.kind == "chat":
        identity["mode"] = config.chat_mode
    if config.temperature not in (None, 1.0):
        identity["temperature"] = config.temperature
    details = {"data_root": str(absolute_path(config.data_root)), "notes": images.notes}
    if config.descriptions:
        details["descriptions"] = read_descriptions(config.descriptions, class_names)
    if config.tiles:
        details["tiles"] = checked_grids(config.tiles, model)
    manifest = make_manifest(images, class_names, templates, identity, config.block_size, **details)
    manifest, finished = check_folder(config, manifest, images)
    if not finished:
        require_readable(images)
    return Job(manifest, model, finished)


def classes_of_run(config: AnnotateConfig, model: ModelSpec, asked: list[str] | None) -> list[str]:
    """The class names of a finished run that annotates, whose networks know no others and read no texts.

    Raises:
        UserError: others are asked for, or templates, or another precision than theirs.
    """
    names = read_export(Path(model.name))["class_names"]
    if asked is not None and asked != names:
        raise UserError(f"{config.classes} has other classes than {model.spec}, or in another order; leave out --classes")
    if config.templates:
        raise UserError(f"{model.spec} is a finished run, which reads no texts; leave out --templates")
    if config.precision != "fp32":
        raise UserError(f"{model.spec} is a finished run, which computes in fp32; leave out --precision")
    return names


def job_on_store(config: AnnotateConfig, opened: list[ImageList]) -> Job:
    """As `job_on_images`, for a store that is judged again.

    Raises:
        UserError: the first thing that is wrong.
    """
    if config.tiles:
        raise UserError("--tiles takes features of parts of images, and --rescore opens none; annotate with --images")
    store = AnnotationStore.open(config.rescore)
    store.need_annotator()
    store.need_features()
    class_names = read_class_names(config.classes) if config.classes else store.class_names
    templates = read_templates(config.templates) if config.templates else store.templates
    descriptions = read_descriptions(config.descriptions, class_names) if config.descriptions else store.descriptions
    if descriptions is not None and (others := [name for name in class_names if name not in descriptions]):
        raise UserError(
            f"{config.rescore} was annotated with descriptions, of which there is none for {others[0]!r}; describe the "
            f"classes of {config.classes} with --descriptions names.json"
        )
    model = None if kept_side(store, templates, class_names, descriptions) is not None else model_of(store)
    temperature = store.temperature if config.temperature is None else config.temperature
    by = {name: value for name, value in store.manifest["model"].items() if name != "temperature"}
    by |= {} if temperature == 1 else {"temperature": temperature}
    labels = None if store.labels is None else translated(store.labels, store.class_names, class_names)
    tags = None if store.tags is None else translated_tags(store.tags, store.class_names, class_names)
    images = dataclasses.replace(store.image_list(), labels=labels, tags=tags)
    opened.append(images)
    kept = {key: store.manifest[key] for key in ("block_size", "data_root", "tiles") if key in store.manifest}
    kept["notes"] = notes_of(store.manifest)
    kept |= {} if descriptions is None else {"descriptions": {name: descriptions[name] for name in class_names}}
    manifest = make_manifest(images, class_names, templates, by, **kept)
    manifest, finished = check_folder(config, manifest, images)
    return Job(manifest, model, finished)


def annotate_digits(folder: Path, accelerator: Accelerator) -> AnnotationStore:
    """The store of the built-in digits, which training scripts use where they are given none."""
    return annotate(AnnotateConfig(output_dir=str(folder)), accelerator)


def annotate_digit_pictures(folder: Path, accelerator: Accelerator) -> AnnotationStore:
    """The same of pictures with several digits, with features of their quarters."""
    return annotate(AnnotateConfig("builtin:digit-pictures", output_dir=str(folder), tiles=[2]), accelerator)


def check_folder(config: AnnotateConfig, manifest: dict[str, Any], images: ImageList) -> tuple[dict[str, Any], bool]:
    """The manifest to go on with, and whether --output_dir holds this very job, finished and whole.

    Raises:
        UserError: it holds something else.
    """
    root = Path(config.output_dir)
    manifest = continued(root, manifest)
    if "features" not in manifest:  # a new store, or one whose manifest.json is damaged
        return manifest, False
    StoreWriter(root, manifest).start(images)  # labels, or the images in another place, may have come since
    try:
        AnnotationStore.open(root)
        return manifest, True
    except UserError:  # unfinished or damaged: what is missing will be made
        return manifest, False


def versions() -> dict[str, str]:
    """Versions of what the annotations depend on."""
    return {
        "coreg": coreg.__version__,
        "open_clip": open_clip.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, annotate, and say what came out."""
    config = read_settings(argv)
    store = annotate(config)
    if PartialState().is_main_process:
        print(tag_health.summary(store) if tag_health.is_tagged(store, config.task) else summary(store))


if __name__ == "__main__":
    main()
