"""Unsupervised distillation: one small network mimics the annotator's probabilities of every image, and nothing else.

    accelerate launch baselines/distill.py                                      # built-in digits
    accelerate launch baselines/distill.py --annotations ann --teacher single --output_dir runs/kd

The run folder is the job: the same command again goes on where it stopped, and a finished run says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from coreg.config import option
from coreg.errors import UserError, exits_with_one_line
from coreg.network_options import ImageConfig
from coreg.run.settings import read_student, refuse_prefilter
from coreg.settings import JobConfig

NAMES = {"single": "KD, single template", "averaged": "KD, averaged"}


@dataclass
class DistillOptions:
    """distillation: what the network learns from, and how."""

    teacher: Literal["single", "averaged"] = option(
        "averaged", "the annotator's probabilities under its first template, or their mean over all templates"
    )
    kd_temperature: float = option(
        1.0, "T, by which both distributions are softened; the loss is multiplied by T^2", (0.001, 1000)
    )
    view: Literal["weak", "strong"] = option("weak", "view of an image in training")


@exits_with_one_line
def read_settings(argv: Sequence[str] | None = None) -> tuple[JobConfig, ImageConfig, DistillOptions]:
    """Recipe and command line, checked."""
    job, image_options, method = read_student(argv, "baselines/distill.py", __doc__, DistillOptions)
    refuse_prefilter(job, "baselines/distill.py")
    return job, image_options, method


if __name__ == "__main__":
    read_settings()  # faults in them are reported before the imports below, which take seconds

import numpy as np
import torch
from torch import Tensor

from annotate_vlm import annotate_digits
from coreg.annotate.textual import single_template_probabilities
from coreg.learn.collective import my_slice
from coreg.learn.distill import DistillBatch, DistillLearner
from coreg.plaintext import printable
from coreg.process import all_or_none, main_process_decides
from coreg.run.epoch import judge
from coreg.run.job import open_run
from coreg.run.networks import finish_networks
from coreg.run.task import Task, prepare
from coreg.run.training import build_optimizer, build_students, placed
from coreg.views.order import ShuffledRows


def teacher_of(task: Task[DistillOptions]) -> tuple[np.ndarray, str]:
    """The teacher's probabilities of the training images, (N, C), and in words what they are.

    The store keeps the mean over templates. Those of the first one alone are scored anew from the stored features; where
    the annotator cannot be loaded, its vote has to do. Labels that a person gave stand in for either.
    """
    store, rows, n_classes = task.store, task.data.samples.numpy(), len(task.store.class_names)
    description = "mean of the probabilities over all templates"
    if task.method.teacher == "averaged":
        probs = store.probs()[rows]
    else:
        try:
            probs = single_template_probabilities(store, task.accelerator.device)[rows]
            description = "probabilities under the first template"
        except UserError as error:
            votes = store.votes()[rows, 0]
            # no vote is no opinion
            probs = np.where(votes[:, None] < 0, 1 / n_classes, votes[:, None] == np.arange(n_classes))
            description = f"votes of the first template, because {error}"
    given = task.weak.certain
    probs[given] = task.weak.known[given, None] == np.arange(n_classes)
    return probs, description


def make_batch(task: Task[DistillOptions], teacher: Tensor, rows: np.ndarray, epoch: int) -> DistillBatch:
    """This process's share of the global batch `rows`, as the images are seen in an epoch."""
    my_rows = rows[my_slice(len(rows))]
    images = task.data.inputs(task.method.view, my_rows, ("distill", epoch, 0))
    return DistillBatch(images, teacher[task.data.places(my_rows)], len(rows))


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, train, report."""
    job, image_options, method = read_settings(argv)
    with open_run(
        "baselines/distill.py", argv, (job, image_options, method), annotate_digits, f"runs/kd_{method.teacher}"
    ) as run:
        all_or_none(run.accelerator, run.store.need_annotator)
        task = prepare(run, method)
        probs, description = main_process_decides(run.accelerator, lambda: teacher_of(task))
        teacher = torch.from_numpy(probs).to(run.accelerator.device, task.data.dtype)
        taught = np.concatenate([np.flatnonzero(task.weak.usable), task.repeated])
        nets = build_students(task, projection_dim=1, count=1)
        learner = placed(DistillLearner(nets[0], method.kd_temperature), run.accelerator, job)
        training = run.begin([learner], [build_optimizer(nets[0], job)])

        for epoch in run.epochs(training, "distillation"):
            lr = job.cosine_lr(epoch)
            order = ShuffledRows(taught, job.batch_size, (job.seed, "distill", epoch, 0))
            task.read_ahead(training.step, order)
            for step in run.steps(training, order.per_round):
                training.learn(make_batch(task, teacher, order.batch(step), epoch), lr)
            run.log(training, {"lr": lr} | judge(task, training))

        run.accelerator.print(f"Teacher: {printable(description)}.")
        finish_networks(run, task, training, nets, NAMES[method.teacher], teacher=description)


if __name__ == "__main__":
    main()
