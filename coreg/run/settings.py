"""The settings of the scripts that train networks of our own: read in layers, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coreg.config import as_settings, parse
from coreg.errors import UserError
from coreg.learn.options import CoRegOptions
from coreg.network_options import ANNOTATOR, ImageConfig, check_image_options
from coreg.settings import JobConfig, TagJob
from coreg.store.preprocessing import annotators_pixels
from coreg.weak.prefilter import parse_prefilter
from coreg.weak.rules import parse_rule

if TYPE_CHECKING:
    from coreg.run.loop import Run


def read_student(
    argv: Sequence[str] | None,
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
        implied=pixels_of_weights,
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


def pixels_of_weights(
    typed: Mapping[str, Any], job: JobConfig | TagJob, image_options: ImageConfig, *_: Any
) -> dict[str, Any]:
    """Size and statistics of the pixels that come with a network that was typed, not with the recipe's.

    Those of its weights, where it has some and takes images of one size alone; a network that takes any size has no size.
    """
    name = image_options.backbone
    if "backbone" not in typed or not (image_options.pretrained or name.startswith("local-dir:")) or name == ANNOTATOR:
        return {}
    # here and not above: it takes seconds to import
    from coreg.nets.made_for import own_pixels
    from coreg.nets.model import check_backbone, parse_backbone_args

    check_backbone(name, image_options.backbone_args)
    return own_pixels(name, image_options.channels, parse_backbone_args(image_options.backbone_args))


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


def preset_fields(run: Run, values: Mapping[str, Mapping[str, Any]], name: str, method: Any) -> dict[str, Any]:
    """What the report says of `--preset` of the method called `name`; `official_notes` are printed."""
    if method.preset != "official":
        return {"preset": method.preset}
    if note := official_notes(values, name, run.job, method):
        run.accelerator.print(note)
    return {"preset": "official", "official_for": official(values, run.job.dataset)[0]}


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


def refuse_prefilter(job: JobConfig, script: str) -> None:
    """Refuse a pre-filter of candidate sets where none are trained on, by a UserError."""
    if job.prefilter != "none":
        raise UserError(f"{script} is trained on probabilities, and --prefilter is for candidate sets; leave it out")


def check_warm_up(warmup_epochs: int, epochs: int) -> None:
    """Refuse a warm-up that is longer than the training, by a UserError."""
    if warmup_epochs > epochs:
        raise UserError(f"--warmup_epochs is {warmup_epochs}, of {epochs} --epochs in all; give at most as many")
