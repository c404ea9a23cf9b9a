"""What follows the steps of an epoch: batch statistics, what TensorBoard shows, accuracy on the test images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from timm.utils import distribute_bn
from torch.optim.swa_utils import update_bn

from coreg.learn.collective import my_slice
from coreg.nets.model import Model
from coreg.process import main_process_decides
from coreg.report.metrics import accuracy
from coreg.run.board import show_epoch
from coreg.run.task import Task, predict
from coreg.run.training import Training
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
        batches = [order.batch(step) for step in range(max(n // size, 1))]
        key = ("statistics", epoch, number)
        update_bn((task.data.view("weak", rows[my_slice(len(rows))], key) for rows in batches), net)


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
