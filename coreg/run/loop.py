"""A job that holds its run folder: begun or gone on with, looped over, checkpointed, interrupted between two steps."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from coreg.config import as_yaml
from coreg.errors import UserError
from coreg.files import write_atomically
from coreg.learn.two_nets import Divisions
from coreg.nets.model import Model
from coreg.network_options import ImageConfig
from coreg.plaintext import printable
from coreg.process import main_process_decides
from coreg.progress import ProgressFile, progress_bar
from coreg.records import RecordError
from coreg.report.report import write_known_labels
from coreg.run import checkpoint
from coreg.run.board import writing_curves
from coreg.run.folder import RunFolder
from coreg.run.state import take_state
from coreg.run.training import Training, build_model
from coreg.run.watch import EXIT_INTERRUPTED, GOES_ON, STOP, Watch
from coreg.settings import JobConfig
from coreg.store.store import AnnotationStore

BAR = "{desc} {percentage:3.0f}%|{bar}| epoch {n:.1f}/{total} [{elapsed}<{remaining}{postfix}]"


@dataclass
class Run:
    """A job that holds its run folder."""

    accelerator: Accelerator
    folder: RunFolder
    store: AnnotationStore  # what is trained on
    annotated: AnnotationStore  # the same before `--refine`
    known: np.ndarray  # int64 over all rows of the store, classes that a person gave, `NONE` for none of them, -1 elsewhere
    job: JobConfig
    image_options: ImageConfig | None  # None where no network of our own is trained
    identity: dict[str, Any]  # plain values that make the job what it is
    settings: dict[str, Any]  # every option by name
    command: str  # as it was typed, without credentials
    started: float  # when the process began, on the clock of `time.perf_counter`
    held: contextlib.ExitStack  # locks, let go of at the end
    likely: AnnotationStore | None = None  # by whose probabilities `--prefilter` goes; None without
    watch: Watch = field(init=False)  # this and the rest: of the loop, from its first epoch on
    bar: tqdm = field(init=False)
    progress: ProgressFile | None = field(init=False)  # None on all processes but the main one
    saved_at: float = field(init=False)  # when the loop began, or the last checkpoint was written, on that clock
    epoch_began: float = field(init=False)  # on that clock, too
    made_before: float = field(init=False)  # `Training.making_seconds` at that time

    @property
    def sharded(self) -> bool:
        """Whether each process is to hold a part of the tables of training images (`--tables`)."""
        return self.settings.get("tables") == "sharded"

    def begin(
        self,
        learners: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        divisions: Divisions | None = None,
    ) -> Training:
        """Take the run folder, now that everything is known to be there, and go on from its newest good checkpoint.

        Args:
            learners, optimizers, divisions: see `Training`.

        Raises:
            UserError: the folder belongs to another job, another process holds it, or all its checkpoints are damaged.
        """
        sizes = (self.job.gradient_accumulation_steps, self.job.batch_size if self.job.compile else None)
        training = Training(self.accelerator, list(learners), list(optimizers), divisions, *sizes)
        nets = [net for learner in learners if isinstance(net := getattr(learner, "net", None), Model) and net.frozen]
        if frozen := [net.frozen_hash() for net in nets]:  # checkpoints do not hold them
            self.identity |= {"frozen_weights": frozen}
        main_process_decides(self.accelerator, self._claim)
        newest = main_process_decides(self.accelerator, lambda: checkpoint.latest(self.folder.checkpoints))
        if newest is not None:
            self._go_on(training, newest)
            place = printable(self.folder.root)
            self.accelerator.print(f"Going on with {place} after epoch {training.epoch} of {self.job.epochs}.")
        # the report counts the time before an interruption too
        self.started -= training.seconds
        return training

    def _claim(self) -> None:
        # those that annotate or refine on the way hold it already
        if not self.folder.held:
            self.held.enter_context(self.folder.locked())
        self.folder.claim(self.identity)
        write_atomically(self.folder.root / "config.yaml", as_yaml(self.settings))
        if (self.known != -1).any():
            write_known_labels(self.folder.root / "known_labels.csv", self.store, self.known)

    def _go_on(self, training: Training, number: int) -> None:
        """From checkpoint `number`; every process reads it, and one says what is wrong with it."""
        try:
            take_state(training, checkpoint.load(self.folder.checkpoints, number, mapped=self.sharded))
        except RecordError as error:
            path = self.folder.checkpoints / f"{number:08d}"
            raise UserError(
                f"checkpoint {path} does not hold this training ({str(error)[:150]}); delete it to go on from the one "
                f"before it, or delete {path.parent} to start the training anew",
                silent=not self.accelerator.is_main_process,
            ) from None

    def network(self, width: int) -> nn.Module:
        """A network like those of the job, with `width` projected features and untrained weights, to be measured."""
        net = build_model(self.image_options, len(self.store.class_names), width, pretrained=False)
        return net.to(memory_format=torch.channels_last)

    def epochs(self, training: Training, name: str) -> Iterator[int]:
        """Epochs from where `training` stands, each to be closed with `log`; a checkpoint is written after each.

        Args:
            name: of the method, for the progress bar.
        """
        self._begin_curves()
        self.watch = Watch(self.accelerator, self.job.checkpoint_minutes, self.job.timeout_minutes)
        self.saved_at = time.perf_counter()
        # what leaves the loop by an exception does not pass here, but through what the run holds
        loop = self.held.enter_context(contextlib.ExitStack())
        loop.enter_context(self.watch.listening())
        loop.enter_context(self.watch.naming_the_lost())
        total, main = self.job.epochs, self.accelerator.is_main_process
        bar = progress_bar(total=total, initial=training.epoch, desc=name, bar_format=BAR, disable=not main)
        self.bar = loop.enter_context(bar)
        self.progress = ProgressFile(self.folder.root, name, total) if main else None
        if self.progress:
            self.progress.begin(bar.n)
            loop.callback(lambda: self.progress.write(bar.n, running=False))
        while training.epoch < total:
            self.epoch_began, self.made_before = time.perf_counter(), training.making_seconds
            yield training.epoch
            self._advance(training.epoch - self.bar.n)
            self._save(training)
        loop.close()

    def steps(self, training: Training, count: int) -> Iterator[int]:
        """Steps of the present network's epoch of `count` from where it stands; each trains with `training.learn`.

        Between two steps, when the weights have moved and whatever follows `learn` is done, checkpoints are written that
        are due. At the end the network's mean losses are taken.

        Raises:
            SystemExit: a signal came; a checkpoint was written.
        """
        training.count = count
        while training.step < count:
            training.began = time.perf_counter()
            yield training.step
            moved = training.moves
            training.step += 1
            self._advance(1 / count / len(training.learners))
            if moved:
                due = self.watch.due()
                if due != GOES_ON:
                    self._save(training)
                if due == STOP:
                    again = f"\nStopped by a signal in epoch {training.epoch + 1}; the same command goes on from here."
                    self.accelerator.print(again)
                    raise SystemExit(EXIT_INTERRUPTED)
        training.finish_network()

    def log(self, training: Training, curves: dict[str, float]) -> None:
        """Close the epoch: `curves` and the mean losses go to the tracker and into the checkpoint.

        Raises:
            UserError: one of them is no number any more; the last good checkpoint stays.
        """
        curves = training.finish_epoch(curves)
        # curves are the same on every process, and so all of them leave
        if broken := [name for name, value in curves.items() if not math.isfinite(value)]:
            raise UserError(
                f"{broken[0]} became {curves[broken[0]]} in epoch {training.epoch}; the checkpoints before it are kept in "
                f"{self.folder.checkpoints}: start anew in another --output_dir with a smaller --lr (now {self.job.lr})",
                silent=not self.accelerator.is_main_process,
            )
        spent = time.perf_counter() - self.epoch_began
        times = {"time/epoch": spent, "time/making_batches": (training.making_seconds - self.made_before) / spent}
        log = writing_curves()(lambda: self.accelerator.log(curves | times, step=training.epoch))
        main_process_decides(self.accelerator, log)
        shown = {"P": curves.get("division/trusted"), "test": curves.get("accuracy/test/ensemble")}
        # a line a minute where there is no terminal, and not one an epoch
        self.bar.set_postfix_str(", ".join(f"{k} {value:.1%}" for k, value in shown.items() if value is not None), False)

    def _advance(self, epochs: float) -> None:
        # never past its end by a rounding error, about which tqdm would complain
        self.bar.update(min(epochs, self.bar.total - self.bar.n))
        if self.progress:
            self.progress.update(self.bar.n)

    def _save(self, training: Training) -> None:
        now = time.perf_counter()
        training.seconds, self.saved_at = training.seconds + now - self.saved_at, now
        state = training.state_dict()
        main_process_decides(self.accelerator, lambda: checkpoint.save(self.folder.checkpoints, training.serial, state))
        self.watch.saved_at = time.monotonic()

    def _begin_curves(self) -> None:
        # TensorBoard gets the settings at the end, beside what they led to (`coreg.run.board.show_numbers`)
        config = None if self.job.report_to == "tensorboard" else {k: str(v) for k, v in self.identity.items()}
        start = writing_curves()(lambda: self.accelerator.init_trackers("tensorboard", config=config))
        main_process_decides(self.accelerator, start)
        if not self.accelerator.is_main_process:
            start()
