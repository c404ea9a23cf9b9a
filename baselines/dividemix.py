"""DivideMix on the annotator's single labels: two networks, co-division and MixUp, without candidate sets.

    accelerate launch baselines/dividemix.py                                        # built-in digits
    accelerate launch baselines/dividemix.py --annotations ann --labels_from single --output_dir runs/dividemix

The run folder is the job: the same command again goes on where it stopped, and a finished run says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

from coreg.config import parse
from coreg.errors import UserError, exits_with_one_line
from coreg.learn.dividemix_options import OFFICIAL, DivideMixOptions
from coreg.learn.options import CoRegOptions
from coreg.settings import ImageConfig, JobConfig, check, check_look, lacks_official, official
from coreg.weak.rules import parse_rule

NAMES = {"single": "DivideMix, single template", "averaged": "DivideMix, averaged"}


@exits_with_one_line
def read_settings(argv: Sequence[str]) -> tuple[JobConfig, ImageConfig, DivideMixOptions]:
    """Recipe, then the official preset where it is asked for, then the command line, checked."""
    own_images = any(word.split("=")[0] == "--annotations" for word in argv)
    read = partial(
        parse,
        JobConfig,
        ImageConfig,
        DivideMixOptions,
        default_recipe="folder" if own_images else "digits",
        others=(CoRegOptions,),
        prog="baselines/dividemix.py",
        description=__doc__,
    )
    job, look, method = read(argv=argv)
    if method.preset == "official":
        job, look, method = read(argv=[*official(OFFICIAL, job.dataset)[1], *argv])
    check(job)
    check_look(look)
    if method.warmup_epochs > job.epochs:
        raise UserError(f"--warmup_epochs is {method.warmup_epochs}, of {job.epochs} --epochs in all; give at most as many")
    parse_rule(job.candidates)
    return job, look, method


if __name__ == "__main__":
    read_settings(sys.argv[1:])  # what is wrong with them is told before the imports below, which take seconds

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from annotate_vlm import annotate_digits
from coreg.learn.coreg import CoRegBatch, WarmUpBatch, cosine_lr, ramp
from coreg.learn.dividemix import DivideMixLearner
from coreg.learn.division import Division, divide, division_loss
from coreg.process import main_process_decides
from coreg.report.metrics import division_health
from coreg.report.report import summary
from coreg.run.batches import TrainingImages, Verdict, co_train_batch, warm_up_batch
from coreg.run.epoch import Steps, train_epoch
from coreg.run.job import open_run
from coreg.run.results import finish
from coreg.run.task import Task, predict, prepare
from coreg.run.training import Training, assemble, build_networks
from coreg.views.order import ShuffledRows


@dataclass
class NoisyLabels:
    """One label for each training image.

    table: bool (N, C), one True a row, or none where there is no label; device_table: the same on the device.
    usable: bool (N,), False where the annotator named no class.
    """

    table: np.ndarray
    device_table: Tensor
    usable: np.ndarray


class WeakViews(TrainingImages):
    """Training images whose strong views are the weak ones of the same number: trained on is what was guessed from."""

    def view(self, kind: str, rows: np.ndarray, key: tuple[int | str, ...], pixels: Tensor | None = None) -> Tensor:
        if kind == "strong":
            kind, key = "weak", (key[0].replace("-s", "-w"), *key[1:])
        return super().view(kind, rows, key, pixels)


def noisy_labels(task: Task[DivideMixOptions]) -> NoisyLabels:
    """What the annotator names under its first template or on average; a label that a person gave stands in for it."""
    rows = task.data.samples.numpy()
    named = task.store.votes()[rows, 0].astype(np.int64) if task.method.labels_from == "single" else task.annotator
    named = np.where(task.known >= 0, task.known, np.where(task.usable, named, -1))
    table = named[:, None] == np.arange(len(task.store.class_names))
    return NoisyLabels(table, torch.from_numpy(table).to(task.accelerator.device), named >= 0)


def divide_by(
    task: Task[DivideMixOptions], training: Training, labels: NoisyLabels, number: int
) -> tuple[Division, Verdict, np.ndarray]:
    """Let network `number` (0 or 1) split the training set; also gives its (N, C) log probabilities."""
    method, job = task.method, task.job
    logits, _ = predict(training.nets[number], task.data, "plain", (), 4 * job.batch_size)
    log_p = torch.log_softmax(logits.double(), dim=1).cpu().numpy()
    if not np.isfinite(log_p).all():
        raise UserError(
            f"network {number + 1} predicts no numbers any more in epoch {training.epoch + 1}; start anew in another "
            f"--output_dir with a smaller --lr (now {job.lr}); the checkpoints before it are kept",
            told=not task.accelerator.is_main_process,
        )
    history = [*training.losses[number], division_loss(log_p, labels.table)][-method.history :]
    training.losses[number] = history
    fitted, smallest = labels.usable & (task.known < 0), min(job.batch_size, len(labels.usable))
    # fitted on one process and sent to the others: two fits might differ in the last bit, and then in a whole image
    division = main_process_decides(
        task.accelerator, lambda: divide(np.stack(history), fitted, job.seed, method.threshold, smallest)
    )
    # a person's labels are trusted whatever their loss
    division.weight[task.known >= 0], division.trusted[task.known >= 0] = 1.0, True
    weight = torch.from_numpy(division.weight).to(task.accelerator.device, task.data.dtype)
    return division, Verdict(weight, labels.device_table.to(task.data.dtype), division.trusted), log_p


def divide_training_set(task: Task[DivideMixOptions], training: Training, labels: NoisyLabels) -> None:
    """Both networks divide before either of them trains."""
    divisions, verdicts, log_ps = zip(*(divide_by(task, training, labels, number) for number in (0, 1)))
    training.verdicts, training.weights = list(verdicts), [division.weight for division in divisions]
    names = task.store.class_names
    training.partial = division_health(divisions, log_ps, labels.table, task.zero_shot, task.labels, names)


def warm_up(task: Task[DivideMixOptions], training: Training, labels: NoisyLabels) -> Steps:
    """Steps of the present network's warm-up epoch and how to make each one's batch; images without a label are no part."""
    key, view = (training.epoch, training.number), task.method.train_view
    rows = ShuffledRows(np.flatnonzero(labels.usable), 2 * task.job.batch_size, (task.job.seed, "warm-up", *key))

    def batch(step: int) -> WarmUpBatch:
        chosen = rows.batch(step)
        return warm_up_batch(task.data, chosen, labels.device_table, key, view, len(chosen))

    return rows.per_round, batch


def co_train(task: Task[DivideMixOptions], training: Training) -> Steps:
    """Steps of the present network's epoch on the split that the other one made, and how to make each one's batch."""
    epoch, number, job, method = training.epoch, training.number, task.job, task.method
    verdict, key = training.verdicts[1 - number], (job.seed, epoch, number)
    x = ShuffledRows(np.concatenate([np.flatnonzero(verdict.trusted), task.repeated]), job.batch_size, ("P", *key))
    u = ShuffledRows(np.flatnonzero(~verdict.trusted), job.batch_size, ("U", *key))
    labelled = ShuffledRows(task.extra, job.batch_size, ("labelled", *key))

    def batch(step: int) -> CoRegBatch:
        extra = labelled.batch(step)
        return co_train_batch(
            task.data,
            x.batch(step),
            u.batch(step),
            verdict,
            key=(epoch, number, step),
            mixup_alpha=method.mixup_alpha,
            ramp=ramp(epoch - method.warmup_epochs + step / x.per_round, method.rampup_epochs),
            gate=False,
            fill_queue=False,
            labelled=(extra, task.known[extra]) if len(extra) else None,
        )

    return x.per_round, batch


def one_epoch(
    task: Task[DivideMixOptions],
    training: Training,
    labels: NoisyLabels,
    at_boundary: Callable[[], None],
    advance: Callable[[float], None],
) -> dict[str, float]:
    """The rest of the present epoch: warm up, or divide and co-train; gives its curves."""
    job, method, epoch = task.job, task.method, training.epoch
    if method.lr_schedule == "cosine":
        rate = cosine_lr(epoch, job.lr, job.lr_floor, job.lr_horizon or job.epochs)
    else:
        rate = job.lr * (0.1 if 2 * epoch >= job.epochs else 1.0)
    warming_up = epoch < method.warmup_epochs
    if not warming_up and not training.verdicts:
        divide_training_set(task, training, labels)
    steps = partial(warm_up, task, training, labels) if warming_up else partial(co_train, task, training)
    return train_epoch(task, training, rate, steps, at_boundary, advance)


def build_training(task: Task[DivideMixOptions]) -> Training:
    """Two networks of one architecture with different initialisation, and what trains them."""
    nets = build_networks(task.accelerator, task.job, task.look, len(task.store.class_names), projection_dim=1, count=2)
    learners = [DivideMixLearner(net, task.method) for net in nets]
    for learner, peer in zip(learners, reversed(nets)):
        learner.set_peer(peer)
    return assemble(task.accelerator, task.job, nets, learners)


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, train, report."""
    argv = list(sys.argv[1:] if argv is None else argv)
    job, look, method = read_settings(argv)
    with open_run(
        "baselines/dividemix.py", argv, (job, look, method), annotate_digits, f"runs/dividemix_{method.labels_from}"
    ) as run:
        if run is None:
            return
        note = lacks_official(OFFICIAL, job.dataset, "DivideMix")
        if method.preset == "official" and note:
            run.accelerator.print(note)
        task = prepare(run, method)
        if method.train_view == "weak":
            task.data = WeakViews(**vars(task.data))
        labels = noisy_labels(task)
        training = build_training(task)
        run.begin(training)
        run.train(training, partial(one_epoch, task, training, labels), "DivideMix")
        told = {"preset": method.preset}
        if method.preset == "official":
            told["official_for"], _ = official(OFFICIAL, job.dataset)
        report = finish(run, task, training, NAMES[method.labels_from], **told)
        run.accelerator.print(summary(report, run.folder.root))


if __name__ == "__main__":
    main()
