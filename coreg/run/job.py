"""What every training script does around its training: store, run folder, resuming, the loop over epochs, the results."""

from __future__ import annotations

import contextlib
import hashlib
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import tqdm

from coreg.annotate.changes import before_and_after
from coreg.annotate.refined import refine_store
from coreg.annotate.settings import RefineConfig, ViewConfig
from coreg.config import as_settings, as_yaml, check_bounds
from coreg.errors import UserError
from coreg.files import write_atomically
from coreg.nets.model import check_backbone, check_network, check_weights, parse_backbone_args, trained_with
from coreg.plaintext import printable
from coreg.process import all_or_none, build_accelerator, follow_launcher, main_process_decides
from coreg.progress import seconds_between_lines
from coreg.records import RecordError
from coreg.report.record import TRAINED, read_report
from coreg.report.report import summary, write_known_labels
from coreg.run import checkpoint
from coreg.run.board import silent_thread, writing_curves
from coreg.run.folder import RunFolder
from coreg.run.state import take_state
from coreg.run.task import known_labels, training_rows
from coreg.run.training import Training
from coreg.run.watch import EXIT_INTERRUPTED, GOES_ON, STOP, Watch
from coreg.settings import ImageConfig, JobConfig, check_look, check_tracker
from coreg.store.store import AnnotationStore
from coreg.weak.rules import parse_rule

# settings that may change between two starts of the same job; what the store holds is compared by its hash
NOT_THE_JOB = (
    "output_dir",
    "annotations",
    "images",
    "data_root",
    "labels",
    "dataset",
    "workers",
    "report_to",
    "safe_csv",
    "print_config",
    "checkpoint_minutes",
    "timeout_minutes",
)


@dataclass
class Run:
    """A job that holds its run folder.

    store: what is trained on; annotated: the same before `--refine`.
    known: int64 over all rows of the store, classes that a person gave, -1 elsewhere. command: as it was typed.
    identity: what makes the job what it is, plain values. settings: every option. held: locks, let go of at the end.
    started: when the process began, on the clock of `time.perf_counter`.
    """

    accelerator: Accelerator
    folder: RunFolder
    store: AnnotationStore
    annotated: AnnotationStore
    known: np.ndarray
    job: JobConfig
    look: ImageConfig | None
    identity: dict[str, Any]
    settings: dict[str, Any]
    command: str
    started: float
    held: contextlib.ExitStack

    def begin(self, training: Training) -> None:
        """Take the run folder, now that everything is known to be there, and go on from its newest good checkpoint.

        Raises:
            UserError: the folder belongs to another job, another process holds it, or all its checkpoints are damaged.
        """
        if self.job.annotations and not refines(self.job):
            main_process_decides(self.accelerator, lambda: self.held.enter_context(self.folder.locked()))
        main_process_decides(self.accelerator, lambda: self.folder.claim(self.identity))
        if self.accelerator.is_main_process:
            write_atomically(self.folder.root / "config.yaml", as_yaml(self.settings))
            if (self.known >= 0).any():
                write_known_labels(self.folder.root / "known_labels.csv", self.store, self.known)
        newest = main_process_decides(self.accelerator, lambda: checkpoint.latest(self.folder.checkpoints))
        if newest is not None:
            self._go_on(training, newest)
            place = printable(self.folder.root)
            self.accelerator.print(f"Going on with {place} after epoch {training.epoch} of {self.job.epochs}.")
        # the report counts the time before an interruption too
        self.started -= training.seconds

    def _go_on(self, training: Training, number: int) -> None:
        """From checkpoint `number`; every process reads it, and one says what is wrong with it."""
        images = len(training_rows(self.job, self.store))
        try:
            state = checkpoint.load(self.folder.checkpoints, number)
            take_state(training, state, images, self.accelerator.device)
        except RecordError as error:
            path = self.folder.checkpoints / f"{number:08d}"
            raise UserError(
                f"checkpoint {path} does not hold this training ({str(error)[:150]}); delete it to go on from the one "
                f"before it, or delete {path.parent} to start the training anew",
                told=not self.accelerator.is_main_process,
            ) from None

    def train(
        self,
        training: Training,
        one_epoch: Callable[[Callable[[], None], Callable[[float], None]], dict[str, float]],
        name: str,
    ) -> None:
        """All epochs from where `training` stands, with a checkpoint after each and whenever one is due.

        Args:
            one_epoch: trains for the rest of the present epoch and gives its curves. It is handed `at_boundary`, to be
                called after every step (whatever that saves, `one_epoch` has to be able to go on from), and
                `advance`, which moves the progress bar by a share of an epoch.
            name: of the method, for the progress bar.

        Raises:
            UserError: a loss is no number any more; the last good checkpoint stays.
            SystemExit: a signal came; a checkpoint was written at the step boundary after it.
        """
        accelerator, job = self.accelerator, self.job
        self._begin_curves()
        watch = Watch(accelerator, job.checkpoint_minutes, job.timeout_minutes)
        mark = time.perf_counter()

        def save() -> None:
            nonlocal mark
            training.seconds, mark = training.seconds + time.perf_counter() - mark, time.perf_counter()
            state = training.state_dict()
            main_process_decides(accelerator, lambda: checkpoint.save(self.folder.checkpoints, training.serial, state))
            watch.saved()

        def at_boundary() -> None:
            due = watch.due()
            if due != GOES_ON:
                save()
            if due == STOP:
                accelerator.print(
                    f"\nStopped by a signal in epoch {training.epoch + 1}; the same command goes on from here."
                )
                raise SystemExit(EXIT_INTERRUPTED)

        layout = "{desc} {percentage:3.0f}%|{bar}| epoch {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]"
        pause = seconds_between_lines()
        with (
            watch.listening(),
            watch.naming_the_lost(),
            tqdm(total=job.epochs, initial=training.epoch, desc=name, bar_format=layout, mininterval=pause) as bar,
        ):

            def advance(epochs: float) -> None:
                # never past its end by a rounding error, about which tqdm would complain
                bar.update(min(epochs, bar.total - bar.n))

            while training.epoch < job.epochs:
                begun, making = time.perf_counter(), training.making_seconds
                curves = one_epoch(at_boundary, advance)
                self._refuse_nan(curves, training.epoch)
                spent = time.perf_counter() - begun
                waited = (training.making_seconds - making) / spent
                self._log(curves | {"time/epoch": spent, "time/making_batches": waited}, training.epoch)
                bar.update(training.epoch - bar.n)
                shown = {"P": curves.get("division/trusted"), "test": curves.get("accuracy/test/ensemble")}
                bar.set_postfix_str(", ".join(f"{k} {value:.1%}" for k, value in shown.items() if value is not None))
                save()

    def _begin_curves(self) -> None:
        # TensorBoard gets the settings at the end, beside what they led to (`coreg.run.board.show_end`)
        told = None if self.job.report_to == "tensorboard" else {k: str(v) for k, v in self.identity.items()}
        begin = writing_curves()(lambda: self.accelerator.init_trackers("tensorboard", config=told))
        main_process_decides(self.accelerator, begin)
        if not self.accelerator.is_main_process:
            begin()

    def _log(self, curves: dict[str, float], epoch: int) -> None:
        log = writing_curves()(lambda: self.accelerator.log(curves, step=epoch))
        main_process_decides(self.accelerator, log)

    def _refuse_nan(self, curves: dict[str, float], epoch: int) -> None:
        """Curves are the same on every process, and so all of them leave."""
        broken = [name for name, value in curves.items() if not math.isfinite(value)]
        if broken:
            raise UserError(
                f"{broken[0]} became {curves[broken[0]]} in epoch {epoch}; the checkpoints before it are kept in "
                f"{self.folder.checkpoints}: start anew in another --output_dir with a smaller --lr (now {self.job.lr})",
                told=not self.accelerator.is_main_process,
            )


@contextlib.contextmanager
def open_run(
    script: str,
    argv: Sequence[str],
    settings: tuple[Any, ...],
    annotate_default: Callable[[Path, Accelerator], AnnotationStore],
    default_folder: str,
) -> Iterator[Run | None]:
    """Check what every script is told, open the store, take the run folder.

    Gives None where nothing is to be run: the settings were asked for and are printed, or the run is already finished.

    Args:
        script: the command, for the report. argv: its arguments. settings: dataclasses, first `JobConfig` or one with
            those of its fields that are asked for here; `ImageConfig` where networks of our own are trained.
        annotate_default: makes the store, in the folder it is given, where `--annotations` names none.
        default_folder: the run folder where `--output_dir` names none.

    Raises:
        UserError: settings that cannot work, a store that cannot be opened, or a folder that belongs to another job.
    """
    started = time.perf_counter()
    job = settings[0]
    follow_launcher(job)
    if job.print_config:
        print(as_yaml(as_settings(*settings)), end="")
        yield None
        return
    job.output_dir = job.output_dir or default_folder
    look = next((group for group in settings if isinstance(group, ImageConfig)), None)
    check_bounds(*settings)
    check_tracker(job.report_to)
    parse_rule(job.candidates)
    if not job.annotations and (job.images or job.data_root):
        raise UserError("--images and --data_root say where the images of --annotations are now; give that too")
    if look is not None:
        check_look(look)
        check_backbone(look.backbone, look.backbone_args)
    folder, all_settings = RunFolder(job.output_dir), as_settings(*settings)
    identity = {"script": script} | {k: v for k, v in all_settings.items() if k not in NOT_THE_JOB}
    accelerator = build_accelerator(job.mixed_precision, job.report_to, job.output_dir, job.timeout_minutes)
    with leaving_together(accelerator), contextlib.ExitStack() as held:
        main_process_decides(accelerator, lambda: folder.refuse_other(identity))
        if job.annotations:
            store = all_or_none(accelerator, lambda: AnnotationStore.open(job.annotations).at(job.images, job.data_root))
        else:
            main_process_decides(accelerator, lambda: held.enter_context(folder.locked()))
            store = annotate_default(folder.root / "annotations", accelerator)
        known = all_or_none(accelerator, lambda: known_labels(job, store))
        identity |= {"store": store.hash, "known_labels": hashlib.sha256(known.tobytes()).hexdigest()}
        main_process_decides(accelerator, lambda: folder.refuse_other(identity))
        if main_process_decides(accelerator, lambda: folder.finished):
            accelerator.print(summary(main_process_decides(accelerator, lambda: finished_report(folder)), folder.root))
            place = printable(folder.root)
            accelerator.print(f"\nThis run is finished; choose another --output_dir, or delete {place} to repeat it.")
            yield None
            return
        if look is not None and look.pretrained:
            all_or_none(accelerator, lambda: check_weights(look.backbone))
        if look is not None:
            arguments = parse_backbone_args(look.backbone_args)
            size, n_classes = look.image_size, len(store.class_names)
            main_process_decides(
                accelerator, lambda: check_network(look.backbone, n_classes, size, look.channels, arguments)
            )
        if look is not None and (advice := other_pixels(look)):
            accelerator.print(printable(advice))
        command, annotated = shlex.join([script, *argv]), store
        if refines(job):
            main_process_decides(accelerator, lambda: refuse_refining(store, job.refine))
            if job.annotations:
                main_process_decides(accelerator, lambda: held.enter_context(folder.locked()))
            store = refined(store, folder.root / "refined", job, look, accelerator)
        yield Run(accelerator, folder, store, annotated, known, job, look, identity, all_settings, command, started, held)


def finished_report(folder: RunFolder) -> dict[str, Any]:
    """The report of a finished training.

    Raises:
        UserError: it is damaged.
    """
    try:
        return read_report(folder.report, TRAINED)
    except RecordError as error:
        raise UserError(
            f"{folder.report} is damaged ({error}); delete it, and the same command writes it anew from the last checkpoint"
        ) from None


def refines(job: JobConfig) -> bool:
    """Whether evidence is refined before training; methods that tune the annotator itself have no such option."""
    return getattr(job, "refine", "none") != "none"


def refuse_refining(store: AnnotationStore, features: str) -> None:
    """Raise a UserError where a store cannot be refined by `features`, `own` or `view`."""
    if "refined" in store.manifest:
        raise UserError(f"{store.root} is refined already; write --refine none")
    if features == "own" and store.manifest["features"] is None:
        raise UserError(f"{store.root} keeps no features of its annotator; write --refine none, or view for the students'")


def refined(
    store: AnnotationStore, folder: Path, job: JobConfig, look: ImageConfig, accelerator: Accelerator
) -> AnnotationStore:
    """The store that `--refine` makes of another one, by the features of the networks that are trained."""
    names = ("backbone", "backbone_args", "pretrained", "image_size", "channels", "mean", "std")
    view = ViewConfig(**{name: getattr(look, name) for name in names}, workers=job.workers)
    features = "its own features" if job.refine == "own" else look.backbone
    accelerator.print(printable(f"Refining {store.root} by {features}."))
    part = training_rows(job, store) if job.share != 1 else None
    store = refine_store(store, folder, RefineConfig(str(folder), job.refine), view, accelerator, part)
    accelerator.print("\n".join(before_and_after(store.manifest)))
    return store


def other_pixels(look: ImageConfig) -> str | None:
    """What to say where weights would see other pixels than those they were trained with."""
    has_weights = look.pretrained or look.backbone.startswith("local-dir:")
    pixels = trained_with(look.backbone) if has_weights else None
    if pixels is None or len(pixels[0]) != look.channels:
        return None
    if all(np.allclose(wanted, given, atol=5e-3) for wanted, given in zip(pixels, (look.mean, look.std))):
        return None
    wanted = [" ".join(f"{number:g}" for number in numbers) for numbers in pixels]
    return f"note: {look.backbone} was trained with other pixels; it wants --mean {wanted[0]} --std {wanted[1]}"


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
