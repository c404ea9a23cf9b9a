"""What `train_coreg.py` can be told besides the method's own hyper-parameters (`coreg.learn.options.CoRegOptions`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from coreg.config import SAFE_CSV, SEEDS, option
from coreg.errors import UserError
from coreg.learn.options import CoRegOptions
from coreg.views.operations import RANDAUGMENT

if TYPE_CHECKING:
    from coreg.views.augment import Augmentation

# accelerate's trackers and the packages of which each needs one
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX")} | {
    name: (name,) for name in ("wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
}


@dataclass
class JobConfig:
    """Where things are and how long it runs."""

    _argument_group_name = "job"

    annotations: str | None = option(
        None, "annotation store made by annotate_vlm.py; without it the built-in digits are used"
    )
    images: str | None = option(None, "where the images of the store are now; default: where they were annotated")
    data_root: str | None = option(None, "where torchvision data sets are now; default: where they were annotated")
    output_dir: str | None = option(
        None,
        "the run folder (runs/demo, or runs/METHOD for a baseline); the same command again goes on where it stopped",
    )
    dataset: str | None = option(
        None, "public data set that the images are, as recipes name it; --preset official of a baseline goes by it"
    )
    seed: int = option(0, "of everything random", SEEDS)
    share: float = option(
        1.0,
        "train on a part of the training images, drawn by the seed, a smaller part within a larger one: a share, or, from "
        "2 on, a number of images; test images stay",
        (1e-9, 1e9),
    )
    few_shot: int = option(0, "true labels a class to train with, drawn from the store's own labels", (0, 1_000_000))
    labels: str | None = option(None, "CSV file (path,label) of images that a person labelled")
    label_mode: Literal["replace", "replace+repeat", "extra_ce"] = option(
        "replace+repeat",
        "known labels replace candidate sets; +repeat draws them in at least 5 % of P; extra_ce adds a supervised loss",
    )
    refine: Literal["none", "own", "view"] = option(
        "none",
        "mend the annotator's evidence before training, by its own features or by a view, those of the backbone's "
        "starting weights; the refined store lies in the run folder",
    )
    candidates: str = option("union", "candidate rule: union, votes:V, topk:K, prob:P, ratio:R or cumulative:P")
    epochs: int = option(100, "epochs in all, warm-up included", (1, 1_000_000))
    batch_size: int = option(
        256,
        "images of P (and as many of U) in a step, over all processes; warm-up takes twice as many; batch normalisation "
        "needs 2 at least",
        (2, 1_000_000),
    )
    optimizer: Literal["sgd", "adamw"] = option(
        "sgd", "the papers' SGD, or AdamW, which many pretrained backbones want (with an --lr near 0.001)"
    )
    lr: float = option(0.01, "learning rate of the optimiser", (1e-30, 1e6))
    lr_floor: float = option(1e-5, "learning rate at the horizon of the cosine schedule", (0, 1e6))
    lr_horizon: int = option(0, "epochs of the cosine schedule; 0 for --epochs", (0, 1_000_000))
    momentum: float = option(0.9, "of SGD", (0, 0.999999))
    weight_decay: float = option(5e-4, "of the optimiser (AdamW's is decoupled from the gradient)", (0, 1e6))
    gradient_accumulation_steps: int = option(
        1, "steps whose gradients are averaged before the weights move", (1, 1_000_000)
    )
    mixed_precision: Literal["no", "bf16"] = option("no", "autocast")
    compile: bool = option(False, "compile the networks with torch.compile")
    checkpoint_minutes: float = option(
        10.0, "a checkpoint is written every epoch, and after so many minutes within one", (0, 1_000_000)
    )
    timeout_minutes: float = option(10.0, "a job ends when a process does not answer for so long", (0.001, 100_000))
    dtype: Literal["float32", "float64"] = option("float32", "of weights and arithmetic; float64 to compare runs exactly")
    workers: int = option(2, "processes that decode images", (0, 1024))
    print_config: bool = option(False, "print the resolved settings as a recipe and stop")
    report_to: str = option("tensorboard", "where curves go: tensorboard, another of accelerate's trackers, or none")
    safe_csv: bool = option(False, SAFE_CSV)


@dataclass
class ImageConfig:
    """What the networks look like and what they see."""

    _argument_group_name = "images and backbone"

    backbone: str = option("preact_resnet18", "any timm model, preact_resnet18, or local-dir:FOLDER")
    backbone_args: str = option("{}", "further arguments of the backbone, as JSON")
    pretrained: bool = option(False, "start from timm's pretrained weights")
    image_size: int = option(32, "side in pixels to which images are resized", (1, 8192))
    channels: int = option(3, "1 for grey images, 3 for RGB", (1, 3))
    mean: list[float] = option([0.5], "of the pixels in 0..1, one number or one a channel", (0, 1))
    std: list[float] = option([0.5], "of the pixels in 0..1, one number or one a channel", (0.001, 10))
    padding: int = option(4, "weak view: random crop with this zero padding", (0, 8192))
    flip: bool = option(True, "weak view: random horizontal flip")
    strong_ops: list[str] = option(list(RANDAUGMENT), "strong view: operations to draw from")
    strong_count: int = option(1, "strong view: operations a view", (0, 100))
    cutout: float = option(0.5, "strong view: largest side of the cut out square, as a share of the image", (0, 1))
    cutout_fixed: int = option(0, "strong view: side in pixels of one square set to 0", (0, 8192))

    def augmentation(self) -> Augmentation:
        """The views these settings describe; `check_look` has said what is wrong with them."""
        # here and not above: whatever can be said about settings is said before PyTorch is imported
        from coreg.views.augment import Augmentation

        return Augmentation(
            size=self.image_size,
            padding=self.padding,
            flip=self.flip,
            strong_ops=tuple(self.strong_ops),
            strong_count=self.strong_count,
            cutout=self.cutout,
            cutout_fixed=self.cutout_fixed,
            mean=tuple(self.mean * (self.channels if len(self.mean) == 1 else 1)),
            std=tuple(self.std * (self.channels if len(self.std) == 1 else 1)),
        )


def check(job: JobConfig) -> None:
    """Refuse settings that no method can be trained with.

    Raises:
        UserError: the first one found.
    """
    if job.share > 1 and job.share != int(job.share):
        raise UserError(
            f"--share is {job.share:g}; give a share up to 1, such as 0.2, or a whole number of images from 2 on"
        )
    if job.few_shot and job.labels:
        raise UserError("--few_shot and --labels exclude each other; give one of them")


def check_look(look: ImageConfig) -> None:
    """Refuse images that cannot be made or seen like that.

    Raises:
        UserError: the first thing that is wrong.
    """
    unknown = [name for name in look.strong_ops if name not in RANDAUGMENT]
    lengths = {name: len(getattr(look, name)) for name in ("mean", "std")}
    refuse(
        [
            (not unknown, f"unknown --strong_ops {' '.join(unknown)} (there are: {', '.join(RANDAUGMENT)})"),
            (look.channels in (1, 3), f"--channels is {look.channels}; write 1 for grey or 3 for RGB images"),
            *(
                (
                    count in (1, look.channels),
                    f"--{name} has {count} numbers for {look.channels} channels; give one or one each",
                )
                for name, count in lengths.items()
            ),
        ]
    )


def check_coreg(method: CoRegOptions, epochs: int) -> None:
    """Refuse hyper-parameters that Co-Reg cannot be trained with for `epochs` epochs.

    Raises:
        UserError: the first one found.
    """
    if method.warmup_epochs > epochs:
        raise UserError(f"--warmup_epochs is {method.warmup_epochs} of {epochs} --epochs in all; give at most as many")


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


def refuse(rules: list[tuple[bool, str]]) -> None:
    """Raise a UserError with the message of the first rule that does not hold."""
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def official(values: Mapping[str, Mapping[str, Any]], dataset: str | None) -> tuple[str, list[str]]:
    """Which data set's values of a method's authors are taken, and the values as arguments for `parse`.

    Args:
        values: by data set; the first are taken where there are none for `dataset`.
    """
    chosen = dataset if dataset in values else next(iter(values))
    return chosen, [f"--{name}={value}" for name, value in values[chosen].items()]


def lacks_official(values: Mapping[str, Mapping[str, Any]], dataset: str | None, name: str) -> str | None:
    """What to say where the authors of the method called `name` give no values for the data set."""
    chosen, _ = official(values, dataset)
    if chosen == dataset:
        return None
    given = ", ".join(values)
    return (
        f"note: there are no official values of {name} for {dataset or 'this recipe'}; those for {chosen} are taken "
        f"(--dataset names another; there are: {given})"
    )
