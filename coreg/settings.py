"""What `train_coreg.py` can be told besides the method's own hyper-parameters (`coreg.learn.options.CoRegOptions`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from coreg.config import option
from coreg.data.operations import RANDAUGMENT
from coreg.errors import UserError
from coreg.learn.options import CoRegOptions

if TYPE_CHECKING:
    from coreg.data.augment import Augmentation


@dataclass
class JobConfig:
    """Where things are and how long it runs."""

    _argument_group_name = "job"

    annotations: str | None = option(
        None, "annotation store made by annotate_vlm.py; without it the built-in digits are used"
    )
    output_dir: str | None = option(
        None,
        "the run folder (runs/demo, or runs/METHOD for a baseline); the same command again goes on where it stopped",
    )
    dataset: str | None = option(
        None, "public data set that the images are, as recipes name it; --preset official of a baseline goes by it"
    )
    seed: int = option(0, "of everything random")
    few_shot: int = option(0, "true labels a class to train with, drawn from the store's own labels")
    labels: str | None = option(None, "CSV file (path,label) of images that a person labelled")
    label_mode: Literal["replace", "replace+repeat", "extra_ce"] = option(
        "replace+repeat",
        "known labels replace candidate sets; +repeat draws them in at least 5 % of P; extra_ce adds a supervised loss",
    )
    candidates: str = option("union", "candidate rule: union, votes:V, topk:K, prob:P, ratio:R or cumulative:P")
    epochs: int = option(100, "epochs in all, warm-up included")
    batch_size: int = option(
        256, "images of P (and as many of U) in a step, over all processes; warm-up takes twice as many"
    )
    optimizer: Literal["sgd", "adamw"] = option(
        "sgd", "the papers' SGD, or AdamW, which many pretrained backbones want (with an --lr near 0.001)"
    )
    lr: float = option(0.01, "learning rate of the optimiser")
    lr_floor: float = option(1e-5, "learning rate at the horizon of the cosine schedule")
    lr_horizon: int = option(0, "epochs of the cosine schedule; 0 for --epochs")
    momentum: float = option(0.9, "of SGD")
    weight_decay: float = option(5e-4, "of the optimiser (AdamW's is decoupled from the gradient)")
    gradient_accumulation_steps: int = option(1, "steps whose gradients are averaged before the weights move")
    mixed_precision: Literal["no", "bf16"] = option("no", "autocast")
    compile: bool = option(False, "compile the networks with torch.compile")
    checkpoint_minutes: float = option(10.0, "a checkpoint is written every epoch, and after so many minutes within one")
    timeout_minutes: float = option(10.0, "a job ends when a process does not answer for so long")
    dtype: Literal["float32", "float64"] = option("float32", "of weights and arithmetic; float64 to compare runs exactly")
    workers: int = option(2, "processes that decode images")
    print_config: bool = option(False, "print the resolved settings as a recipe and stop")
    report_to: str = option("tensorboard", "where curves go: tensorboard, another of accelerate's trackers, or none")


@dataclass
class ImageConfig:
    """What the networks look like and what they see."""

    _argument_group_name = "images and backbone"

    backbone: str = option("preact_resnet18", "any timm model, preact_resnet18, or local-dir:FOLDER")
    backbone_args: str = option("{}", "further arguments of the backbone, as JSON")
    pretrained: bool = option(False, "start from timm's pretrained weights")
    image_size: int = option(32, "side in pixels to which images are resized")
    channels: int = option(3, "1 for grey images, 3 for RGB")
    mean: list[float] = option([0.5], "of the pixels in 0..1, one number or one a channel")
    std: list[float] = option([0.5], "of the pixels in 0..1, one number or one a channel")
    padding: int = option(4, "weak view: random crop with this zero padding")
    flip: bool = option(True, "weak view: random horizontal flip")
    strong_ops: list[str] = option(list(RANDAUGMENT), "strong view: operations to draw from")
    strong_count: int = option(1, "strong view: operations a view")
    cutout: float = option(0.5, "strong view: largest side of the cut out square, as a share of the image")
    cutout_fixed: int = option(0, "strong view: side in pixels of one square set to 0")

    def augmentation(self) -> Augmentation:
        """The views these settings describe; `check_look` has said what is wrong with them."""
        # here and not above: whatever can be said about settings is said before PyTorch is imported
        from coreg.data.augment import Augmentation

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
    refuse(
        [
            (job.epochs >= 1, f"--epochs is {job.epochs}; give at least 1"),
            (
                job.batch_size >= 2,
                f"--batch_size is {job.batch_size}; give at least 2, for batch normalisation cannot do with one image",
            ),
            (job.lr > 0, f"--lr is {job.lr}; give a number above 0"),
            (job.gradient_accumulation_steps >= 1, "--gradient_accumulation_steps has to be at least 1"),
            (job.checkpoint_minutes >= 0, "--checkpoint_minutes has to be 0 (every step) or more"),
            (job.timeout_minutes > 0, "--timeout_minutes has to be above 0"),
            (job.few_shot >= 0, f"--few_shot is {job.few_shot}; give 0 or more"),
            (not (job.few_shot and job.labels), "--few_shot and --labels exclude each other; give one of them"),
            (job.workers >= 0, f"--workers is {job.workers}; give 0 or more"),
        ]
    )


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
            (min(look.std) > 0, f"--std is {min(look.std)}; give numbers above 0"),
            (1 <= look.image_size <= 8192, f"--image_size is {look.image_size}; give a number of pixels up to 8192"),
            (look.padding >= 0, f"--padding is {look.padding}; give 0 or more pixels"),
            (look.strong_count >= 0, f"--strong_count is {look.strong_count}; give 0 or more"),
            (0 <= look.cutout <= 1, f"--cutout is {look.cutout}; give a share of the image, 0 to 1"),
            (look.cutout_fixed >= 0, f"--cutout_fixed is {look.cutout_fixed}; give 0 or more pixels"),
        ]
    )


def check_coreg(method: CoRegOptions, epochs: int) -> None:
    """Refuse hyper-parameters that Co-Reg cannot be trained with for `epochs` epochs.

    Raises:
        UserError: the first one found.
    """
    refuse(
        [
            (method.warmup_epochs >= 0, f"--warmup_epochs is {method.warmup_epochs}; give 0 or more"),
            (
                method.warmup_epochs <= epochs,
                f"--warmup_epochs is {method.warmup_epochs} of {epochs} --epochs in all; give at most as many",
            ),
            (0 < method.temperature <= 1, f"--temperature is {method.temperature}; give a number above 0 and up to 1"),
            (0 < method.threshold < 1, f"--threshold is {method.threshold}; give a number between 0 and 1"),
            (method.mixup_alpha >= 0, f"--mixup_alpha is {method.mixup_alpha}; give 0 (off) or more"),
            (method.history >= 1, f"--history is {method.history}; give at least 1"),
            (method.queue_size >= 1, f"--queue_size is {method.queue_size}; give at least 1"),
            (method.prototype_temperature > 0, "--prototype_temperature has to be above 0"),
            (method.contrast_temperature > 0, "--contrast_temperature has to be above 0"),
            (0 <= method.prototype_momentum < 1, "--prototype_momentum has to be at least 0 and below 1"),
            (0 <= method.key_momentum < 1, "--key_momentum has to be at least 0 and below 1"),
        ]
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
