"""A linear classifier on frozen features, fitted to the annotator's probabilities or candidate sets in seconds.

    accelerate launch baselines/probe.py --annotations ann --output_dir runs/probe
    accelerate launch baselines/probe.py --annotations ann --refine view --output_dir runs/probe_refined

The features are those that the student's own starting weights give to images and, where views are mirrored, their mirror
images; the network itself is not trained. What comes out is a network like any other, exported with its classifier.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from coreg.annotate.candidates import parse_rule
from coreg.config import option, parse
from coreg.errors import UserError, exits_with_one_line
from coreg.learn.options import CoRegOptions
from coreg.settings import ImageConfig, JobConfig, check, check_look

NAMES = {"probabilities": "Probe, soft labels", "sets": "Probe, candidate sets"}


@dataclass
class ProbeOptions:
    """What the classifier learns from."""

    _argument_group_name = "probe"

    targets: Literal["probabilities", "sets"] = option(
        "probabilities", "the annotator's mean probabilities, or candidate sets by partial cross-entropy"
    )
    penalty: float = option(
        1e-3, "half of it times the squared weights is added to the loss, features standardised", (1e-12, 1e6)
    )


@exits_with_one_line
def read_settings(argv: Sequence[str]) -> tuple[JobConfig, ImageConfig, ProbeOptions]:
    """What the recipe and the command line say, checked."""
    own_images = any(word.split("=")[0] == "--annotations" for word in argv)
    job, look, method = parse(
        JobConfig,
        ImageConfig,
        ProbeOptions,
        argv=argv,
        default_recipe="folder" if own_images else "digits",
        others=(CoRegOptions,),
        prog="baselines/probe.py",
        description=__doc__,
    )
    check(job)
    check_look(look)
    parse_rule(job.candidates)
    return job, look, method


if __name__ == "__main__":
    read_settings(sys.argv[1:])  # what is wrong with them is told before the imports below, which take seconds

import time

import numpy as np
import torch
from torch import Tensor

from annotate_vlm import annotate_digits
from coreg.learn.collective import gather_rows, share
from coreg.learn.probe import fit_probe
from coreg.nets.model import CoRegNet
from coreg.report.report import summary
from coreg.run.job import open_run
from coreg.run.process import main_process_decides
from coreg.run.results import finish
from coreg.run.task import Task, prepare
from coreg.run.training import Training, build_networks


@torch.no_grad()
def frozen_features(task: Task[ProbeOptions], net: CoRegNet) -> Tensor:
    """Pooled features of the usable training images, then of their mirror images where views are mirrored: (n or 2n, D).

    Each process encodes its share.
    """
    net.eval()
    rows = np.flatnonzero(task.usable)
    mine, size = rows[share(len(rows))], 4 * task.job.batch_size
    parts = []
    for mirrored in (False, True)[: 1 + task.look.flip]:
        batches = task.data.in_batches("plain", mine, size, ()) if len(mine) else [task.data.view("plain", mine, ())]
        pooled = [
            net.backbone.forward_head(net.backbone.forward_features(x.flip(3) if mirrored else x), pre_logits=True).flatten(
                1
            )
            for x in batches
        ]
        parts.append(gather_rows(torch.cat(pooled), len(rows)))
    return torch.cat(parts)


def targets_of(task: Task[ProbeOptions]) -> Tensor:
    """What the classifier learns of the usable training images: float (n, C), or bool (n, C) for candidate sets.

    Labels that a person gave stand in for the annotator's probabilities.
    """
    if task.method.targets == "sets":
        return torch.from_numpy(task.candidates[task.usable])
    probs = task.store.probs()[task.data.samples.numpy()].astype(np.float64)
    given = task.known >= 0
    probs[given] = task.known[given, None] == np.arange(probs.shape[1])
    return torch.from_numpy(probs / probs.sum(axis=1, keepdims=True))[torch.from_numpy(task.usable)]


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, fit, report."""
    argv = list(sys.argv[1:] if argv is None else argv)
    job, look, method = read_settings(argv)
    with open_run("baselines/probe.py", argv, (job, look, method), annotate_digits, f"runs/probe_{method.targets}") as run:
        if run is None:
            return
        task = prepare(run, method)
        if not task.usable.any():
            raise UserError(
                f"no template named a class of any training image in {run.store.root}; there is nothing to learn"
            )
        nets = build_networks(run.accelerator, job, look, len(run.store.class_names), projection_dim=1, count=1)
        classifier = nets[0].backbone.get_classifier()
        if not nets[0].linear_head or classifier.bias is None:
            raise UserError(f"backbone {look.backbone} has no single linear classifier with a bias; choose another one")
        nets[0].to(run.accelerator.device, task.data.dtype)
        training = Training(nets, nets, nets, [])  # nothing trains
        run.begin(training)
        started = time.perf_counter()
        features = frozen_features(task, nets[0])
        targets = targets_of(task).repeat(len(features) // int(task.usable.sum()), 1)
        weight, bias, loss = main_process_decides(
            run.accelerator, lambda: tuple(fit_probe(features.cpu(), targets, method.penalty))
        )
        with torch.no_grad():
            classifier.weight.copy_(weight)
            classifier.bias.copy_(bias)
        training.seconds, training.images_seen = time.perf_counter() - started, len(features)
        training.curves = [{"loss/net1/total": loss}]
        report = finish(run, task, training, NAMES[method.targets])
        run.accelerator.print(summary(report, run.folder.root))


if __name__ == "__main__":
    main()
