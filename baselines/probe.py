"""A linear or cosine head on frozen features, fitted to the annotator's probabilities or candidate sets in seconds.

    accelerate launch baselines/probe.py --annotations ann --output_dir runs/probe
    accelerate launch baselines/probe.py --annotations ann --refine view --output_dir runs/probe_refined
    accelerate launch baselines/probe.py --annotations ann --features own --head cosine --output_dir runs/probe_cosine

The features are those that the student's own starting weights give to images and, where views are mirrored, their mirror
images; the network itself is not trained. What comes out is a network like any other, exported with its classifier.
Features of the annotator (own) or of a stored view are those of another network, so that nothing is exported with them. A
cosine head on the annotator's own features begins with its text features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from coreg.config import option
from coreg.errors import UserError, exits_with_one_line
from coreg.network_options import ImageConfig, TuningOptions
from coreg.run.settings import read_student, refuse_prefilter
from coreg.settings import JobConfig

NAMES = {"probabilities": "Probe, soft labels", "sets": "Probe, candidate sets"}


@dataclass
class ProbeOptions:
    """probe: what the classifier learns from."""

    features: str = option(
        "student", "whose features: the student's starting weights', own (the annotator's), or a stored view by name"
    )
    targets: Literal["probabilities", "sets"] = option(
        "probabilities", "the annotator's mean probabilities, or candidate sets by partial cross-entropy"
    )
    penalty: float = option(
        1e-3,
        "half of it times the squared weights is added to the loss, features standardised; of a cosine head, the squared "
        "distance from where it began",
        (1e-12, 1e6),
    )


@exits_with_one_line
def read_settings(argv: Sequence[str] | None = None) -> tuple[JobConfig, ImageConfig, ProbeOptions]:
    """Recipe and command line, checked."""
    job, image_options, method = read_student(argv, "baselines/probe.py", __doc__, ProbeOptions)
    if method.targets != "sets":
        refuse_prefilter(job, f"baselines/probe.py --targets {method.targets}")
    if image_options.head not in ("linear", "cosine"):
        raise UserError(
            f"--head is {image_options.head}; baselines/probe.py fits linear or cosine heads, write one of them"
        )
    for field in dataclasses.fields(TuningOptions):
        if field.name != "head" and getattr(image_options, field.name) != field.default:
            raise UserError(f"--{field.name} is for training; baselines/probe.py trains no network, leave it out")
    return job, image_options, method


if __name__ == "__main__":
    read_settings()  # faults in them are reported before the imports below, which take seconds

import time

import numpy as np
import torch
from torch import Tensor

from annotate_vlm import annotate_digits
from coreg.annotate.scores import class_embeddings
from coreg.annotate.textual import text_side
from coreg.annotate.view import View, views_of
from coreg.learn.probe import SCALE, fit_cosine, fit_probe
from coreg.nets.heads import Head, put_head
from coreg.nets.model import Model
from coreg.process import main_process_decides
from coreg.run.job import open_run
from coreg.run.loop import Run
from coreg.run.networks import finish_networks, predictions
from coreg.run.results import finish
from coreg.run.task import Task, pooled, prepare
from coreg.run.training import Training, build_networks
from coreg.run.trust import trust
from coreg.store.store import AnnotationStore


def stored_features(run: Run, name: str) -> tuple[Tensor, np.ndarray]:
    """The annotator's features (`own`) or those of a view, (N, D), and bool (N,), where there are none.

    Raises:
        UserError: there are none.
    """
    if name == "own":
        run.store.need_features("leave out --features own")
        return torch.from_numpy(run.store.features()), run.store.unreadable
    # a store that was refined on the way lies elsewhere than what it was made of
    source = AnnotationStore.open(run.job.annotations or run.folder.root / "annotations")
    views = {folder.name: folder for folder in views_of(source)}
    if name not in views:
        there = ", ".join(["student", "own", *views])
        raise UserError(
            f"--features {name} is no view of {source.root}; write one of {there}, or make a view: python -m "
            f"coreg.annotate.view {source.root}"
        )
    view = View.open(views[name], source)
    run.identity["view"] = view.hash
    return torch.from_numpy(view.features()), view.unreadable


def text_start(run: Run, name: str) -> tuple[Tensor | None, float]:
    """The annotator's text features (C, D) and scale, or none and the usual scale, where a cosine head begins otherwise."""
    if name != "own":
        return None, SCALE
    refined = run.store.manifest.get("refined")
    try:
        store = AnnotationStore.open(refined["source"]) if refined else run.store
        side = text_side(store, store.templates)
    except UserError as error:
        run.accelerator.print(f"note: the cosine head begins with the classes' mean features, not with texts ({error})")
        return None, SCALE
    return torch.from_numpy(class_embeddings(side)), side.scale


def targets_of(task: Task[ProbeOptions]) -> Tensor:
    """What the classifier learns of the usable training images: float (n, C), or bool (n, C) for candidate sets.

    Labels that a person gave stand in for the annotator's probabilities.
    """
    if task.method.targets == "sets":
        return torch.from_numpy(task.weak.table[task.weak.usable])
    probs = task.store.probs()[task.data.samples.numpy()].astype(np.float64)
    given = task.weak.certain
    probs[given] = task.weak.known[given, None] == np.arange(probs.shape[1])
    return torch.from_numpy(probs / probs.sum(axis=1, keepdims=True))[torch.from_numpy(task.weak.usable)]


def default_folder(head: str, method: ProbeOptions) -> str:
    """The run folder where none is given: what differs from the usual probe is in its name."""
    others = [word for word, usual in ((head, "linear"), (method.features, "student")) if word != usual]
    return "_".join(["runs/probe", method.targets, *(word.replace("/", "_") for word in others)])


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, fit, report."""
    job, image_options, method = read_settings(argv)
    folder = default_folder(image_options.head, method)
    with open_run("baselines/probe.py", argv, (job, image_options, method), annotate_digits, folder) as run:
        task = prepare(run, method)
        if not task.weak.usable.any():
            raise UserError(
                f"no template named a class of any training image in {run.store.root}; there is nothing to learn"
            )
        plain = dataclasses.replace(run.image_options, head="linear")  # a cosine head takes its place once it is fitted
        nets = build_networks(run.accelerator, job, plain, len(run.store.class_names), projection_dim=1, count=1)
        classifier = nets[0].backbone.get_classifier()
        if not nets[0].linear_head or classifier.bias is None:
            raise UserError(
                f"backbone {image_options.backbone} has no single linear classifier with a bias; choose another one"
            )
        nets[0].to(run.accelerator.device, task.data.dtype)
        stored = None if method.features == "student" else stored_features(run, method.features)
        training = run.begin([], [])  # nothing is trained step by step
        started = time.perf_counter()
        if stored is None:
            _network(run, task, training, nets[0], started)
        else:
            _head(run, task, training, stored, started)


def _network(run: Run, task: Task[ProbeOptions], training: Training, net: Model, started: float) -> None:
    """Fit the student's own classifier, or a cosine head in its place."""
    method, name, more = task.method, NAMES[task.method.targets], {}
    rows, size = np.flatnonzero(task.weak.usable), 4 * task.job.batch_size
    # of the usable training images, then of their mirror images where views are mirrored: (n or 2n, D)
    both = (False, True)[: 1 + task.image_options.flip]
    features = torch.cat([pooled(net, task.data, rows, size, mirrored) for mirrored in both]).cpu()
    targets = targets_of(task).repeat(len(features) // int(task.weak.usable.sum()), 1)
    if task.image_options.head == "cosine":
        fitted = main_process_decides(run.accelerator, lambda: fit_cosine(features, targets, method.penalty))
        centred = torch.eye(len(fitted.mean)), -fitted.mean.float()
        head = Head("projected", fitted.weight, fitted.scale, centred)
        put_head(net.backbone, head.to(run.accelerator.device, task.data.dtype))
        task.image_options = dataclasses.replace(task.image_options, head=head.kind)
        loss, name, more = fitted.loss, f"{name}, cosine", {"began_with": "class means"}
    else:
        weight, bias, loss = main_process_decides(
            run.accelerator, lambda: tuple(fit_probe(features, targets, method.penalty))
        )
        with torch.no_grad():
            net.backbone.get_classifier().weight.copy_(weight)
            net.backbone.get_classifier().bias.copy_(bias)
    training.seconds, training.images_seen = time.perf_counter() - started, len(features)
    training.curves = [{"loss/net1/total": loss}]
    finish_networks(run, task, training, [net], name, **more)


def _head(
    run: Run, task: Task[ProbeOptions], training: Training, stored: tuple[Tensor, np.ndarray], started: float
) -> None:
    """Fit a head on features of another network."""
    method, kind = task.method, task.image_options.head
    every = {split: stored[0][images.samples.numpy()].double() for split, images in task.splits.items()}
    has = ~stored[1][task.data.samples.numpy()]
    task.weak = dataclasses.replace(task.weak, usable=task.weak.usable & has)
    if not task.weak.usable.any():
        raise UserError(f"no usable training image of {run.store.root} has features in --features {method.features}")
    features, targets = every["train"][task.weak.usable], targets_of(task)
    start, scale = text_start(run, method.features) if kind == "cosine" else (None, SCALE)

    def fit() -> tuple[dict[str, np.ndarray], float, int]:
        if kind == "cosine":
            head = fit_cosine(features, targets, method.penalty, start, scale)
            return {split: head(f).numpy() for split, f in every.items()}, head.loss, head.weight.numel() + 1
        weight, bias, loss = fit_probe(features, targets, method.penalty)
        logits = {split: (f.double() @ weight.T + bias).numpy() for split, f in every.items()}
        return logits, loss, weight.numel() + bias.numel()

    logits, loss, parameters = main_process_decides(run.accelerator, fit)
    training.seconds, training.images_seen = time.perf_counter() - started, len(features)
    training.curves = [{"loss/net1/total": loss}]
    what = ", own features" if method.features == "own" else f", {method.features}"
    name = NAMES[method.targets] + (", cosine" if kind == "cosine" else "") + what
    run.accelerator.print("There is no export: this head reads features of another network.")
    named_logits = {split: {"ensemble": rows} for split, rows in logits.items()}
    begun = "texts" if start is not None else "class means"
    more = {"began_with": begun} if kind == "cosine" else {}
    predicted = predictions(run, task, named_logits)
    more |= {"parameters": parameters, "temperature": 1.0, "trust": trust(run, task, predicted.classes)}
    finish(run, training, name, predicted, **more)


if __name__ == "__main__":
    main()
