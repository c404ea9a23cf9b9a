"""What `annotate_vlm.py` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coreg.config import SAFE_CSV, option

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
    max_errors: int | None = option(
        None, "stop when more images than this cannot be read; default: never", (0, 1_000_000_000_000)
    )
    batch_size: int = option(64, "images a forward pass, per process", (1, 1_000_000))
    block_size: int = option(2048, "images a block, the unit of work that is kept when the job is stopped", (1, 1_000_000))
    workers: int = option(2, "processes that decode images, per process that annotates", (0, 1024))
    data_root: str = option("data", "where torchvision data sets lie or are downloaded to")
    safe_csv: bool = option(False, SAFE_CSV)
