"""The option groups of a job that scripts combine: where things are, labels, the optimiser.

Scripts that train networks of our own take all of them, as `JobConfig`, and `coreg.network_options.ImageConfig`; the others
derive from the groups they need.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar, Literal

from coreg.config import SAFE_CSV, SEEDS, advanced, option
from coreg.errors import UserError
from coreg.learn.schedules import cosine_lr
from coreg.weak.prefilter import SPELLINGS

# accelerate's trackers and the packages of which each needs one
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX")} | {
    name: (name,) for name in ("wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
}


@dataclass
class Place:
    """job: where the images are, if not where they were annotated."""

    images: str | None = advanced(
        None, "where the images of the store are now; default: where they were annotated", job=False
    )
    data_root: str | None = advanced(
        None, "where torchvision data sets are now; default: where they were annotated", job=False
    )


@dataclass
class Job(Place):
    """job: where things are and how a job runs."""

    annotations: str | None = option(
        None, "annotation store made by annotate_vlm.py; without it the built-in digits are used", job=False
    )
    output_dir: str | None = option(
        None,
        "the run folder (runs/demo, or runs/METHOD for a baseline); the same command again goes on where it stopped",
        job=False,
    )
    seed: int = option(0, "seed of everything random", SEEDS)
    mixed_precision: Literal["no", "bf16"] = option("no", "16-bit arithmetic where it is safe (autocast)")
    print_config: bool = option(False, "print the resolved settings as a recipe and stop", job=False)
    dtype: Literal["float32", "float64"] = advanced(
        "float32", "type of weights and arithmetic; float64 to compare runs exactly"
    )
    workers: int = advanced(2, "processes that decode images", (0, 1024), job=False)
    checkpoint_minutes: float = advanced(
        10.0, "a checkpoint is written every epoch, and after so many minutes within one", (0, 1_000_000), job=False
    )
    timeout_minutes: float = advanced(
        10.0, "a job ends when a process does not answer for so long", (0.001, 100_000), job=False
    )
    report_to: str = advanced(
        "tensorboard", "where curves go: tensorboard, another of accelerate's trackers, or none", job=False
    )
    safe_csv: bool = advanced(False, SAFE_CSV, job=False)


@dataclass
class Home:
    """images: where decoded images are kept."""

    pixels: Literal["auto", "device", "host", "disk"] = advanced(
        "auto",
        "where decoded images are kept: in the device's memory, in memory that all processes of a machine share (host), or "
        "in one file that later runs share (disk); auto: the first of these with room for them",
        job=False,
    )
    pixels_dir: str | None = advanced(
        None, "folder of the files of --pixels disk; default: pixels in the annotation store", job=False
    )


@dataclass
class Labels:
    """labels: what the labels come from, and how many images are trained on."""

    candidates: str = option("union", "candidate rule: union, votes:V, topk:K, prob:P, ratio:R or cumulative:P")
    prefilter: str = advanced(
        "none", f"candidates that a zero-shot classifier finds unlikely are dropped before training: {SPELLINGS}"
    )
    prefilter_annotations: str | None = advanced(
        None,
        "store of the same images by an annotator, by whose probabilities --prefilter goes and whose tower --backbone "
        "annotator takes; default: --annotations",
        job=False,
    )
    refine: Literal["none", "auto", "own", "view"] = option(
        "none",
        "mend the annotator's evidence before training, by its own features or by a view, those of the backbone's "
        "starting weights; auto: by a view of pretrained weights, if it tells the classes apart well enough; the refined "
        "store lies in the run folder",
    )
    few_shot: int = option(0, "true labels a class to train with, drawn from the store's own labels", (0, 1_000_000))
    labels: str | None = option(None, "CSV file (path,label) of images that a person labelled", job=False)
    label_mode: Literal["replace", "replace+repeat", "extra_ce"] = advanced(
        "replace+repeat",
        "known labels replace candidate sets; +repeat draws them in at least 5 % of P; extra_ce adds a supervised loss",
    )
    share: float = option(
        1.0,
        "train on a part of the training images, drawn by the seed, a smaller part within a larger one: a share, or, from "
        "2 on, a number of images; test images stay",
        (1e-9, 1e9),
    )
    dataset: str | None = advanced(
        None,
        "public data set that the images are, as recipes name it; --preset official of a baseline goes by it",
        job=False,
    )


@dataclass
class Steps:
    """optimiser: how the weights move."""

    epochs: int = option(100, "epochs in all, warm-up included", (1, 1_000_000))
    batch_size: int = option(
        256,
        "images of P (and as many of U) in a step, over all processes; warm-up takes twice as many; batch normalisation "
        "needs 2 at least",
        (2, 1_000_000),
    )
    lr: float = option(0.01, "learning rate at the start", (1e-30, 1e6))
    weight_decay: float = option(5e-4, "weight decay (AdamW's is decoupled from the gradient)", (0, 1e6))
    gradient_accumulation_steps: int = advanced(
        1, "steps whose gradients are averaged before the weights move", (1, 1_000_000)
    )


@dataclass
class Optimiser(Steps):
    """optimiser: how the weights move, and by which schedule."""

    optimizer: Literal["sgd", "adamw"] = option(
        "sgd", "the papers' SGD, or AdamW, which many pretrained backbones want (with an --lr near 0.001)"
    )
    lr_floor: float = advanced(1e-5, "learning rate at the horizon of the cosine schedule", (0, 1e6))
    lr_horizon: int = advanced(0, "epochs of the cosine schedule; 0 for --epochs", (0, 1_000_000))
    momentum: float = advanced(0.9, "SGD momentum", (0, 0.999999))
    compile: bool = advanced(False, "compile the networks with torch.compile, on a GPU as CUDA graphs")

    def cosine_lr(self, epoch: int) -> float:
        """Learning rate of an epoch by the cosine schedule."""
        return cosine_lr(epoch, self.lr, self.lr_floor, self.lr_horizon or self.epochs)


@dataclass
class JobConfig(Optimiser, Labels, Home, Job):
    """What every script that trains networks of our own is run with."""


@dataclass
class TagJob(Optimiser, Home, Job):
    """observed labels: what of several labels an image training is given."""

    observed: Literal["numbers", "shares", "published"] = option(
        "numbers",
        "how observed labels are drawn from the store's own: so many an image, each with a probability, or so many as the "
        "public code draws them",
    )
    positives: float = option(1.0, "present labels an image that are observed, -1 for all, or their share", (-1, 1e6))
    negatives: float = option(0.0, "absent labels an image that are observed, -1 for all, or their share", (-1, 1e6))
    tags: str | None = option(
        None,
        "CSV file of labels that a person gave, as annotate_vlm.py reads it; it takes the place of drawn ones",
        job=False,
    )
    validation: float = option(
        0.2,
        "share of the training images whose true labels are put aside to choose epoch and thresholds, where the store "
        "holds out no images with labels itself",
        (0, 0.9),
    )
    keep: Literal["best", "last"] = option(
        "best",
        "which epoch is reported: that of the largest mAP on validation labels, where there are some, as published; or the "
        "last",
    )
    labels_an_image: float | None = option(
        None,
        "labels that an image has on average, by which one threshold is chosen where no validation label does it; default: "
        "as many as the annotator suggests",
        (0, 1e6),
    )
    dataset: str | None = advanced(
        None, "public data set that the images are (voc, coco, nuswide or cub); --preset official goes by it", job=False
    )

    # options of scripts for one label an image
    candidates: ClassVar[str] = "union"
    labels: ClassVar[str | None] = None
    few_shot: ClassVar[int] = 0


def check_tracker(name: str) -> None:
    """Refuse a tracker of curves that accelerate would leave out without a word.

    Raises:
        UserError: there is none of this name, or its package is not installed.
    """
    if name in ("none", "all"):
        return
    if name not in TRACKERS:
        raise UserError(f"--report_to is {name}; write one of {', '.join(TRACKERS)}, all or none")
    packages = TRACKERS[name]
    if not any(importlib.util.find_spec(package) for package in packages):
        raise UserError(
            f"--report_to {name} needs the package {packages[0]}, which is not installed; type: pip install {packages[0]}, "
            f"or write --report_to none"
        )
