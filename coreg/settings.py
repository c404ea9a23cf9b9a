"""The option groups that scripts combine, besides a method's own, and what is wrong with settings.

Scripts that train networks of our own take `JobConfig` and `ImageConfig`, which are all of them; the others derive from the
groups they need.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from coreg.config import SAFE_CSV, SEEDS, advanced, as_settings, option, parse
from coreg.errors import UserError
from coreg.learn.options import CoRegOptions
from coreg.store.preprocessing import annotators_pixels
from coreg.views.operations import RANDAUGMENT
from coreg.weak.prefilter import SPELLINGS, parse_prefilter
from coreg.weak.rules import parse_rule

if TYPE_CHECKING:
    from coreg.nets.tuning import Tuning
    from coreg.views.augment import Augmentation

# accelerate's trackers and the packages of which each needs one
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX")} | {
    name: (name,) for name in ("wandb", "trackio", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab")
}

ANNOTATOR = "annotator"  # the backbone that is the image tower of what made the store


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
    compile: bool = advanced(False, "compile the networks with torch.compile")


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
        0.2, "share of the training images whose true labels are put aside: they choose thresholds, no epoch", (0, 0.9)
    )
    dataset: str | None = advanced(
        None, "public data set that the images are (voc, coco, nuswide or cub); --preset official goes by it", job=False
    )

    # options of scripts for one label an image
    candidates: ClassVar[str] = "union"
    labels: ClassVar[str | None] = None
    few_shot: ClassVar[int] = 0


@dataclass
class Network:
    """backbone: what the networks are."""

    backbone: str = option(
        "preact_resnet18", "any timm model, preact_resnet18, local-dir:FOLDER, or annotator: what the store was made with"
    )
    pretrained: bool = option(False, "start from timm's pretrained weights")
    backbone_args: str = advanced("{}", "further arguments of the backbone, as JSON")


@dataclass
class TuningOptions:
    """tuning: what of a pretrained backbone is trained."""

    tuner: list[str] | None = option(
        None,
        "freeze the backbone but for its head, and train what these change: full, linear, bias, ln, bn, mask, vpt_shallow, "
        "vpt_deep, ssf_attn, ssf_mlp, ssf_ln, lora, lora_mlp, adapter, adaptformer (default: the whole network is trained)",
    )
    blocks: str = advanced(
        "all", "transformer blocks that tuners change: all, last:N, or the first and the last, such as 2-9"
    )
    bottleneck: int = advanced(0, "width of adapters, rank of LoRA; 0: by the number of classes and blocks", (0, 65_536))
    prompt_tokens: int = advanced(10, "prompt tokens of vpt_shallow and of each block of vpt_deep", (1, 65_536))
    mask_ratio: float = advanced(
        0.0, "share of weights that mask trains; 0: by the number of classes and the size of the network", (0, 1)
    )
    head: Literal["linear", "cosine", "l2", "layernorm", "projected"] = advanced(
        "linear",
        "how logits come from features: timm's own classifier; by the directions of the class weights; or projected, as "
        "the annotator compares images with texts",
    )
    head_scale: float = advanced(
        0.0, "factor of the cosine; 0: 25, and the annotator's own where --head is projected", (0, 1e6)
    )
    head_init: Literal["random", "text", "class_mean"] = advanced(
        "random",
        "where the head starts: random; text, of --backbone annotator; class_mean, mean features by candidate sets",
    )
    head_prompts: Literal["default", "classname", "ensemble", "descriptions", "annotator"] = advanced(
        "default",
        'texts of --head_init text: "a photo of a {}.", the class name alone, the papers\' 27 templates, the descriptions '
        "that the images were annotated with, or all that they were annotated with",
    )
    descriptions: str | None = advanced(
        None, "JSON file, class name to a list of texts, which --head_init text takes instead of prompts", job=False
    )


@dataclass
class Pixels:
    """images: what a network gets of an image."""

    image_size: int = option(32, "side in pixels to which images are resized", (1, 8192))
    channels: int = advanced(3, "1 for grey images, 3 for RGB", (1, 3))
    resize: Literal["squash", "crop"] = advanced(
        "squash", "how an image becomes a square: squashed, or its short side resized and the middle taken"
    )
    mean: list[float] = advanced([0.5], "mean of the pixels in 0..1, one number or one a channel", (0, 1))
    std: list[float] = advanced([0.5], "standard deviation of the pixels in 0..1, one number or one a channel", (0.001, 10))


@dataclass
class Views:
    """views: how images are changed at random."""

    flip: bool = option(True, "weak view: random horizontal flip")
    padding: int = advanced(4, "weak view: random crop with this zero padding", (0, 8192))
    strong_ops: list[str] = advanced(list(RANDAUGMENT), "strong view: operations to draw from")
    strong_count: int = advanced(1, "strong view: operations a view", (0, 100))
    cutout: float = advanced(0.5, "strong view: largest side of the cut out square, as a share of the image", (0, 1))
    cutout_fixed: int = advanced(0, "strong view: side in pixels of one square set to 0", (0, 8192))


@dataclass
class ImageConfig(Views, Pixels, TuningOptions, Network):
    """What the networks are, what of them is trained, and what they see."""

    def tuning(self) -> Tuning:
        """What is tuned, and the head."""
        from coreg.nets.tuning import Tuning

        names = ("blocks", "bottleneck", "prompt_tokens", "mask_ratio", "head", "head_scale")
        return Tuning(tuple(self.tuner or ()), **{name: getattr(self, name) for name in names})

    def augmentation(self) -> Augmentation:
        """The views these settings describe; `check_image_options` has refused impossible ones."""
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


def check_labels(job: JobConfig) -> None:
    """Refuse settings that no method can be trained with.

    Raises:
        UserError: the first thing that is wrong.
    """
    if job.share > 1 and job.share != int(job.share):
        raise UserError(
            f"--share is {job.share:g}; give a share up to 1, such as 0.2, or a whole number of images from 2 on"
        )
    parse_prefilter(job.prefilter)
    if job.few_shot and job.labels:
        raise UserError("--few_shot and --labels exclude each other; give one of them")


def check_image_options(image_options: ImageConfig) -> None:
    """Refuse images that cannot be made or seen like that.

    Raises:
        UserError: the first thing that is wrong.
    """
    unknown = [name for name in image_options.strong_ops if name not in RANDAUGMENT]
    if unknown:
        raise UserError(f"unknown --strong_ops {' '.join(unknown)} (there are: {', '.join(RANDAUGMENT)})")
    if image_options.head_init == "text" and image_options.backbone != ANNOTATOR:
        raise UserError(f"--head_init text needs --backbone annotator, whose text side it is, not {image_options.backbone}")
    if image_options.head == "projected" and image_options.head_init != "text":
        raise UserError(
            f"--head projected compares images with texts and needs --head_init text, not {image_options.head_init}"
        )
    check_pixels(image_options)


def check_pixels(pixels: Pixels) -> None:
    """Refuse other than grey or RGB images, and numbers that are neither one nor one a channel.

    Raises:
        UserError: the first thing that is wrong.
    """
    if pixels.channels not in (1, 3):
        raise UserError(f"--channels is {pixels.channels}; write 1 for grey or 3 for RGB images")
    for name in ("mean", "std"):
        values = getattr(pixels, name)
        if values is not None and len(values) not in (1, pixels.channels):
            raise UserError(f"--{name} has {len(values)} numbers for {pixels.channels} channels; give one or one each")


def refuse_prefilter(job: JobConfig, script: str) -> None:
    """Refuse a pre-filter of candidate sets where none are trained on, by a UserError."""
    if job.prefilter != "none":
        raise UserError(f"{script} is trained on probabilities, and --prefilter is for candidate sets; leave it out")


def check_warm_up(warmup_epochs: int, epochs: int) -> None:
    """Refuse a warm-up that is longer than the training, by a UserError."""
    if warmup_epochs > epochs:
        raise UserError(f"--warmup_epochs is {warmup_epochs}, of {epochs} --epochs in all; give at most as many")


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


def read_student(
    argv: Sequence[str],
    script: str,
    description: str | None,
    *groups: type,
    preset: Callable[..., Mapping[str, Any]] | None = None,
    kinds: tuple[str, Mapping[str, type]] | None = None,
) -> tuple[Any, ...]:
    """Job, images and method of a script that trains a network of its own, checked, but for the method's.

    Without `--recipe` it is that of the annotator's tower where that is the backbone, that of one's own images, or that of
    the digits where there is no `--annotations`.

    Args:
        groups: the method's options. preset, kinds: see `coreg.config.parse`.

    Raises:
        UserError: the first thing that is wrong.
    """

    def usual(typed: Mapping[str, Any]) -> str:
        return ANNOTATOR if typed.get("backbone") == ANNOTATOR else "folder" if "annotations" in typed else "digits"

    def below(*configs: Any) -> Mapping[str, Any]:
        job, images = configs[:2]
        own = annotators_pixels(job.prefilter_annotations or job.annotations) if images.backbone == ANNOTATOR else {}
        return own | dict(preset(*configs) if preset else {})

    job, image_options, method = parse(
        JobConfig,
        ImageConfig,
        *groups,
        argv=argv,
        default_recipe=usual,
        preset=below,
        kinds=kinds,
        others=(CoRegOptions,),
        prog=script,
        description=description,
    )
    check_labels(job)
    check_image_options(image_options)
    parse_rule(job.candidates)
    if job.prefilter_annotations and job.prefilter == "none" and image_options.backbone != ANNOTATOR:
        raise UserError(
            "--prefilter_annotations is for --prefilter, which is none, and --backbone annotator; write one of them, such "
            "as --prefilter topk"
        )
    return job, image_options, method


def official(
    values: Mapping[str, Mapping[str, Any]], dataset: str | None, preset: str = "official"
) -> tuple[str, Mapping[str, Any]]:
    """Which data set's values of a method's authors are taken, and the values; none where another preset is asked for.

    Args:
        values: by data set; the first are taken where there are none for `dataset`.
    """
    chosen = dataset if dataset in values else next(iter(values))
    return chosen, values[chosen] if preset == "official" else {}


def official_notes(values: Mapping[str, Mapping[str, Any]], name: str, job: JobConfig, method: Any) -> str:
    """What to say of `--preset official` of the method called `name`: for which data set it is, and what it is not.

    Empty where the authors give values for this data set, and neither recipe nor command line any other.
    """
    chosen, taken = official(values, job.dataset)
    notes, settings = [], as_settings(job, method)
    if chosen != job.dataset:
        notes.append(
            f"note: there are no official values of {name} for {job.dataset or 'this recipe'}; those for {chosen} are "
            f"taken (--dataset names another; there are: {', '.join(values)})"
        )
    others = [f"{key} {settings[key]}" for key, value in taken.items() if settings[key] != value]
    if others:
        notes.append(f"note: --preset official but for {', '.join(others)}, from recipe or command line")
    return "\n".join(notes)
