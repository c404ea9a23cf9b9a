"""What `annotate_vlm.py` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coreg.config import option
from coreg.errors import UserError

GLYPH_CLIP = "builtin:glyph-clip"


@dataclass
class AnnotateConfig:
    """What is annotated, by which model, into which folder."""

    images: str = option(
        "builtin:digits", "folder, .csv list (path[,label][,split]), .tar shards, torchvision data set or builtin:digits"
    )
    vlm: str = option(
        GLYPH_CLIP,
        "open_clip NAME/TAG such as ViT-B-32/openai, local-dir:FOLDER, transformers:FOLDER or chat:FOLDER",
    )
    classes: str | None = option(None, "text file with one class name a line; default: the names that the images carry")
    templates: str | None = option(
        None, "text file with one prompt template a line; default: the papers' 27, for chat models six questions"
    )
    output_dir: str = option("runs/demo/annotations", "folder of the annotation store")
    rescore: str | None = option(None, "annotation store with features to judge again, instead of --images and --vlm")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "of the model's weights and computations")
    chat_mode: Literal["likelihood", "generate"] = option(
        "likelihood", "chat models: likelihood of every class name, or the answer in words"
    )
    max_errors: int | None = option(None, "stop when more images than this cannot be read; default: never")
    batch_size: int = option(64, "images a forward pass, per process")
    block_size: int = option(2048, "images a block, the unit of work that is kept when the job is stopped")
    workers: int = option(2, "processes that decode images, per process that annotates")
    data_root: str = option("data", "where torchvision data sets lie or are downloaded to")


def check(config: AnnotateConfig) -> None:
    """Refuse numbers that make no sense.

    Raises:
        UserError: the first one found.
    """
    if min(config.batch_size, config.block_size) < 1 or config.workers < 0:
        raise UserError("--batch_size and --block_size must be at least 1 and --workers at least 0")
    if config.max_errors is not None and config.max_errors < 0:
        raise UserError(f"--max_errors is {config.max_errors}; give 0 or more, or leave it out for no limit")
