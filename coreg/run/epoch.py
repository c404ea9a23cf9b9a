"""One epoch of any method that trains networks in turn: steps, statistics agreed on, test accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from timm.utils import distribute_bn
from torch.optim.swa_utils import update_bn

from coreg.learn.collective import share
from coreg.process import main_process_decides
from coreg.report.metrics import accuracy
from coreg.run.board import show_epoch
from coreg.run.task import Task, predict
from coreg.run.training import Batch, Training
from coreg.views.order import ShuffledRows

# the steps of the present network's epoch, and how to make each one's batch
Steps = tuple[int, Callable[[int], Batch]]


def train_epoch(
    task: Task[Any],
    training: Training,
    rate: float,
    steps: Callable[[], Steps],
    at_boundary: Callable[[], None],
    advance: Callable[[float], None],
    renew_statistics: bool = False,
) -> dict[str, float]:
    """The rest of the present epoch, from the step where `training` stands; gives its curves.

    Args:
        rate: learning rate of this epoch.
        steps: asked anew for every network, `training.number` says which.
        at_boundary: called after every step; whatever it saves, this function can go on from.
        advance: moves the progress bar by a share of an epoch.
        renew_statistics: count batch statistics anew at the end, on weak views: for a method that trains on mixed images
            alone, whose statistics are not those of images.
    """
    accelerator, accumulated = task.accelerator, task.job.gradient_accumulation_steps
    training.set_rate(rate, task.job.lr)
    while training.number < len(training.nets):
        count, batch = steps()
        while training.step < count:
            update = (training.step + 1) % accumulated == 0 or training.step + 1 == count
            made = training.timed(batch, training.step)
            training.optimise(accelerator, made, update, accumulated)
            training.images_seen += made.size
            advance(1 / count / len(training.nets))
            if update:
                at_boundary()
        training.finish_network()
    if renew_statistics:
        count_statistics(task, training)
    if accelerator.num_processes > 1:
        # without SyncBatchNorm, processes have seen different rows: agree on the mean statistics
        for net in training.nets:
            distribute_bn(net, accelerator.num_processes, reduce=True)
    main_process_decides(accelerator, lambda: show_epoch(accelerator, task.data, training, task.job.epochs))
    return training.finish_epoch({"lr": rate} | accuracy_on_test(task, training))


@torch.no_grad()
def count_statistics(task: Task[Any], training: Training) -> None:
    """Batch normalisation's running means and variances anew, as averages over one weak view of every training image."""
    size, n = 2 * task.job.batch_size, len(task.data.samples)
    for number, net in enumerate(training.nets):
        order = ShuffledRows(np.arange(n), size, (task.job.seed, "statistics", training.epoch, number))
        # every batch counts alike, so a small last one is left out
        batches = [order.batch(step) for step in range(max(n // size, 1))]
        key = ("statistics", training.epoch, number)
        update_bn((task.data.view("weak", rows[share(len(rows))], key) for rows in batches), net)


def accuracy_on_test(task: Task[Any], training: Training) -> dict[str, float]:
    """Accuracy on the test images of each network and, as `ensemble`, of the sum of their logits, where it is known."""
    if task.test is None or (task.test_labels < 0).all():
        return {}
    logits = [predict(net, task.test, "plain", (), 4 * task.job.batch_size)[0] for net in training.nets]
    predictions = {f"net{number}": rows for number, rows in enumerate(logits, start=1)} if len(logits) > 1 else {}
    predictions["ensemble"] = sum(logits)
    return {
        f"accuracy/test/{name}": accuracy(p.argmax(1).cpu().numpy(), task.test_labels) for name, p in predictions.items()
    }
