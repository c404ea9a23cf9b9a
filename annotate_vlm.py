"""Annotate unlabelled images with a vision-language model: images + class names -> annotation store.

    accelerate launch annotate_vlm.py
        annotates the built-in handwritten digits with the built-in tiny CLIP, into runs/demo/annotations

    accelerate launch annotate_vlm.py --images photos --classes classes.txt --vlm ViT-B-32/openai --output_dir ann
        annotates a folder of one's own; classes.txt has one class name a line

Every image is judged under every prompt template. The store keeps the evidence (votes, mean probabilities, features) block
by block; nothing is decided yet. The same command again goes on where it was stopped, with any number of processes.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import PIL
import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import coreg
from coreg.annotate.annotators import GLYPH_CLIP, ClipAnnotator, resolve
from coreg.annotate.prompts import TEMPLATES, read_class_names, read_templates
from coreg.annotate.store import AnnotationStore, StoreWriter, make_manifest, refuse_other_job
from coreg.annotate.summary import summary
from coreg.config import option, parse
from coreg.data.decode import UnreadableImage
from coreg.data.sources import ImageList, list_hash, open_images, require_readable
from coreg.demo.annotator import demo_templates
from coreg.errors import UserError, exits_with_one_line
from coreg.run.process import build_accelerator, main_process_decides


@dataclass
class AnnotateConfig:
    """What is annotated, by which model, into which folder."""

    images: str = option(
        "builtin:digits", "folder, .csv list (path[,label][,split]), torchvision data set or builtin:digits"
    )
    vlm: str = option(GLYPH_CLIP, "open_clip NAME/TAG such as ViT-B-32/openai, local-dir:FOLDER or builtin:glyph-clip")
    classes: str | None = option(None, "text file with one class name a line; default: the names that the images carry")
    templates: str | None = option(None, "text file with one prompt template a line; default: the papers' 27")
    output_dir: str = option("runs/demo/annotations", "folder of the annotation store")
    batch_size: int = option(64, "images a forward pass, per process")
    block_size: int = option(2048, "images a block, the unit of work that is kept when the job is stopped")
    workers: int = option(2, "processes that decode images, per process that annotates")
    data_root: str = option("data", "where torchvision data sets lie or are downloaded to")


def annotate(config: AnnotateConfig, accelerator: Accelerator | None = None) -> AnnotationStore:
    """Make the annotation store, or finish it, or find it finished.

    Args:
        config: the job.
        accelerator: the process group; by default a new one.

    Returns:
        The verified store, on every process.

    Raises:
        UserError: something in the job is wrong; nothing has been written then.
    """
    accelerator = accelerator or build_accelerator(timeout_minutes=24 * 60)
    root = Path(config.output_dir)
    # The main process looks at the files and everyone believes it; it keeps the list that it opened.
    opened: list[ImageList] = []
    job, finished = main_process_decides(accelerator, lambda: look(config, opened))
    if finished:
        accelerator.print(f"{root} holds these annotations already: nothing to do")
        return AnnotationStore.open(root)
    images = opened[0] if opened else open_images(config.images, job["class_names"], config.data_root)
    if list_hash(images.paths) != job["images"]["sha256"]:
        raise UserError(f"{config.images} looks different to process {accelerator.process_index}; put it on a shared disk")

    # The text side is encoded once, here; from now on an image costs one pass through the image tower.
    annotator = ClipAnnotator(resolve(config.vlm), job["templates"], job["class_names"], accelerator.device)
    if config.vlm == GLYPH_CLIP and config.images != "builtin:digits":
        accelerator.print(f"note: {GLYPH_CLIP} reads single digits and nothing else; name another model with --vlm")
    told = {"features": annotator.features, "preprocessing": annotator.preprocessing, "versions": versions()}
    writer = StoreWriter(root, job | told)
    main_process_decides(accelerator, lambda: writer.begin(images))

    # No process waits for another one before all blocks are written.
    blocks = range(accelerator.process_index, len(writer.files), accelerator.num_processes)
    annotate_blocks([index for index in blocks if not writer.is_written(index)], images, annotator, writer, config)
    accelerator.wait_for_everyone()
    main_process_decides(accelerator, lambda: writer.finish(images.paths))
    return AnnotationStore.open(root)


def look(config: AnnotateConfig, opened: list[ImageList]) -> tuple[dict[str, Any], bool]:
    """Check the whole job before anything is written.

    Args:
        config: the job.
        opened: takes the image list.

    Returns:
        The manifest so far, and whether the store is finished already.

    Raises:
        UserError: the first thing that is wrong.
    """
    if min(config.batch_size, config.block_size) < 1 or config.workers < 0:
        raise UserError("--batch_size and --block_size must be at least 1 and --workers at least 0")
    class_names = read_class_names(config.classes) if config.classes else None
    templates = read_templates(config.templates) if config.templates else default_templates(config)
    images = open_images(config.images, class_names, config.data_root)
    opened.append(images)
    class_names = class_names or images.class_names
    if class_names is None:
        raise UserError(
            f"{config.images} says no class names: write them into classes.txt, one a line, and add --classes classes.txt"
        )
    model = resolve(config.vlm)
    identity = {"spec": model.spec, "weights": model.weights}
    data_root = str(Path(config.data_root).resolve())
    job = make_manifest(images, class_names, templates, identity, config.block_size, data_root=data_root)
    root = Path(config.output_dir)
    refuse_other_job(root, job)
    if (root / "manifest.json").exists():
        StoreWriter(root, job).begin(images)  # labels may have come since
    try:
        AnnotationStore.open(root)
        return job, True
    except UserError:  # not there, unfinished or damaged: what is missing will be made
        require_readable(images)
        return job, False


def default_templates(config: AnnotateConfig) -> Sequence[str]:
    """The papers' templates, or those that the built-in model was trained with."""
    return demo_templates() if config.vlm == GLYPH_CLIP else TEMPLATES


class Preprocessed(Dataset):
    """Row -> (row, float32 (3, H, W), reason); an image that cannot be read is zero and has a reason."""

    def __init__(self, images: ImageList, annotator: ClipAnnotator) -> None:
        self.images, self.preprocess, self.shape = images, annotator.preprocess, annotator.image_shape

    def __getitem__(self, row: int) -> tuple[int, torch.Tensor, str]:
        try:
            return row, self.preprocess(self.images.load(row)), ""
        except UnreadableImage as error:
            return row, torch.zeros(self.shape), str(error)


def annotate_blocks(
    blocks: Sequence[int], images: ImageList, annotator: ClipAnnotator, writer: StoreWriter, config: AnnotateConfig
) -> None:
    """Annotate whole blocks and write each as soon as it is complete.

    Batches never cross the border of a block, so that a block's content does not depend on which others were done before.
    """
    size = config.batch_size
    batches = [rows[start : start + size] for rows in map(writer.rows, blocks) for start in range(0, len(rows), size)]
    loader = DataLoader(
        Preprocessed(images, annotator),
        batch_sampler=batches,
        num_workers=min(config.workers, len(batches)),
        pin_memory=annotator.device.type == "cuda",
    )
    arriving = iter(loader)
    total = sum(len(batch) for batch in batches)
    with tqdm(total=total, unit="image", desc="annotating", disable=not PartialState().is_main_process) as bar:
        for index in blocks:
            parts, errors = [], {}
            for _ in range(0, len(writer.rows(index)), size):
                rows, pixels, reasons = next(arriving)
                parts.append(annotator.annotate(pixels))
                errors |= {int(row): reason for row, reason in zip(rows, reasons) if reason}
                bar.update(len(pixels))
            votes, probs, features = (torch.cat(column).numpy() for column in zip(*parts))
            writer.write(index, {"votes": votes, "probs": probs, "features": features}, errors)


def versions() -> dict[str, str]:
    """Versions of what the annotations depend on."""
    return {
        "coreg": coreg.__version__,
        "open_clip": open_clip.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, annotate, and say what came out."""
    (config,) = parse(AnnotateConfig, argv=argv, prog="annotate_vlm.py", description=__doc__)
    store = annotate(config)
    if PartialState().is_main_process:
        print(summary(store))


if __name__ == "__main__":
    main()
