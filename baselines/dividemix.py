"""DivideMix on the annotator's single labels: two networks, co-division and MixUp, without candidate sets.

    accelerate launch baselines/dividemix.py                                        # built-in digits
    accelerate launch baselines/dividemix.py --annotations ann --labels_from single --output_dir runs/dividemix

The run folder is the job: the same command again goes on where it stopped, and a finished run says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from coreg.errors import exits_with_one_line
from coreg.learn.dividemix_options import OFFICIAL, DivideMixOptions
from coreg.network_options import ImageConfig
from coreg.run.settings import check_warm_up, official, preset_fields, read_student
from coreg.settings import JobConfig

NAMES = {"single": "DivideMix, single template", "averaged": "DivideMix, averaged"}


@exits_with_one_line
def read_settings(argv: Sequence[str] | None = None) -> tuple[JobConfig, ImageConfig, DivideMixOptions]:
    """Preset, recipe and command line, checked."""
    job, image_options, method = read_student(
        argv,
        "baselines/dividemix.py",
        __doc__,
        DivideMixOptions,
        preset=lambda job, image_options, method: official(OFFICIAL, job.dataset, method.preset)[1],
    )
    check_warm_up(method.warmup_epochs, job.epochs)
    return job, image_options, method


if __name__ == "__main__":
    read_settings()  # faults in them are reported before the imports below, which take seconds

import dataclasses

import numpy as np
import torch

from annotate_vlm import annotate_digits
from coreg.learn.dividemix import DivideMixLearner
from coreg.learn.division import Division, Predicted, division_loss
from coreg.learn.tables import every_row, held, log_probabilities, owned, rows_here, rows_like
from coreg.learn.two_nets import Verdict
from coreg.run.epoch import begin_paired, co_train_batches, division_of, hand_over, judge, warm_up
from coreg.run.job import open_run
from coreg.run.networks import finish_networks
from coreg.run.task import Task, finite, predict, prepare
from coreg.run.training import Training, build_students
from coreg.weak.noise import uniforms


def one_label_each(task: Task[DivideMixOptions]) -> Task[DivideMixOptions]:
    """The task with one label an image for a candidate set, or none: images without one are no part of warm-up.

    It is what the annotator names under its first template or on average, or one of the candidates where sets were drawn; a
    label that a person gave stands in for it. What `--prefilter` dropped is no label.
    """
    rows, named = task.data.samples.numpy(), task.annotator
    if task.store.drawn:
        draws = uniforms(task.job.seed, "label", rows, task.weak.table.shape[1])
        named = np.where(task.weak.table, draws, -1).argmax(axis=1)
    elif task.method.labels_from == "single":
        named = task.store.votes()[rows, 0].astype(np.int64)
    if task.job.prefilter != "none":  # a label that was dropped from its set is none
        named = np.where((named >= 0) & task.weak.table[np.arange(len(named)), named], named, -1)
    named = np.where(task.weak.certain, task.weak.known, np.where(task.weak.usable, named, -1))
    labels = named[:, None] == np.arange(len(task.store.class_names))
    table, device = torch.from_numpy(labels), task.accelerator.device
    table = owned(table, device) if task.sharded else table.to(device)
    weak = dataclasses.replace(task.weak, table=labels, usable=named >= 0)
    return dataclasses.replace(task, weak=weak, table=table)


def divide_by(task: Task[DivideMixOptions], training: Training, number: int) -> tuple[Division, Verdict, Predicted]:
    """Let network `number` (0 or 1) split the training set; also gives what it predicts."""
    logits, _ = predict(training.nets[number], task.data, "plain", (), 4 * task.job.batch_size, task.sharded)
    network = finite(task, logits, number, training.epoch)
    table, losses = task.weak.table[rows_here(logits)], np.zeros(len(held(logits)))
    for part, log_p in log_probabilities(logits):
        losses[part] = division_loss(log_p, table[part])
    division = division_of(task, training, number, every_row(losses, logits))
    weight = torch.from_numpy(division.weight).to(task.accelerator.device, task.data.dtype)
    return division, Verdict(weight, rows_like(task.table, held(task.table).to(task.data.dtype)), division.trusted), network


def learning_rate(job: JobConfig, schedule: str, epoch: int) -> float:
    """Of an epoch: `cosine` to the floor, or `step`: a tenth in the second half."""
    if schedule == "cosine":
        return job.cosine_lr(epoch)
    return job.lr * (0.1 if 2 * epoch >= job.epochs else 1.0)


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, train, report."""
    job, image_options, method = read_settings(argv)
    with open_run(
        "baselines/dividemix.py",
        argv,
        (job, image_options, method),
        annotate_digits,
        f"runs/dividemix_{method.labels_from}",
    ) as run:
        fields = preset_fields(run, OFFICIAL, "DivideMix", method)
        task = prepare(run, method)
        noisy = one_label_each(task)
        # two networks of one architecture with different initialisation
        nets = build_students(task, projection_dim=1, count=2)
        training = begin_paired(run, task, [DivideMixLearner(net, method) for net in nets])
        divisions = training.divisions

        for epoch in run.epochs(training, "DivideMix"):
            lr = learning_rate(job, method.lr_schedule, epoch)
            if epoch < method.warmup_epochs:
                for _ in training.turns():  # on the labels as they are
                    warm_up(run, noisy, training, lr, method.train_view, np.ones(len(task.data.samples), dtype=bool))
            else:
                if not divisions.verdicts:  # a job that goes on within an epoch has them
                    hand_over(noisy, training, [divide_by(noisy, training, number) for number in (0, 1)])
                for _ in training.turns():  # on the split that the other network made
                    verdict = divisions.verdicts[1 - training.number]
                    for batch in co_train_batches(run, noisy, training, verdict, view=method.train_view):
                        training.learn(batch, lr)
            run.log(training, divisions.finish_epoch() | {"lr": lr} | judge(task, training))

        finish_networks(run, task, training, nets, NAMES[method.labels_from], **fields)


if __name__ == "__main__":
    main()
