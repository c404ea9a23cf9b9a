"""Train one small network on candidate sets with a partial-label method: the baselines that Co-Reg is compared with.

    accelerate launch baselines/pll.py --method proden                          # built-in digits
    accelerate launch baselines/pll.py --method pico --annotations ann --recipe cifar10 --output_dir runs/pico
    accelerate launch baselines/pll.py --method alim_scale --preset official --noise_rate 0.05 --annotations ann

The run folder is the job: the same command again goes on where it stopped, and a finished run says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coreg.errors import UserError, exits_with_one_line
from coreg.learn.partial_options import NAMES, OFFICIAL, OPTIONS, PartialOptions
from coreg.network_options import ImageConfig
from coreg.run.settings import official, preset_fields, read_student
from coreg.settings import JobConfig


@exits_with_one_line
def read_settings(argv: Sequence[str] | None = None) -> tuple[JobConfig, ImageConfig, PartialOptions]:
    """Preset, recipe and command line, checked; the options are those of the method."""
    job, image_options, method = read_student(
        argv,
        "baselines/pll.py",
        __doc__,
        preset=lambda job, image_options, method: official(OFFICIAL[method.method], job.dataset, method.preset)[1],
        kinds=("method", OPTIONS),
    )
    for name in ("confidence_momentum", "selected", "prior_rate"):
        pair = getattr(method, name, [0, 0])
        if len(pair) != 2:
            raise UserError(f"--{name} is {' '.join(map(str, pair))}; give two numbers: first and last")
    return job, image_options, method


if __name__ == "__main__":
    read_settings()  # faults in them are reported before the imports below, which take seconds

import dataclasses

import numpy as np
import torch
from torch import Tensor

from annotate_vlm import annotate_digits
from coreg.learn.collective import my_slice
from coreg.learn.partial import METHODS
from coreg.learn.partial.method import PartialBatch, PartialMethod, Passes
from coreg.learn.pseudo import draw_mixup, mix
from coreg.learn.schedules import Step
from coreg.run.epoch import accuracy_on_test, end_steps
from coreg.run.job import open_run
from coreg.run.loop import Run
from coreg.run.networks import finish_networks
from coreg.run.task import Task, predict, prepare
from coreg.run.training import Training, build_optimizer, build_students, placed
from coreg.views.order import ShuffledRows
from coreg.weak.rules import candidate_sets, partial_accuracy


def learning_rate(job: JobConfig, schedule: str, epoch: int) -> float:
    """Of an epoch: `cosine` to the floor, `halving` five times over the epochs, or `steps`: a tenth at 1/2 and at 3/4."""
    if schedule == "cosine":
        return job.cosine_lr(epoch)
    progress = epoch / job.epochs
    return job.lr * (0.5 ** (5 * progress) if schedule == "halving" else 0.1 ** ((progress >= 0.5) + (progress >= 0.75)))


def noise_rate(task: Task[PartialOptions]) -> tuple[float, str]:
    """The share of candidate sets that miss the truth, -1 where nobody knows, and in words where it comes from.

    Images that a person labelled are a sample of all: what share of them the annotator's sets miss. What a pre-filter would
    leave of their sets is not counted, because it may have been fitted to them.
    """
    if task.method.noise_rate >= 0:
        return task.method.noise_rate, "given"
    if task.job.prefilter != "none":
        return -1.0, f"unknown after --prefilter; classes outside the sets weigh {task.method.importance}"
    offered = candidate_sets(task.store, task.job.candidates)[task.data.samples.numpy()]
    covered = partial_accuracy(offered, task.weak.known)
    if covered is not None:
        return 1 - covered, f"counted on {task.weak.certain.sum()} labelled images"
    return -1.0, f"unknown; classes outside the sets weigh {task.method.importance}"


def build_method(task: Task[PartialOptions]) -> tuple[PartialMethod, dict[str, Any]]:
    """The method with its network and its state on the training images, on the device, and fields of the report."""
    options, fields, accelerator = task.method, {}, task.accelerator
    if options.method.startswith("alim"):
        rate, source = noise_rate(task)
        options, fields["noise_rate"] = dataclasses.replace(options, noise_rate=rate), {"value": rate, "source": source}
    (net,) = build_students(task, options.projection_dim, count=1)
    if METHODS[options.method].linear_head and not net.linear_head:
        raise UserError(
            f"--method {options.method} needs a classifier that is one linear layer on pooled features, and that of "
            f"{task.image_options.backbone} is another; take another --backbone, such as resnet18",
            silent=not accelerator.is_main_process,
        )
    if METHODS[options.method].prediction:
        fields["prediction"] = METHODS[options.method].prediction
    candidates, certain = torch.from_numpy(task.weak.table), torch.from_numpy(task.weak.certain)
    method = METHODS[options.method](net, candidates, options, certain, task.data.dtype)
    return placed(method, accelerator, task.job), fields


def make_batch(
    task: Task[PartialOptions], rows: np.ndarray, passes: Passes, now: Step, at: tuple[int, int]
) -> PartialBatch:
    """This process's share of the global batch `rows`, with the views that the method's `passes` ask for.

    Args:
        at: epoch and step, which name the views.
    """
    data, kinds = task.data, {"weak": task.method.weak_view, "strong": task.method.strong_view}
    my_rows = rows[my_slice(len(rows))]
    pixels = data.pixels(my_rows)

    def view(name: str, kind: str) -> Tensor:
        made = data.view if hasattr(task.method, "mixup_alpha") else data.inputs  # pixels are mixed, not features
        return made(kinds[kind], my_rows, (name, *at), pixels)

    return PartialBatch(
        index=data.places(rows),
        step=now,
        views=tuple(view(str(number), kind) for number, kind in enumerate(passes.views)),
        key=view("key", passes.key) if passes.key else None,
        glance=view("glance", passes.glance) if passes.glance else None,
        draws=(task.job.seed, "mixup", *at),
    )


def mix_first_view(
    task: Task[PartialOptions], batch: PartialBatch, kind: str, rows: np.ndarray, others: np.ndarray, at: tuple[int, int]
) -> None:
    """Add the first view mixed with partners to a batch; lambda and partners are drawn for the global one.

    Args:
        kind: `batch` or `epoch`, as in `Passes`. rows: the global batch. others: as many rows of a second pass over the
            training set.
    """
    data, view, my_part = task.data, task.method.weak_view, my_slice(len(rows))
    kept, order = draw_mixup(task.method.mixup_alpha, len(rows), (task.job.seed, "mixup", *at))
    if kind == "epoch":
        partner = others[my_part]
        views = data.view(view, partner, ("partner", *at))
    else:
        partner = order[my_part]
        views = data.partners(batch.views[0], [(view, rows, ("0", *at))], partner)
    batch.mixed, batch.partner, batch.share_kept = mix(batch.views[0], views, kept), data.places(partner), kept


def train(run: Run, task: Task[PartialOptions], training: Training, lr: float) -> None:
    """Train for an epoch; images that no template could name teach nothing and are left out."""
    job, options, method, epoch = task.job, task.method, training.learners[0], training.epoch
    everyone = np.concatenate([np.flatnonzero(task.weak.usable), task.repeated])
    order, others = (ShuffledRows(everyone, job.batch_size, (name, job.seed, epoch)) for name in ("train", "partner"))
    labelled = ShuffledRows(task.extra, job.batch_size, ("labelled", job.seed, epoch))
    passes = method.passes(Step(epoch, job.epochs))

    def partners(step: int) -> np.ndarray:
        rows = order.batch(step)
        _, place = draw_mixup(options.mixup_alpha, len(rows), (job.seed, "mixup", epoch, step))
        return rows[place[my_slice(len(rows))]]

    orders = (order, labelled, others) if passes.mixup == "epoch" else (order, labelled)
    task.read_ahead(training.step, *orders, partners=partners if passes.mixup == "batch" else None)
    for step in run.steps(training, order.per_round):
        rows, at = order.batch(step), (epoch, step)
        batch = make_batch(task, rows, passes, Step(epoch, job.epochs, step, order.per_round), at)
        if passes.mixup != "none":
            mix_first_view(task, batch, passes.mixup, rows, others.batch(step), at)
        batch.labelled, batch.n_labelled = task.labelled(labelled.batch(step), options.weak_view, at)
        training.learn(batch, lr)
        with run.accelerator.autocast():
            method.after_step(batch, training.moves)


def restart(task: Task[PartialOptions], training: Training) -> None:
    """Begin the next stage of the method: its network and its optimiser are as they were before the first step."""
    method = training.learners[0]
    (fresh,) = build_students(task, task.method.projection_dim, count=1)
    method.net.load_state_dict(fresh.state_dict())
    training.optimizers[0].state.clear()
    method.restart()


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, train, report."""
    job, image_options, options = read_settings(argv)
    with open_run(
        "baselines/pll.py", argv, (job, image_options, options), annotate_digits, f"runs/{options.method}"
    ) as run:
        name = NAMES[options.method]
        fields = preset_fields(run, OFFICIAL[options.method], name, options)
        task = prepare(run, options)
        if options.method == "supervised":
            if (task.weak.truth < 0).all():
                raise UserError(
                    f"supervised training needs true labels, and the store {run.store.root} has none",
                    silent=not run.accelerator.is_main_process,
                )
            task = dataclasses.replace(task, weak=task.weak.revealed())
        method, more = build_method(task)
        training = run.begin([method], [build_optimizer(method.trained(), job)])

        for epoch in run.epochs(training, name):
            stage = method.stage(Step(epoch, job.epochs))
            if epoch and not stage.epoch and not training.step:
                restart(task, training)
            lr = learning_rate(dataclasses.replace(job, epochs=stage.epochs), options.schedule, stage.epoch)
            train(run, task, training, lr)
            end_steps(task, training)
            curves = {"lr": lr} | accuracy_on_test(task, [method.judged()])
            if method.surveys:
                method.survey(predict(method.net, task.data, "plain", (), 4 * job.batch_size)[0], Step(epoch, job.epochs))
            drawn = method.finish_epoch(Step(epoch, job.epochs))
            run.log(training, curves | {f"method/{key}": value for key, value in drawn.items()})

        finish_networks(run, task, training, [method.judged()], name, **fields, **more)


if __name__ == "__main__":
    main()
