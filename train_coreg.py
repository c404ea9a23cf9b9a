"""Train two small networks together on the noisy candidate sets that a vision-language model gave to images.

    accelerate launch train_coreg.py                                # built-in digits, annotated by a built-in tiny CLIP
    accelerate launch train_coreg.py --annotations ann --output_dir runs/a
    accelerate launch --config_file accelerate_configs/cpu.yaml train_coreg.py --annotations ann --recipe folder

The run folder is the job: the same command again goes on where it stopped, and a finished run says so.
"""

from __future__ import annotations

from collections.abc import Sequence

from coreg.errors import exits_with_one_line
from coreg.learn.options import PRESETS, CoRegOptions
from coreg.network_options import ImageConfig
from coreg.run.settings import check_warm_up, read_student
from coreg.settings import JobConfig


@exits_with_one_line
def read_settings(argv: Sequence[str] | None = None) -> tuple[JobConfig, ImageConfig, CoRegOptions]:
    """Preset, recipe and command line, checked."""
    job, image_options, method = read_student(
        argv, "train_coreg.py", __doc__, CoRegOptions, preset=lambda job, image_options, method: PRESETS[method.preset]
    )
    check_warm_up(method.warmup_epochs, job.epochs)
    return job, image_options, method


if __name__ == "__main__":
    read_settings()  # faults in them are reported before the imports below, which take seconds

import numpy as np
import torch

from annotate_vlm import annotate_digits
from coreg.learn.coreg import CoRegLearner
from coreg.learn.division import Division, Predicted, align, division_loss
from coreg.learn.memory import Prototypes
from coreg.learn.pseudo import rescale
from coreg.learn.tables import Table, every_row, held, log_probabilities, rows_here, rows_like
from coreg.learn.two_nets import Verdict
from coreg.report.metrics import consensus, prototype_health
from coreg.run.epoch import begin_paired, co_train_batches, count_statistics, division_of, hand_over, judge, warm_up
from coreg.run.job import open_run
from coreg.run.loop import Run
from coreg.run.networks import finish_networks
from coreg.run.task import Task, finite, predict, prepare
from coreg.run.training import Training, build_students
from coreg.views.order import n_batches


def divide_by(task: Task[CoRegOptions], training: Training, number: int) -> tuple[Division, Verdict, Predicted]:
    """Let network `number` (0 or 1) split the training set; also gives what it predicts before alignment."""
    method, epoch, net, size = task.method, training.epoch, training.nets[number], 4 * task.job.batch_size
    logits, features = predict(net, task.data, method.division_view, ("division", epoch, number), size, task.sharded)
    network = finite(task, logits, number, epoch)
    losses, targets = losses_and_targets(task, logits, network)
    division = division_of(task, training, number, losses, method.monotone)
    weight = torch.from_numpy(division.weight).to(task.accelerator.device, task.data.dtype)
    verdict = Verdict(weight, targets, division.trusted)
    if method.guesses == "epoch":
        again, _ = predict(net, task.data, "weak", ("guess", epoch, number), size, task.sharded)
        verdict.guess = rows_like(logits, (held(logits).softmax(1) + held(again).softmax(1)) / 2)
        verdict.features = features
    return division, verdict, network


def losses_and_targets(task: Task[CoRegOptions], logits: Table, network: Predicted) -> tuple[np.ndarray, Table]:
    """Division losses (N,) and targets (N, C) of logits (N, C), which predict `network`."""
    targets, candidates = torch.empty_like(held(logits)), task.weak.table[rows_here(logits)]
    losses = np.zeros(len(targets))
    for part, log_p in log_probabilities(logits):
        sets = candidates[part]
        aligned = log_p if task.method.alignment == "none" else align(log_p, task.prior, network.mean)
        losses[part] = division_loss(aligned, sets)
        targets[part] = rescale(torch.from_numpy(np.exp(aligned)), torch.from_numpy(sets)).to(targets)
    return every_row(losses, logits), rows_like(logits, targets)


def divide(task: Task[CoRegOptions], training: Training) -> None:
    """Both networks divide the training set before either of them trains."""
    if task.method.key_reset == "epoch":
        for learner in training.learners:
            learner.reset_keys()
    networks = hand_over(task, training, [divide_by(task, training, number) for number in (0, 1)])
    # both learners share them
    training.divisions.health |= prototype_health(training.learners[0].prototypes.value.cpu().numpy())
    training.divisions.consider(training.epoch, consensus(networks))


def co_train(run: Run, task: Task[CoRegOptions], training: Training, lr: float) -> None:
    """Train the present network for an epoch on the split that the other one made."""
    number, method = training.number, task.method
    own, verdict = (training.divisions.verdicts[of] for of in (number, 1 - number if method.co_pseudo_labels else number))
    gate_epoch, count = method.warmup_epochs + method.contrast_after + 1, int(verdict.trusted.sum()) + len(task.repeated)
    guessed = own if method.guesses == "epoch" else None
    for batch in co_train_batches(run, task, training, verdict, method.use_unlabeled, own=guessed):
        batch.gate = training.epoch >= gate_epoch
        # keys made long before the gate opens will have left the queue by then
        batch.fill_queue = training.epoch >= gate_epoch - n_batches(method.queue_size, count)
        training.learn(batch, lr)


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, train, report."""
    job, image_options, method = read_settings(argv)
    with open_run("train_coreg.py", argv, (job, image_options, method), annotate_digits, "runs/demo") as run:
        task = prepare(run, method, method.alignment)
        # two networks of one architecture with different initialisation, which share prototypes
        nets = build_students(task, method.projection_dim, count=2)
        prototypes = Prototypes(len(run.store.class_names), method.projection_dim)
        training = begin_paired(run, task, [CoRegLearner(net, prototypes, method) for net in nets])
        divisions = training.divisions
        informative = ~(task.weak.table.all(axis=1) & method.skip_full_sets)

        for epoch in run.epochs(training, "Co-Reg"):
            lr = job.cosine_lr(epoch)
            if epoch < method.warmup_epochs:
                for _ in training.turns():
                    warm_up(run, task, training, lr, method.warmup_view, informative)
            else:
                if not divisions.verdicts:  # a job that goes on within an epoch has them
                    divide(task, training)
                for _ in training.turns():
                    co_train(run, task, training, lr)
                if method.guesses == "epoch" and method.mixup_alpha > 0:
                    # without passes that show batch normalisation unmixed images
                    count_statistics(task, nets, epoch)
            run.log(training, divisions.finish_epoch() | {"lr": lr} | judge(task, training))

        finish_networks(run, task, training, nets, "Co-Reg", preset=method.preset)


if __name__ == "__main__":
    main()
