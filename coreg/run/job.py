"""What every training script does before its training: settings, store and run folder checked, evidence refined."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator

from coreg.annotate.changes import before_and_after
from coreg.annotate.refined import refine_store
from coreg.annotate.settings import RefineConfig, ViewConfig
from coreg.annotate.tower import write_tower
from coreg.config import as_settings, as_yaml, beside_the_job
from coreg.errors import NothingToDo, UserError
from coreg.files import sha256_of
from coreg.nets.made_for import trained_with
from coreg.nets.model import check_backbone, check_network, check_weights, parse_backbone_args
from coreg.nets.tuners.apply import check_tuners
from coreg.nets.tuners.audit import audit
from coreg.network_options import ANNOTATOR, ImageConfig
from coreg.plaintext import printable, without_credentials
from coreg.process import all_or_none, build_accelerator, follow_launcher, main_process_decides
from coreg.report.record import TRAINED, finished_report
from coreg.report.report import summary
from coreg.report.trust import cannot_tell, reads_alone
from coreg.run.board import silent_thread, writing_curves
from coreg.run.folder import RunFolder
from coreg.run.loop import Run
from coreg.run.task import known_labels, training_rows
from coreg.run.training import build_model
from coreg.settings import JobConfig, check_tracker
from coreg.store.store import AnnotationStore


@contextlib.contextmanager
def open_run(
    script: str,
    argv: Sequence[str] | None,
    settings: tuple[Any, ...],
    annotate_default: Callable[[Path, Accelerator], AnnotationStore],
    default_folder: str,
) -> Iterator[Run]:
    """Check a script's settings, open the store, take the run folder.

    Args:
        script: the command, for the report. argv: its arguments, by default `sys.argv[1:]`.
        settings: dataclasses, first `JobConfig` or one with those of its fields that are asked for here; `ImageConfig`
            where networks of our own are trained.
        annotate_default: makes the store, in the folder it is given, where `--annotations` names none.
        default_folder: the run folder where `--output_dir` names none.

    Raises:
        UserError: settings that cannot work, a store that cannot be opened, or a folder that belongs to another job.
        NothingToDo: the settings were asked for and are printed, or the run is already finished.
    """
    started, job = time.perf_counter(), settings[0]
    command = shlex.join([script, *map(without_credentials, sys.argv[1:] if argv is None else argv)])
    follow_launcher(job)
    if job.print_config:
        print(as_yaml(as_settings(*settings)), end="")
        raise NothingToDo
    job.output_dir = job.output_dir or default_folder
    image_options = next((group for group in settings if isinstance(group, ImageConfig)), None)
    check_settings(job, image_options)
    folder, all_settings = RunFolder(job.output_dir), as_settings(*settings)
    identity = {"script": script} | {k: v for k, v in all_settings.items() if k not in beside_the_job(*settings)}
    accelerator = build_accelerator(job.mixed_precision, job.report_to, job.output_dir, job.timeout_minutes)
    with leaving_together(accelerator), contextlib.ExitStack() as held:

        def hold() -> None:
            if not folder.held:
                held.enter_context(folder.locked())

        main_process_decides(accelerator, lambda: folder.refuse_other(identity))
        if job.annotations:
            store = all_or_none(accelerator, lambda: AnnotationStore.open(job.annotations).at(job.images, job.data_root))
        else:
            main_process_decides(accelerator, hold)
            store = annotate_default(folder.root / "annotations", accelerator)
        known = all_or_none(accelerator, lambda: known_labels(job, store))
        identity |= {"store": store.hash, "known_labels": hashlib.sha256(known.tobytes()).hexdigest()}
        identity |= all_or_none(accelerator, lambda: persons_files(job, image_options))
        judged = all_or_none(accelerator, lambda: annotators_store(job, store))
        identity |= {} if judged is store else {"prefilter_store": judged.hash}
        main_process_decides(accelerator, lambda: folder.refuse_other(identity))
        if main_process_decides(accelerator, lambda: folder.finished):
            report = main_process_decides(accelerator, lambda: finished_report(folder.report, TRAINED))
            accelerator.print(summary(report, folder.root))
            place = printable(folder.root)
            accelerator.print(f"\nThis run is finished; choose another --output_dir, or delete {place} to repeat it.")
            raise NothingToDo
        if image_options is not None:
            if image_options.backbone == ANNOTATOR:
                main_process_decides(accelerator, hold)
                image_options = annotators_tower(accelerator, folder, judged, image_options)
            check_fit(accelerator, image_options, len(store.class_names))
        annotated = store
        if (features := refinement(job, image_options, store)) != "none":
            main_process_decides(accelerator, lambda: refuse_refining(store, features))
            main_process_decides(accelerator, hold)
            store = refined(store, folder.root / "refined", features, job, image_options, accelerator)
        likely = store if judged is annotated else judged
        yield Run(
            accelerator,
            folder,
            store,
            annotated,
            known,
            job,
            image_options,
            identity,
            all_settings,
            command,
            started,
            held,
            likely if filters(job) else None,
        )


def persons_files(job: JobConfig, image_options: ImageConfig | None) -> dict[str, str]:
    """What the content of a person's files, wherever they lie, adds to what makes a job.

    Raises:
        UserError: one cannot be read.
    """
    hashes = {}
    for name, what, wanted, options in (
        ("tags", "labels", "a CSV file with path,labels", job),
        ("descriptions", "descriptions", "a JSON file of class names with lists of texts", image_options),
    ):
        path = getattr(options, name, None)
        try:
            hashes |= {name: sha256_of(Path(path))} if path else {}
        except OSError as error:
            raise UserError(f"cannot read the {what} in {path}: {error.strerror}; give {wanted}") from None
    return hashes


def filters(job: JobConfig) -> bool:
    """Whether candidates are dropped before training; methods that tune the annotator itself have no such option."""
    return getattr(job, "prefilter", "none") != "none"


def annotators_store(job: JobConfig, store: AnnotationStore) -> AnnotationStore:
    """The store of the annotator by which `--prefilter` and `--backbone annotator` go.

    It is the one that is trained on, where no other is named.

    Raises:
        UserError: it cannot be opened, is of other images or classes, or nobody annotated it and `--prefilter` needs it.
    """
    other = getattr(job, "prefilter_annotations", None)
    judged = AnnotationStore.open(other) if other else store
    judged.need_same(store.manifest["images"]["sha256"], store.class_names, "--prefilter_annotations")
    if filters(job):
        judged.need_annotator("name the store of an annotator with --prefilter_annotations")
    return judged


def check_settings(job: JobConfig, image_options: ImageConfig | None) -> None:
    """Refuse what no script can work with, before anything is opened.

    Raises:
        UserError: the first thing that is wrong.
    """
    check_tracker(job.report_to)
    if not job.annotations and (job.images or job.data_root):
        raise UserError("--images and --data_root say where the images of --annotations are now; give that too")
    if image_options is not None:
        check_tuners(image_options.tuner or ())
        if image_options.backbone != ANNOTATOR:
            check_backbone(image_options.backbone, image_options.backbone_args)


def annotators_tower(
    accelerator: Accelerator, folder: RunFolder, store: AnnotationStore, image_options: ImageConfig
) -> ImageConfig:
    """Options with the image tower of the store's annotator for a backbone; it lies in the run folder from now on.

    Raises:
        UserError: it cannot be had.
    """
    texts = image_options.head_prompts if image_options.head_init == "text" else None

    def write() -> None:
        # one that a start left before it claimed the folder may be with other texts
        if not (folder.claimed and folder.tower.is_dir()):
            write_tower(store, folder.tower, texts, image_options.descriptions)

    main_process_decides(accelerator, write)
    return dataclasses.replace(image_options, backbone=f"local-dir:{folder.tower}")


def check_fit(accelerator: Accelerator, image_options: ImageConfig, n_classes: int) -> None:
    """Refuse a network that these images do not fit, and print a note where its weights want other pixels.

    Raises:
        UserError: it cannot be had, or cannot be trained on such images.
    """
    if image_options.pretrained:
        all_or_none(accelerator, lambda: check_weights(image_options.backbone))
    size, arguments = image_options.image_size, parse_backbone_args(image_options.backbone_args)
    main_process_decides(
        accelerator, lambda: check_network(image_options.backbone, n_classes, size, image_options.channels, arguments)
    )
    if image_options.tuner or image_options.head != "linear":
        main_process_decides(accelerator, lambda: check_tuning(image_options, n_classes))
    if advice := other_pixels(image_options):
        accelerator.print(printable(advice))


def check_tuning(image_options: ImageConfig, n_classes: int) -> None:
    """Make such a network once, and prove that what should train does, and nothing else.

    Raises:
        UserError: head or tuners do not fit the backbone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = build_model(image_options, n_classes, projection_dim=1, pretrained=False)
        size = image_options.image_size
        audit(net, torch.randn(2, image_options.channels, size, size))


def refinement(job: JobConfig, image_options: ImageConfig | None, store: AnnotationStore) -> Literal["none", "own", "view"]:
    """By which features evidence is refined before training; methods that tune the annotator itself have no such option.

    `--refine auto` is a view where there are pretrained weights to see with and evidence that an annotator gave.
    """
    asked = getattr(job, "refine", "none")
    if asked != "auto":
        return asked
    given = "refined" in store.manifest or store.manifest["model"]["spec"].startswith("synthetic:")
    return "none" if given or not (image_options.pretrained or image_options.backbone.startswith("local-dir:")) else "view"


def refuse_refining(store: AnnotationStore, features: str) -> None:
    """Raise a UserError where a store cannot be refined by `features`, `own` or `view`."""
    if "refined" in store.manifest:
        raise UserError(f"{store.root} is refined already; write --refine none")
    if features == "own" and store.manifest["features"] is None:
        raise UserError(f"{store.root} keeps no features of its annotator; write --refine none, or view for the students'")


def refined(
    store: AnnotationStore,
    folder: Path,
    features: Literal["own", "view"],
    job: JobConfig,
    image_options: ImageConfig,
    accelerator: Accelerator,
) -> AnnotationStore:
    """The store that `--refine` makes of another one, by the features of the networks that are trained.

    With `--refine auto` it is the store itself where these features do not mend it.

    Raises:
        UserError: the features cannot tell the classes apart.
    """
    names = ("backbone", "backbone_args", "pretrained", "image_size", "channels", "resize", "mean", "std")
    view = ViewConfig(**{name: getattr(image_options, name) for name in names}, workers=job.workers)
    whose = "its own features" if features == "own" else image_options.backbone
    accelerator.print(printable(f"Refining {store.root} by {whose}."))
    part = training_rows(job, store) if job.share != 1 else None
    mended = refine_store(store, folder, RefineConfig(str(folder), features), view, accelerator, part)
    fit = mended.manifest["refined"].get("fit")
    if job.refine == "auto" and not (fit and fit["mends"]):
        alone = f" ({reads_alone(fit)})" if fit else ""
        accelerator.print(printable(f"The evidence is left as it is: {whose} is not good enough to mend it{alone}."))
        return store
    if fit and fit["hopeless"]:
        raise UserError(
            f"--refine {job.refine}: {cannot_tell(whose, fit)}; write --refine none to train on the annotator's own "
            f"evidence, or name another --backbone",
            silent=not accelerator.is_main_process,
        )
    accelerator.print("\n".join(before_and_after(mended.manifest)))
    return mended


def other_pixels(image_options: ImageConfig) -> str | None:
    """What to say where weights would see other pixels than those they were trained with."""
    has_weights = image_options.pretrained or image_options.backbone.startswith("local-dir:")
    pixels = trained_with(image_options.backbone) if has_weights else None
    if pixels is None or len(pixels[0]) != image_options.channels:
        return None
    if all(np.allclose(wanted, given, atol=5e-3) for wanted, given in zip(pixels, (image_options.mean, image_options.std))):
        return None
    wanted = [" ".join(f"{number:g}" for number in numbers) for numbers in pixels]
    return f"note: {image_options.backbone} was trained with other pixels; it wants --mean {wanted[0]} --std {wanted[1]}"


@contextlib.contextmanager
def leaving_together(accelerator: Accelerator) -> Iterator[None]:
    """Close trackers and take the process group down at the end, and where all processes stop for the same reason.

    The threads of a group that is left standing may abort the interpreter on its way out, and the launcher would then
    report that instead of the exit code.
    """
    with silent_thread():
        try:
            yield
        except (SystemExit, UserError):
            with contextlib.suppress(UserError):  # it has been raised before, or something worse has happened
                _end(accelerator)
            raise
        _end(accelerator)


def _end(accelerator: Accelerator) -> None:
    try:
        with writing_curves():
            accelerator.end_training()
    except UserError:
        accelerator.trackers.clear()
        accelerator.end_training()
        raise
