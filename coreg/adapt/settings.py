"""What the scripts that tune a vision-language model on a few labelled images can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from coreg.annotate.settings import GLYPH_CLIP
from coreg.config import SAFE_CSV, SEEDS, option
from coreg.data.digits import DIGIT_NAMES
from coreg.store.manifest import read_manifest


@dataclass
class TuningJob:
    """Where things are and how long it runs.

    The fields that it shares with `coreg.settings.JobConfig` mean the same; those that say nothing about tuning are absent.
    """

    _argument_group_name = "job"

    annotations: str | None = option(
        None, "annotation store made by annotate_vlm.py; without it the built-in digits are used"
    )
    images: str | None = option(None, "where the images of the store are now; default: where they were annotated")
    data_root: str | None = option(None, "where torchvision data sets are now; default: where they were annotated")
    output_dir: str | None = option(
        None, "the run folder, runs/METHOD_SHOTS by default; the same command again goes on where it stopped"
    )
    vlm: str | None = option(None, "model to tune, as in annotate_vlm.py; default: the one that made the store")
    seed: int = option(0, "of everything random", SEEDS)
    shots: int = option(
        16,
        "true labels a class, drawn from the store's own; the same images as --few_shot of train_coreg.py",
        (1, 1_000_000),
    )
    labels: str | None = option(None, "CSV file (path,label) of images that a person labelled, instead of --shots")
    candidates: str = option("union", "candidate rule, of which the report tells how good the annotator is")
    epochs: int = option(
        0, "rounds over the labelled images; 0: as many as usual for the method and so many shots", (0, 1_000_000)
    )
    batch_size: int = option(32, "labelled images in a step, over all processes", (1, 1_000_000))
    lr: float = option(2e-3, "learning rate at its peak", (1e-30, 1e6))
    weight_decay: float = option(5e-4, "of the optimiser", (0, 1e6))
    gradient_accumulation_steps: int = option(
        1, "steps whose gradients are averaged before the weights move", (1, 1_000_000)
    )
    mixed_precision: Literal["no", "bf16"] = option("no", "autocast")
    checkpoint_minutes: float = option(
        10.0, "a checkpoint is written every epoch, and after so many minutes within one", (0, 1_000_000)
    )
    timeout_minutes: float = option(10.0, "a job ends when a process does not answer for so long", (0.001, 100_000))
    dtype: Literal["float32", "float64"] = option("float32", "of weights and arithmetic; float64 to compare runs exactly")
    workers: int = option(2, "threads that decode images", (0, 1024))
    print_config: bool = option(False, "print the resolved settings as a recipe and stop")
    report_to: str = option("tensorboard", "where curves go: tensorboard, another of accelerate's trackers, or none")
    safe_csv: bool = option(False, SAFE_CSV)

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

    crop: float = option(
        0.08, "smallest share of the image that a random crop keeps; 1: the whole image, as in annotation", (1e-6, 1)
    )
    flip: bool = option(True, "mirror every other view")
    views: int = option(
        0,
        "random views of an image whose features are computed once and used in turn; 0: a new view in every epoch",
        (0, 10_000),
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
