"""What the scripts that tune a vision-language model on a few labelled images can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from coreg.annotate.manifest import read_manifest
from coreg.annotate.settings import GLYPH_CLIP
from coreg.config import option
from coreg.demo.digits import DIGIT_NAMES
from coreg.settings import refuse


@dataclass
class TuningJob:
    """Where things are and how long it runs.

    The fields that it shares with `coreg.settings.JobConfig` mean the same; those that say nothing about tuning are absent.
    """

    _argument_group_name = "job"

    annotations: str | None = option(
        None, "annotation store made by annotate_vlm.py; without it the built-in digits are used"
    )
    output_dir: str | None = option(
        None, "the run folder, runs/METHOD_SHOTS by default; the same command again goes on where it stopped"
    )
    vlm: str | None = option(None, "model to tune, as in annotate_vlm.py; default: the one that made the store")
    seed: int = option(0, "of everything random")
    shots: int = option(
        16, "true labels a class, drawn from the store's own; the same images as --few_shot of train_coreg.py"
    )
    labels: str | None = option(None, "CSV file (path,label) of images that a person labelled, instead of --shots")
    candidates: str = option("union", "candidate rule, of which the report tells how good the annotator is")
    epochs: int = option(0, "rounds over the labelled images; 0: as many as usual for the method and so many shots")
    batch_size: int = option(32, "labelled images in a step, over all processes")
    lr: float = option(2e-3, "learning rate at its peak")
    weight_decay: float = option(5e-4, "of the optimiser")
    gradient_accumulation_steps: int = option(1, "steps whose gradients are averaged before the weights move")
    mixed_precision: Literal["no", "bf16"] = option("no", "autocast")
    checkpoint_minutes: float = option(10.0, "a checkpoint is written every epoch, and after so many minutes within one")
    timeout_minutes: float = option(10.0, "a job ends when a process does not answer for so long")
    dtype: Literal["float32", "float64"] = option("float32", "of weights and arithmetic; float64 to compare runs exactly")
    workers: int = option(2, "threads that decode images")
    print_config: bool = option(False, "print the resolved settings as a recipe and stop")
    report_to: str = option("tensorboard", "where curves go: tensorboard, another of accelerate's trackers, or none")

    # hooks and adapters reach into the frozen model: it is not compiled, whatever the launcher's configuration says
    compile: ClassVar[bool] = False

    @property
    def few_shot(self) -> int:
        """Labels a class to draw; none where a person gave them."""
        return 0 if self.labels else self.shots


@dataclass
class ViewOptions:
    """What training sees of an image."""

    _argument_group_name = "views"

    crop: float = option(0.08, "smallest share of the image that a random crop keeps; 1: the whole image, as in annotation")
    flip: bool = option(True, "mirror every other view")
    views: int = option(
        0, "random views of an image whose features are computed once and used in turn; 0: a new view in every epoch"
    )


@dataclass
class Outlook:
    """What a job is about, found out before anything is opened.

    spec: spelling of the model to tune. classes: C. digits: whether the images are the built-in digits.
    """

    spec: str
    classes: int
    digits: bool

    @classmethod
    def of(cls, job: TuningJob) -> Outlook:
        """Look into the store's manifest.

        Raises:
            UserError: there is no such store.
        """
        if not job.annotations:
            return cls(job.vlm or GLYPH_CLIP, len(DIGIT_NAMES), True)
        told = read_manifest(Path(job.annotations))
        spec = job.vlm or told["model"]["spec"]
        return cls(spec, len(told["class_names"]), told["images"]["spec"] == "builtin:digits")


def check(job: TuningJob, view: ViewOptions) -> None:
    """Refuse settings that nothing can be tuned with.

    Raises:
        UserError: the first one found.
    """
    refuse(
        [
            (job.shots >= 1, f"--shots is {job.shots}; give 1 or more (1 to 16 are usual)"),
            (job.epochs >= 0, f"--epochs is {job.epochs}; give at least 1, or 0 for the preset's"),
            (job.batch_size >= 1, f"--batch_size is {job.batch_size}; give at least 1"),
            (job.lr > 0, f"--lr is {job.lr}; give a number above 0"),
            (job.gradient_accumulation_steps >= 1, "--gradient_accumulation_steps has to be at least 1"),
            (job.checkpoint_minutes >= 0, "--checkpoint_minutes has to be 0 (every step) or more"),
            (job.timeout_minutes > 0, "--timeout_minutes has to be above 0"),
            (job.workers >= 0, f"--workers is {job.workers}; give 0 or more"),
            (0 < view.crop <= 1, f"--crop is {view.crop}; give a share above 0 and up to 1"),
            (view.views >= 0, f"--views is {view.views}; give 0 or more"),
        ]
    )
