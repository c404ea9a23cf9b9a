"""The options of `annotate_vlm.py`, and of what mends the evidence of a store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coreg.config import SAFE_CSV, option
from coreg.network_options import Network, Pixels

GLYPH_CLIP = "builtin:glyph-clip"


@dataclass
class AnnotateConfig:
    """What is annotated, by which model, into which folder."""

    images: str = option(
        "builtin:digits",
        "folder, .csv or .txt list, .tar or .parquet files, here or at URLs (s3://set/{000..999}.tar), torchvision data "
        "set, builtin:digits or, of several labels, builtin:digit-pictures",
    )
    vlm: str = option(
        GLYPH_CLIP,
        "open_clip NAME/TAG such as ViT-B-32/openai, local-dir:FOLDER, transformers:FOLDER, chat:FOLDER, or run:FOLDER for "
        "the networks of a finished run",
    )
    classes: str | None = option(None, "text file with one class name a line; default: the names that the images carry")
    templates: str | None = option(
        None, "text file with one prompt template a line; default: the papers' 27, for chat models six questions"
    )
    descriptions: str | None = option(
        None,
        'JSON file, class name to a list of texts that describe the class, such as {"crow": ["a black bird"]}, which count '
        "as much as the name (CLIP and SigLIP)",
    )
    temperature: float | None = option(
        None,
        "by which scores are divided before they become probabilities (CLIP and SigLIP); default: 1, or the store's own "
        "with --rescore",
        (1e-3, 1e3),
    )
    output_dir: str = option("runs/demo/annotations", "folder of the annotation store")
    task: Literal["single", "multi"] | None = option(
        None,
        "what the health report is about: one label an image, or several; default: several where the images carry several, "
        "or with --tiles",
    )
    tiles: list[int] | None = option(
        None,
        "for several labels an image, numbers such as 2 3: the features of 2x2 and 3x3 parts of every image are kept too, "
        "which costs a forward pass each",
        (1, 32),
    )
    rescore: str | None = option(None, "annotation store with features to judge again, instead of --images and --vlm")
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", "type of the model's weights and computations")
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


@dataclass
class ViewConfig(Pixels, Network):
    """Which network sees the images of a store, and what it sees of them."""

    backbone: str = option(
        "tf_efficientnet_lite0",
        "any timm model, or local-dir:FOLDER (default: tf_efficientnet_lite0, as recipe folder trains)",
    )
    pretrained: bool = option(True, "take timm's pretrained weights")
    image_size: int = option(128, "side in pixels to which images are resized", (1, 8192))
    mean: list[float] | None = option(
        None, "mean of the pixels in 0..1, one number or one a channel; default: that of the weights", (0, 1)
    )
    std: list[float] | None = option(
        None,
        "standard deviation of the pixels in 0..1, one number or one a channel; default: that of the weights",
        (0.001, 10),
    )
    mirror: bool = option(True, "take the mean over every image and its mirror image")
    batch_size: int = option(64, "images a forward pass, per process", (1, 1_000_000))
    block_size: int = option(256, "images a block, the unit of work that is kept when the job is stopped", (1, 1_000_000))
    workers: int = option(2, "processes that decode images, per process that encodes them", (0, 1024))


@dataclass
class RefineConfig:
    """Which features mend the evidence of a store, and how it is read."""

    output_dir: str | None = option(None, "folder of the refined annotation store")
    features: Literal["view", "own"] = option(
        "view", "view: those of the network that --backbone names; own: those that the annotator left in the store"
    )
    weight: float | None = option(
        None,
        "1: evidence is a prior; 0: it passes a confusion matrix; default: 0, 0.5 or 1, chosen without labels",
        (0, 1),
    )
    prior: Literal["auto", "uniform", "annotator", "estimated"] = option(
        "auto",
        "sizes of the classes; auto: uniform where those estimated come out nearly equal, else as they are estimated",
    )
