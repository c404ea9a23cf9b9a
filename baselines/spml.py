"""Train one small network on observed labels where an image has several: VLPL and what it is compared with.

    accelerate launch baselines/spml.py                                                      # built-in digits
    accelerate launch baselines/spml.py --annotations ann --method vlpl --output_dir runs/vlpl
    accelerate launch baselines/spml.py --annotations ann --method an --observed published --dataset voc --preset official
    accelerate launch baselines/spml.py --annotations ann --method vlpl --tags mine.csv       # a person's labels

The store is of images with several labels (docs/annotation_store.md); without one, pictures of two to four handwritten
digits are annotated. The run folder is the job: the same command again
goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from coreg.config import parse
from coreg.errors import UserError, exits_with_one_line
from coreg.learn.multi_options import NAMES, OFFICIAL, OPTIONS, MultiOptions, ROLEOptions
from coreg.learn.options import CoRegOptions
from coreg.network_options import ImageConfig, check_image_options
from coreg.run.settings import official, pixels_of_weights, preset_fields
from coreg.settings import JobConfig, TagJob


@exits_with_one_line
def read_settings(argv: Sequence[str] | None = None) -> tuple[TagJob, ImageConfig, MultiOptions]:
    """Preset, recipe and command line, checked; the options are those of the method."""
    job, image_options, method = parse(
        TagJob,
        ImageConfig,
        argv=argv,
        default_recipe=lambda typed: "folder" if "annotations" in typed else "digit_pictures",
        preset=lambda job, image_options, method: official(OFFICIAL[method.method], job.dataset, method.preset)[1],
        implied=pixels_of_weights,
        kinds=("method", OPTIONS),
        others=(CoRegOptions, JobConfig),
        prog="baselines/spml.py",
        description=__doc__,
    )
    check_image_options(image_options)
    if isinstance(method, ROLEOptions) and method.linear_epochs > job.epochs:
        raise UserError(f"--linear_epochs is {method.linear_epochs}, of {job.epochs} --epochs in all; give at most as many")
    return job, image_options, method


if __name__ == "__main__":
    read_settings()  # faults in them are reported before the imports below, which take seconds

import numpy as np
import torch

from annotate_vlm import annotate_digit_pictures
from coreg.learn.collective import my_slice
from coreg.learn.multi import METHODS
from coreg.learn.multi.best import BestEpoch
from coreg.learn.multi.method import MultiBatch, MultiMethod
from coreg.learn.schedules import Step
from coreg.run.epoch import end_steps
from coreg.run.job import open_run
from coreg.run.loop import Run
from coreg.run.tags import TagTask, finish_tags, judge_tags, predicted, prepare_tags
from coreg.run.task import pooled
from coreg.run.training import Training, build_networks, build_optimizer, placed
from coreg.views.order import ShuffledRows


def build_method(task: TagTask) -> tuple[MultiMethod, torch.optim.Optimizer]:
    """The method with its network and tables on the device, and its optimiser."""
    options, job, n_labels = task.method, task.job, len(task.store.class_names)
    (net,) = build_networks(task.accelerator, job, task.image_options, n_labels, 1, count=1)
    method = METHODS[options.method](net, task.weak, options, job.seed, task.data.dtype)
    if job.keep == "best" and "validation" in task.others and task.truth("validation").any():
        method.best = BestEpoch(net)
    method = placed(method, task.accelerator, job)
    optimizer = build_optimizer(method.net, job)
    if (speed := getattr(options, "head_speed", 1.0)) != 1:
        head = list(net.backbone.get_classifier().parameters())
        (group,) = optimizer.param_groups
        group["params"] = [weight for weight in group["params"] if all(weight is not other for other in head)]
        optimizer.add_param_group({"params": head, "lr": job.lr * speed})
    if tables := [weight for name, weight in method.named_parameters() if not name.startswith("net.")]:
        lr = job.lr * options.estimate_speed
        optimizer.add_param_group({"params": tables, "lr": lr, "weight_decay": 0.0})
    return method, optimizer


def keep_features(task: TagTask, method: MultiMethod, fixed: bool) -> None:
    """Let all images have the features of their plain views while the backbone does not change, or not have them."""
    for images in (task.data, *task.others.values()):
        if not fixed:
            images.features = None
        elif images.features is None:
            images.features = pooled(method.net, images, np.arange(len(images.samples)), 4 * task.job.batch_size)


def train(run: Run, task: TagTask, training: Training, lr: float, kind: str) -> None:
    """Train for an epoch on one view of a kind of every image."""
    job, epoch = task.job, training.epoch
    order = ShuffledRows(np.arange(len(task.data.samples)), job.batch_size, ("train", job.seed, epoch))
    now = Step(epoch, job.epochs)

    def my_rows(step: int) -> np.ndarray:
        rows = order.batch(step)
        return rows[my_slice(len(rows))]

    task.data.read_ahead(my_rows, range(training.step, order.per_round))
    for step in run.steps(training, order.per_round):
        rows = order.batch(step)
        view = task.data.inputs(kind, my_rows(step), ("0", epoch, step))
        training.learn(MultiBatch(task.data.places(rows), now, view), lr)


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, train, report."""
    job, image_options, options = read_settings(argv)
    settings = (job, image_options, options)
    with open_run("baselines/spml.py", argv, settings, annotate_digit_pictures, f"runs/{options.method}") as run:
        name = NAMES[options.method]
        fields = preset_fields(run, OFFICIAL[options.method], name, options)
        task = prepare_tags(run, options)
        method, optimizer = build_method(task)
        training = run.begin([method], [optimizer])

        for epoch in run.epochs(training, name):
            lr, now = job.cosine_lr(epoch), Step(epoch, job.epochs)
            linear = epoch < getattr(options, "linear_epochs", 0)
            keep_features(task, method, linear or method.net.features_are_fixed)
            train(run, task, training, lr, "plain" if linear else options.view)
            end_steps(task, training)
            logits = predicted(task, method, task.data) if method.reads_all(now) else None
            drawn, curves = method.finish_epoch(now, logits), judge_tags(task, method)
            if method.best is not None:
                method.best.consider(method.net, curves["mAP/validation"], epoch + 1)
            run.log(training, {"lr": lr} | curves | {f"method/{key}": value for key, value in drawn.items()})

        keep_features(task, method, method.net.features_are_fixed)
        fields["epoch"] = job.epochs if method.best is None else method.best.restore(method.net)
        finish_tags(run, task, training, method, name, **fields)


if __name__ == "__main__":
    main()
