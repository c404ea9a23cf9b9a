"""Parts of an epoch: warm-up and division by two networks, batch statistics, what TensorBoard shows, accuracy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from timm.utils import distribute_bn
from torch import nn
from torch.optim.swa_utils import update_bn

from coreg.learn.collective import my_slice
from coreg.learn.coreg import CoRegBatch, WarmUpBatch
from coreg.learn.division import Division, Predicted, divide
from coreg.learn.schedules import ramp
from coreg.learn.tables import share
from coreg.learn.two_nets import Divisions, Verdict, co_train_batch, partner_rows
from coreg.nets.model import Model
from coreg.process import main_process_decides
from coreg.report.metrics import accuracy, division_health
from coreg.run.board import show_epoch
from coreg.run.loop import Run
from coreg.run.task import Task, predict
from coreg.run.training import Training, build_optimizer, placed
from coreg.views.order import ShuffledRows


def judge(task: Task[Any], training: Training) -> dict[str, float]:
    """`end_steps`, and the learners' networks judged; gives accuracies as `accuracy_on_test`."""
    end_steps(task, training)
    return accuracy_on_test(task, training.nets)


def end_steps(task: Task[Any], training: Training) -> None:
    """Let all processes agree on batch statistics, and show the epoch."""
    accelerator = task.accelerator
    if accelerator.num_processes > 1:
        # without SyncBatchNorm, processes have seen different rows: agree on the mean statistics
        for net in training.nets:
            distribute_bn(net, accelerator.num_processes, reduce=True)
    main_process_decides(accelerator, lambda: show_epoch(accelerator, task.data, training, task.job.epochs))


@torch.no_grad()
def count_statistics(task: Task[Any], nets: Sequence[Model], epoch: int) -> None:
    """Batch normalisation's running means and variances anew, as averages over one weak view of every training image.

    For a method that trains on mixed images alone, whose statistics are not those of images.
    """
    size, n = 2 * task.job.batch_size, len(task.data.samples)
    for number, net in enumerate(nets):
        order = ShuffledRows(np.arange(n), size, (task.job.seed, "statistics", epoch, number))
        # every batch counts alike, so a small last one is left out
        batches = [rows[my_slice(len(rows))] for rows in map(order.batch, range(max(n // size, 1)))]
        key = ("statistics", epoch, number)
        task.data.read_ahead(batches.__getitem__, range(len(batches)))
        # momenta change on the way, for which nothing is compiled
        with torch.compiler.set_stance("force_eager") if task.job.compile else contextlib.nullcontext():
            update_bn((task.data.view("weak", rows, key) for rows in batches), net)


def accuracy_on_test(task: Task[Any], nets: Sequence[Model]) -> dict[str, float]:
    """Accuracy on the test images of each network and, as `ensemble`, of the sum of their logits, where it is known."""
    if task.test is None or (task.test_labels < 0).all():
        return {}
    logits = [predict(net, task.test, "plain", (), 4 * task.job.batch_size)[0] for net in nets]
    predictions = {f"net{number}": rows for number, rows in enumerate(logits, start=1)} if len(logits) > 1 else {}
    predictions["ensemble"] = sum(logits)
    return {
        f"accuracy/test/{name}": accuracy(p.argmax(1).cpu().numpy(), task.test_labels) for name, p in predictions.items()
    }


# ---- two networks that divide the training set for each other: Co-Reg and DivideMix ---------------------------------


def begin_paired(run: Run, task: Task[Any], learners: Sequence[nn.Module]) -> Training:
    """The training of two learners, each with the other one's network for its peer."""
    for learner, other in zip(learners, reversed(learners)):
        learner.set_peer(other.net)
    learners = [placed(learner, task.accelerator, task.job) for learner in learners]
    nets = [learner.net for learner in learners]
    divisions = Divisions(nets, len(task.data.samples), run.sharded)
    return run.begin(learners, [build_optimizer(net, task.job) for net in nets], divisions)


def warm_up(run: Run, task: Task[Any], training: Training, lr: float, view: str, informative: np.ndarray) -> None:
    """Train the present network for an epoch on candidate sets.

    Images that no template could name teach nothing and are left out.

    Args:
        view: `strong` as in the reference, or `weak`. informative: bool (N,), over which the mean of the partial loss is
            taken.
    """
    key = (training.epoch, training.number)
    order = ShuffledRows(np.flatnonzero(task.weak.usable), 2 * task.job.batch_size, (task.job.seed, "warm-up", *key))
    task.read_ahead(training.step, order)
    for step in run.steps(training, order.per_round):
        rows = order.batch(step)
        images = task.data.view(view, rows[my_slice(len(rows))], ("warm-up", *key))
        batch = WarmUpBatch(images, share(task.table, rows), len(rows), int(informative[rows].sum()))
        training.learn(batch, lr)


def co_train_batches(
    run: Run,
    task: Task[Any],
    training: Training,
    verdict: Verdict,
    with_rest: bool = True,
    view: str = "strong",
    own: Verdict | None = None,
) -> Iterator[CoRegBatch]:
    """The batches of an epoch in which the present network trains on a division of the training set, P in random order.

    Args:
        verdict: that divides it. with_rest: whether distrusted images U are trained on too. view, own: see
            `co_train_batch`.
    """
    epoch, number, job, method = training.epoch, training.number, task.job, task.method
    key = (job.seed, epoch, number)
    trusted = ShuffledRows(np.concatenate([np.flatnonzero(verdict.trusted), task.repeated]), job.batch_size, ("P", *key))
    rest = ShuffledRows(np.flatnonzero(~verdict.trusted & with_rest), job.batch_size, ("U", *key))
    labelled = ShuffledRows(task.extra, job.batch_size, ("labelled", *key))

    def partners(step: int) -> np.ndarray:
        return partner_rows(job.seed, trusted.batch(step), rest.batch(step), (epoch, number, step), method.mixup_alpha)

    task.read_ahead(training.step, trusted, rest, labelled, partners=partners)
    for step in run.steps(training, trusted.per_round):
        at, rows = (epoch, number, step), (trusted.batch(step), rest.batch(step))
        batch = co_train_batch(task.data, *rows, verdict, at, method.mixup_alpha, view, own)
        batch.labelled, batch.n_labelled = task.labelled(labelled.batch(step), "weak", at)
        batch.ramp = ramp(epoch - method.warmup_epochs + step / trusted.per_round, method.rampup_epochs)
        yield batch


def division_of(task: Task[Any], training: Training, number: int, losses: np.ndarray, monotone: bool = False) -> Division:
    """Division of the training set by the division losses (N,) of network `number` (0 or 1) in the last epochs."""
    history = training.divisions.remember(number, losses, task.method.history)
    fitted, smallest = task.weak.usable & ~task.weak.certain, min(task.job.batch_size, len(task.weak.usable))
    # fitted on one process and sent to the others: two fits might differ in the last bit, and then in a whole image
    division = main_process_decides(
        task.accelerator,
        lambda: divide(history, fitted, task.job.seed, task.method.threshold, smallest, monotone),
    )
    # a person's labels are trusted whatever their loss
    division.weight[task.weak.certain], division.trusted[task.weak.certain] = 1.0, True
    return division


def hand_over(
    task: Task[Any], training: Training, divided: Sequence[tuple[Division, Verdict, Predicted]]
) -> Sequence[Predicted]:
    """Let each network have the other one's verdict; gives what they predict.

    Args:
        divided: of each network its division, what the other one is to train on, what it predicts.
    """
    divisions = training.divisions
    both, verdicts, networks = zip(*divided)
    divisions.verdicts, divisions.weights = list(verdicts), [division.weight for division in both]
    weak, names = task.weak, task.store.class_names
    divisions.health = division_health(both, networks, weak.table, task.zero_shot, weak.truth, names)
    return networks
