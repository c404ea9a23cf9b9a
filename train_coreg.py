"""Train two small networks together on the noisy candidate sets that a vision-language model gave to images.

    accelerate launch train_coreg.py                                # built-in digits, annotated by a built-in tiny CLIP
    accelerate launch train_coreg.py --annotations ann --output_dir runs/a
    accelerate launch --config_file accelerate_configs/cpu.yaml train_coreg.py --annotations ann --recipe folder

The run folder is the job: the same command again goes on where it stopped, and a finished run says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

from coreg.config import parse
from coreg.errors import UserError, exits_with_one_line
from coreg.learn.options import PRESETS, CoRegOptions
from coreg.settings import ImageConfig, JobConfig, check, check_coreg, check_look
from coreg.weak.rules import parse_rule


@exits_with_one_line
def read_settings(argv: Sequence[str]) -> tuple[JobConfig, ImageConfig, CoRegOptions]:
    """What the recipe and the command line say, checked."""
    own_images = any(word.split("=")[0] == "--annotations" for word in argv)
    job, look, method = parse(
        JobConfig,
        ImageConfig,
        CoRegOptions,
        argv=argv,
        default_recipe="folder" if own_images else "digits",
        presets=PRESETS,
        prog="train_coreg.py",
        description=__doc__,
    )
    check(job)
    check_look(look)
    check_coreg(method, job.epochs)
    parse_rule(job.candidates)
    return job, look, method


if __name__ == "__main__":
    read_settings(sys.argv[1:])  # what is wrong with them is told before the imports below, which take seconds

import numpy as np
import torch

from annotate_vlm import annotate_digits
from coreg.learn.coreg import CoRegBatch, CoRegLearner, WarmUpBatch, cosine_lr, ramp
from coreg.learn.division import Division, align, divide, division_loss
from coreg.learn.memory import Prototypes
from coreg.learn.pseudo import rescale
from coreg.process import main_process_decides
from coreg.report.metrics import consensus, division_health
from coreg.report.report import summary
from coreg.run.batches import Verdict, co_train_batch, warm_up_batch
from coreg.run.epoch import train_epoch
from coreg.run.job import open_run
from coreg.run.results import finish
from coreg.run.task import Task, predict, prepare
from coreg.run.training import Training, assemble, build_networks
from coreg.views.order import ShuffledRows, n_batches


def divide_by(task: Task[CoRegOptions], training: Training, number: int) -> tuple[Division, Verdict, np.ndarray]:
    """Let network `number` (0 or 1) split the training set; also gives its (N, C) log probabilities before alignment."""
    method = task.method
    net, size = training.nets[number], 4 * task.job.batch_size
    logits, features = predict(net, task.data, method.division_view, ("division", training.epoch, number), size)
    log_p = torch.log_softmax(logits.double(), dim=1).cpu().numpy()
    if not np.isfinite(log_p).all():
        raise UserError(
            f"network {number + 1} predicts no numbers any more in epoch {training.epoch + 1}; start anew in another "
            f"--output_dir with a smaller --lr (now {task.job.lr}); the checkpoints before it are kept",
            told=not task.accelerator.is_main_process,
        )
    aligned = log_p if method.alignment == "none" else align(log_p, task.prior)
    history = [*training.losses[number], division_loss(aligned, task.candidates)][-method.history :]
    training.losses[number] = history
    smallest = min(task.job.batch_size, len(task.usable))
    fitted = task.usable & (task.known < 0)
    # fitted on one process and sent to the others: two fits might differ in the last bit, and then in a whole image
    division = main_process_decides(
        task.accelerator,
        lambda: divide(np.stack(history), fitted, task.job.seed, method.threshold, smallest, method.monotone),
    )
    # a person's labels are trusted whatever their loss
    division.weight[task.known >= 0], division.trusted[task.known >= 0] = 1.0, True
    targets = rescale(torch.from_numpy(np.exp(aligned)), torch.from_numpy(task.candidates))
    like = {"device": task.accelerator.device, "dtype": task.data.dtype}
    verdict = Verdict(torch.from_numpy(division.weight).to(**like), targets.to(**like), division.trusted)
    if method.guesses == "epoch":
        again, _ = predict(net, task.data, "weak", ("guess", training.epoch, number), size)
        verdict.guess, verdict.features = (logits.softmax(1) + again.softmax(1)) / 2, features
    return division, verdict, log_p


def warm_up(task: Task[CoRegOptions], training: Training) -> tuple[int, Callable[[int], WarmUpBatch]]:
    """Steps of the present network's warm-up epoch and how to make each one's batch.

    Images that no template could name teach nothing and are left out.
    """
    key = (training.epoch, training.number)
    rows = ShuffledRows(np.flatnonzero(task.usable), 2 * task.job.batch_size, (task.job.seed, "warm-up", *key))
    full = task.candidates.all(axis=1) & task.method.skip_full_sets

    def batch(step: int) -> WarmUpBatch:
        chosen = rows.batch(step)
        informative = int((~full[chosen]).sum())
        return warm_up_batch(task.data, chosen, task.table, key, task.method.warmup_view, informative)

    return rows.per_round, batch


def co_train(task: Task[CoRegOptions], training: Training) -> tuple[int, Callable[[int], CoRegBatch]]:
    """Steps of the present network's epoch on the split that the other one made, and how to make each one's batch."""
    epoch, number, job, method = training.epoch, training.number, task.job, task.method
    own, verdict = training.verdicts[number], training.verdicts[1 - number if method.co_pseudo_labels else number]
    key = (job.seed, epoch, number)
    trusted = np.concatenate([np.flatnonzero(verdict.trusted), task.repeated])
    x = ShuffledRows(trusted, job.batch_size, ("P", *key))
    u = ShuffledRows(np.flatnonzero(~verdict.trusted & method.use_unlabeled), job.batch_size, ("U", *key))
    labelled = ShuffledRows(task.extra, job.batch_size, ("labelled", *key))
    gate_epoch = method.warmup_epochs + method.contrast_after + 1
    # keys made long before the gate opens will have left the queue by then
    fill_queue = epoch >= gate_epoch - n_batches(method.queue_size, len(x.rows))

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
            gate=epoch >= gate_epoch,
            fill_queue=fill_queue,
            own=own if method.guesses == "epoch" else None,
            labelled=(extra, task.known[extra]) if len(extra) else None,
        )

    return x.per_round, batch


def divide_training_set(task: Task[CoRegOptions], training: Training) -> None:
    """Both networks divide before either of them trains."""
    if task.method.key_reset == "epoch":
        for learner in training.learners:
            learner.reset_keys()
    divisions, verdicts, log_ps = zip(*(divide_by(task, training, number) for number in (0, 1)))
    training.verdicts, training.weights = list(verdicts), [division.weight for division in divisions]
    names = task.store.class_names
    training.partial = division_health(divisions, log_ps, task.candidates, task.zero_shot, task.labels, names)
    training.consider(consensus(log_ps))


def one_epoch(
    task: Task[CoRegOptions], training: Training, at_boundary: Callable[[], None], advance: Callable[[float], None]
) -> dict[str, float]:
    """The rest of the present epoch: warm up, or divide and co-train, then agree on statistics and test.

    Gives the epoch's curves. `at_boundary` is called between steps; whatever it saves, this function can go on from.
    """
    job = task.job
    rate = cosine_lr(training.epoch, job.lr, job.lr_floor, job.lr_horizon or job.epochs)
    warming_up = training.epoch < task.method.warmup_epochs
    if not warming_up and not training.verdicts:
        divide_training_set(task, training)
    steps = partial(warm_up if warming_up else co_train, task, training)
    # guesses made once an epoch take with them the passes that showed batch normalisation unmixed images
    mixed_alone = not warming_up and task.method.guesses == "epoch" and task.method.mixup_alpha > 0
    return train_epoch(task, training, rate, steps, at_boundary, advance, renew_statistics=mixed_alone)


def build_training(task: Task[CoRegOptions]) -> Training:
    """Two networks of one architecture with different initialisation, which share prototypes, and what trains them."""
    method, n_classes = task.method, len(task.store.class_names)
    nets = build_networks(task.accelerator, task.job, task.look, n_classes, method.projection_dim, count=2)
    prototypes = Prototypes(n_classes, method.projection_dim)
    learners = [CoRegLearner(net, prototypes, method) for net in nets]
    for learner, peer in zip(learners, reversed(nets)):
        learner.set_peer(peer)
    return assemble(task.accelerator, task.job, nets, learners)


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, train, report."""
    argv = list(sys.argv[1:] if argv is None else argv)
    job, look, method = read_settings(argv)
    with open_run("train_coreg.py", argv, (job, look, method), annotate_digits, "runs/demo") as run:
        if run is None:
            return
        task = prepare(run, method, method.alignment)
        training = build_training(task)
        run.begin(training)
        run.train(training, partial(one_epoch, task, training), "Co-Reg")
        report = finish(run, task, training, "Co-Reg", preset=method.preset)
        run.accelerator.print(summary(report, run.folder.root))


if __name__ == "__main__":
    main()
