"""The options of the scripts that tune a vision-language model on a few labelled images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from coreg.annotate.settings import GLYPH_CLIP
from coreg.config import advanced, option, parse
from coreg.data.digits import DIGIT_NAMES
from coreg.settings import Job, Steps
from coreg.store.manifest import read_manifest
from coreg.weak.rules import parse_rule


@dataclass
class TuningJob(Steps, Job):
    """model and labels: what is tuned, on which labels."""

    vlm: str | None = option(None, "model to tune, as in annotate_vlm.py; default: the one that made the store")
    shots: int = option(
        16,
        "true labels a class, drawn from the store's own; the same images as --few_shot of train_coreg.py",
        (1, 1_000_000),
    )
    labels: str | None = option(
        None, "CSV file (path,label) of images that a person labelled, instead of --shots", job=False
    )
    candidates: str = advanced("union", "candidate rule, of which the report tells how good the annotator is")
    epochs: int = option(
        0, "rounds over the labelled images; 0: as many as usual for the method and so many shots", (0, 1_000_000)
    )
    batch_size: int = option(32, "labelled images in a step, over all processes", (1, 1_000_000))
    lr: float = option(2e-3, "learning rate at its peak", (1e-30, 1e6))

    # hooks and adapters reach into the frozen model: it is not compiled, whatever the launcher's configuration says
    compile: ClassVar[bool] = False

    @property
    def few_shot(self) -> int:
        """Labels a class to draw; none where a person gave them."""
        return 0 if self.labels else self.shots


@dataclass
class ViewOptions:
    """views: what training sees of an image."""

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
    """What a job is about, known before images and models are opened."""

    spec: str  # spelling of the model to tune
    classes: int  # C
    digits: bool  # whether the images are the built-in digits

    @classmethod
    def of(cls, job: TuningJob) -> Outlook:
        """Read the store's manifest.

        Raises:
            UserError: there is no such store.
        """
        if not job.annotations:
            return cls(job.vlm or GLYPH_CLIP, len(DIGIT_NAMES), True)
        manifest = read_manifest(Path(job.annotations))
        spec = job.vlm or manifest["model"]["spec"]
        return cls(spec, len(manifest["class_names"]), manifest["images"]["spec"] == "builtin:digits")


def read_tuning(
    argv: Sequence[str] | None,
    script: str,
    description: str | None,
    method: type,
    preset: Callable[..., Mapping[str, Any]],
) -> tuple[Any, ...]:
    """Job, views and method of a script that tunes, checked, but for the method's.

    Raises:
        UserError: the first thing that is wrong.
    """
    settings = parse(TuningJob, ViewOptions, method, argv=argv, preset=preset, prog=script, description=description)
    parse_rule(settings[0].candidates)
    return settings
