"""Train one small network on candidate sets with a partial-label method: the baselines that Co-Reg is compared with.

    accelerate launch baselines/pll.py --method proden                          # built-in digits
    accelerate launch baselines/pll.py --method pico --annotations ann --recipe cifar10 --output_dir runs/pico
    accelerate launch baselines/pll.py --method alim_scale --preset official --noise_rate 0.05 --annotations ann

The run folder is the job: the same command again goes on where it stopped, and a finished run says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from coreg.config import parse
from coreg.errors import UserError, exits_with_one_line
from coreg.learn.options import CoRegOptions
from coreg.learn.partial_options import OFFICIAL, PartialOptions
from coreg.settings import ImageConfig, JobConfig, check, check_look, lacks_official, official
from coreg.weak.rules import parse_rule

NAMES = {
    "cc": "CC",
    "rc": "RC",
    "proden": "PRODEN",
    "lws": "LWS",
    "lwc": "LWC",
    "cr_dpll": "CR-DPLL",
    "pico": "PiCO",
    "pico_plus": "PiCO+",
    "irnet": "IRNet",
    "alim_onehot": "ALIM-Onehot",
    "alim_scale": "ALIM-Scale",
    "supervised": "Supervised",
}


def check_partial(method: PartialOptions) -> None:
    """Refuse hyper-parameters that the methods cannot be trained with.

    Raises:
        UserError: the first one found.
    """
    momenta = method.confidence_momentum
    if len(momenta) != 2:
        raise UserError(f"--confidence_momentum is {' '.join(map(str, momenta))}; give two numbers: first and last")


@exits_with_one_line
def read_settings(argv: Sequence[str]) -> tuple[JobConfig, ImageConfig, PartialOptions]:
    """The settings of the recipe, of the method's authors with `--preset official`, and of the command line, in this order.

    Which of the authors' settings depends on the data set that the recipe names. A recipe holds Co-Reg's optimiser and
    schedule beside what belongs to the data; the authors' settings replace those.
    """
    own_images = any(word.split("=")[0] == "--annotations" for word in argv)

    def fill(arguments: Sequence[str]) -> tuple[Any, ...]:
        return parse(
            JobConfig,
            ImageConfig,
            PartialOptions,
            argv=arguments,
            default_recipe="folder" if own_images else "digits",
            others=(CoRegOptions,),
            prog="baselines/pll.py",
            description=__doc__,
        )

    settings = fill(argv)
    if settings[2].preset == "official":
        _, values = official(OFFICIAL[settings[2].method], settings[0].dataset)
        settings = fill([*values, *argv])
    job, look, method = settings
    check(job)
    check_look(look)
    check_partial(method)
    parse_rule(job.candidates)
    return job, look, method


if __name__ == "__main__":
    read_settings(sys.argv[1:])  # what is wrong with them is told before the imports below, which take seconds

import dataclasses

import numpy as np
import torch
from torch import Tensor

from annotate_vlm import annotate_digits
from coreg.data.keyed import keyed_generator
from coreg.learn.collective import rank_and_world, share
from coreg.learn.coreg import cosine_lr
from coreg.learn.partial import METHODS
from coreg.learn.partial.learner import PartialBatch, PartialLearner
from coreg.learn.partial.method import PartialMethod, Step
from coreg.learn.pseudo import mix
from coreg.report.report import summary
from coreg.run.epoch import train_epoch
from coreg.run.job import open_run
from coreg.run.results import finish
from coreg.run.task import Task, prepare
from coreg.run.training import Training, assemble, build_networks
from coreg.views.order import ShuffledRows
from coreg.weak.rules import candidate_sets, partial_accuracy


def learning_rate(job: JobConfig, schedule: str, epoch: int) -> float:
    """Of an epoch: `cosine` to the floor, `halving` five times over the epochs, or `steps`: a tenth at 1/2 and at 3/4."""
    if schedule == "cosine":
        return cosine_lr(epoch, job.lr, job.lr_floor, job.lr_horizon or job.epochs)
    progress = epoch / job.epochs
    return job.lr * (0.5 ** (5 * progress) if schedule == "halving" else 0.1 ** ((progress >= 0.5) + (progress >= 0.75)))


def noise_rate(task: Task[PartialOptions]) -> tuple[float, str]:
    """The share of candidate sets that miss the truth, -1 where nobody knows, and in words where it comes from.

    Images that a person labelled are a sample of all: what share of them the annotator's sets miss.
    """
    if task.method.noise_rate >= 0:
        return task.method.noise_rate, "given"
    offered = candidate_sets(task.store, task.job.candidates)[task.data.samples.numpy()]
    found = partial_accuracy(offered, task.known)
    if found is not None:
        return 1 - found, f"counted on {(task.known >= 0).sum()} labelled images"
    return -1.0, f"unknown; classes outside the sets weigh {task.method.importance}"


def build_method(task: Task[PartialOptions]) -> tuple[PartialMethod, dict[str, Any]]:
    """The method with its state on the training images, and what the report has to say about it."""
    options, told = task.method, {"preset": task.method.preset}
    if options.preset == "official":
        told["official_for"], _ = official(OFFICIAL[options.method], task.job.dataset)
    sets = task.candidates
    if options.method == "supervised":
        sets = task.labels[:, None] == np.arange(sets.shape[1])
        sets[task.labels < 0] = True  # left out of training
    if options.method.startswith("alim"):
        rate, source = noise_rate(task)
        options, told["noise_rate"] = dataclasses.replace(options, noise_rate=rate), {"value": rate, "source": source}
    method = METHODS[options.method](options)
    method.init(torch.from_numpy(sets), torch.from_numpy(task.known >= 0), task.data.dtype)
    return method, told


def mix_views(
    task: Task[PartialOptions], kind: str, first: Tensor, rows: np.ndarray, others: np.ndarray, key: tuple[int, int]
) -> dict[str, Any]:
    """The fields of a batch about MixUp: this process's share of the first views, mixed with partners.

    Lambda and partners are drawn for the global batch; the view of a partner that another process holds is made again here
    from its key.

    Args:
        kind: `batch` or `epoch`, as in `Passes`. first: (l, c, H, W). rows: the global batch. others: as many rows of a
            second pass over the training set.
    """
    draw, alpha, data = keyed_generator(task.job.seed, "mixup", *key), task.method.mixup_alpha, task.data
    kept = float(draw.beta(alpha, alpha)) if alpha else 1.0
    kept = max(kept, 1 - kept)
    partner = (others if kind == "epoch" else draw.permutation(len(rows)))[share(len(rows))]
    where = torch.from_numpy(partner).to(data.device, non_blocking=True)
    if kind == "epoch":
        views = data.view(task.method.weak_view, partner, ("partner", *key))
    elif rank_and_world()[1] == 1:
        views = first[where]
    else:
        views = data.view(task.method.weak_view, rows[partner], ("0", *key))
    return {"mixed": mix(first, views, kept), "partner": where, "share_kept": kept}


def steps_of(task: Task[PartialOptions], training: Training) -> tuple[int, Callable[[int], PartialBatch]]:
    """Steps of the present epoch and how to make each one's batch.

    Images that no template could name teach nothing and are left out; so are, in supervised training, those without label.
    """
    job, options, data, method = task.job, task.method, task.data, training.learners[0].method
    usable = task.labels >= 0 if options.method == "supervised" else task.usable
    order = np.concatenate([np.flatnonzero(usable), task.repeated])
    key = (job.seed, training.epoch)
    rows, others = (ShuffledRows(order, job.batch_size, (name, *key)) for name in ("train", "partner"))
    labelled = ShuffledRows(task.extra, job.batch_size, ("labelled", *key))
    now = Step(training.epoch, job.epochs)
    passes, kinds = method.passes(now), {"weak": options.weak_view, "strong": options.strong_view}

    def batch(step: int) -> PartialBatch:
        chosen, extra, at = rows.batch(step), labelled.batch(step), (training.epoch, step)
        mine = chosen[share(len(chosen))]
        pixels = data.pixels(mine)

        def view(name: str, kind: str) -> Tensor:
            return data.view(kinds[kind], mine, (name, *at), pixels)

        made = PartialBatch(
            index=torch.from_numpy(chosen).to(data.device, non_blocking=True),
            step=now,
            views=tuple(view(str(number), kind) for number, kind in enumerate(passes.views)),
            key=view("key", passes.key) if passes.key else None,
            glance=view("glance", passes.glance) if passes.glance else None,
        )
        if passes.mixup != "none":
            mixed = mix_views(task, passes.mixup, made.views[0], chosen, others.batch(step), at)
            made = dataclasses.replace(made, **mixed)
        if len(extra):
            held = extra[share(len(extra))]
            made.labelled = (
                data.view(options.weak_view, held, ("labelled", *at)),
                torch.from_numpy(task.known[held]).to(data.device, non_blocking=True),
            )
            made.n_labelled = len(extra)
        return made

    return rows.per_round, batch


def one_epoch(
    task: Task[PartialOptions], training: Training, at_boundary: Callable[[], None], advance: Callable[[float], None]
) -> dict[str, float]:
    """The rest of the present epoch; gives its curves.

    Methods that read a batch again do so once the weights have moved, before anything is saved.
    """
    now, learner = Step(training.epoch, task.job.epochs), training.learners[0]
    waiting: list[PartialBatch] = []

    def steps() -> tuple[int, Callable[[int], PartialBatch]]:
        count, make = steps_of(task, training)

        def batch(step: int) -> PartialBatch:
            waiting.append(make(step))
            return waiting[-1]

        return count, batch

    def behind_step() -> None:
        with task.accelerator.autocast():
            for batch in waiting:
                learner.after_step(batch)
        waiting.clear()
        at_boundary()

    rate = learning_rate(task.job, task.method.schedule, training.epoch)
    curves = train_epoch(task, training, rate, steps, behind_step, advance)
    curves |= {f"method/{name}": value for name, value in learner.method.finish_epoch(now).items()}
    return curves


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, train, report."""
    argv = list(sys.argv[1:] if argv is None else argv)
    job, look, method = read_settings(argv)
    with open_run("baselines/pll.py", argv, (job, look, method), annotate_digits, f"runs/{method.method}") as run:
        if run is None:
            return
        if method.preset == "official" and (
            note := lacks_official(OFFICIAL[method.method], job.dataset, NAMES[method.method])
        ):
            run.accelerator.print(note)
        task = prepare(run, method)
        if method.method == "supervised":
            if (task.labels < 0).all():
                raise UserError(
                    f"supervised training needs true labels, and the store {run.store.root} has none",
                    told=not run.accelerator.is_main_process,
                )
            task = dataclasses.replace(task, known=task.labels)
        state, told = build_method(task)
        nets = build_networks(run.accelerator, job, look, len(run.store.class_names), method.projection_dim, count=1)
        training = assemble(run.accelerator, job, nets, [PartialLearner(nets[0], state)])
        run.begin(training)
        run.train(training, partial(one_epoch, task, training), NAMES[method.method])
        report = finish(run, task, training, NAMES[method.method], **told)
        run.accelerator.print(summary(report, run.folder.root))


if __name__ == "__main__":
    main()
