"""CoOp: learn the words of CLIP's prompt from a few labelled images, with both of its encoders frozen.

    accelerate launch baselines/coop.py --shots 16                              # built-in digits, built-in tiny CLIP
    accelerate launch baselines/coop.py --annotations ann --shots 4 --output_dir runs/coop4
    accelerate launch baselines/coop.py --annotations ann --shots 1 --context per_class --context_init "a photo of a"

M context vectors stand in a prompt where a template has its words. The defaults are those of its authors: 16 vectors that
all classes share, the class name after them, random at first; SGD with a cosine schedule after one epoch of warming up.

The run folder is the job: the same command again goes on where it stopped, and a finished run says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coreg.adapt.settings import Outlook, TuningJob, ViewOptions, read_tuning
from coreg.config import option
from coreg.errors import exits_with_one_line

# digits must not be mirrored, and most of one has to be seen; the tiny CLIP reads 16 tokens in all
PRESETS = {"paper": {}, "digits": {"crop": 0.7, "flip": False, "context_tokens": 4}}


@dataclass
class CoOpOptions:
    """CoOp: the prompt and how it is trained."""

    preset: Literal["paper", "digits"] | None = option(
        None, "named defaults; digits are those of the built-in data (default: paper, or digits for the built-in digits)"
    )
    context: Literal["shared", "per_class"] = option("shared", "one context for all classes, or one for each")
    context_tokens: int = option(16, "M, context vectors in a prompt", (1, 10_000))
    context_init: str | None = option(
        None, 'words to begin with instead of random vectors, such as "a photo of a"; their tokens are counted, not M'
    )
    class_position: Literal["end", "middle", "front"] = option("end", "where the class name stands")
    warmup_epochs: int = option(1, "epochs with --warmup_lr before the cosine schedule", (0, 1_000_000))
    warmup_lr: float = option(1e-5, "learning rate while warming up", (0, 1e6))
    momentum: float = option(0.9, "SGD momentum", (0, 0.999999))


def preset_of(job: TuningJob, view: ViewOptions, method: CoOpOptions) -> Mapping[str, Any]:
    """The named defaults, of the images where no others are asked for."""
    name = method.preset or ("digits" if Outlook.of(job).digits else "paper")
    return {"preset": name} | PRESETS[name]


@exits_with_one_line
def read_settings(argv: Sequence[str] | None = None) -> tuple[TuningJob, ViewOptions, CoOpOptions]:
    """Preset, recipe and command line, checked."""
    job, view, method = read_tuning(argv, "baselines/coop.py", __doc__, CoOpOptions, preset_of)
    # as many as CoOp's authors train for
    job.epochs = job.epochs or (50 if job.shots == 1 else 100 if job.shots <= 4 else 200)
    return job, view, method


if __name__ == "__main__":
    read_settings()  # faults in them are reported before the imports below, which take seconds

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from annotate_vlm import annotate_digits
from coreg.adapt.learner import ClipLearner
from coreg.adapt.tuning import ClipImages, Labelled, load_towers, predict
from coreg.annotate.annotators import Towers
from coreg.annotate.texts import refuse_same, same_rows
from coreg.files import making_folder
from coreg.nets.tuners.prompts import PromptLearner, lay_out, random_context, text_ids, token_embedding
from coreg.process import main_process_decides
from coreg.run.job import open_run
from coreg.run.loop import Run
from coreg.run.results import finish
from coreg.views.order import ShuffledRows


def rate(job: TuningJob, method: CoOpOptions, epochs: float) -> float:
    """Learning rate after so many epochs: constant while warming up, then a cosine, both changed once an epoch."""
    epoch = int(epochs)
    if epoch < method.warmup_epochs:
        return method.warmup_lr
    return job.lr * (1 + math.cos(math.pi * epoch / job.epochs)) / 2


def build_prompts(run: Run, method: CoOpOptions, towers: Towers) -> PromptLearner:
    """The prompts of all classes with their first context vectors.

    Raises:
        UserError: the prompts do not fit the model, two are the same to it, or it has no place for context vectors.
    """
    names = run.store.class_names
    ids = text_ids(towers.tokenize, method.context_init, names) if method.context_init else None
    count = method.context_tokens if ids is None else len(ids)
    prompts = lay_out(towers.tokenize, names, count, method.class_position)
    refuse_same(same_rows(prompts.tokens["input_ids"]), names, "the model")
    table = token_embedding(towers.network, towers.text, prompts.tokens)
    classes = [len(names)] if method.context == "per_class" else []
    if ids is None:
        first = random_context((*classes, count, table.embedding_dim), run.job.seed)
    else:
        first = table.weight[ids].detach().expand(*classes, -1, -1)
    return PromptLearner(
        prompts, first.to(table.weight.device, getattr(torch, run.job.dtype), copy=True), table, towers.text
    )


def save_prompts(folder: Path, learner: PromptLearner, record: dict[str, Any]) -> None:
    """Write prompt.safetensors: `context`, (M, D) or (C, M, D), and what it belongs to as JSON metadata `coreg`."""
    context = learner.context.detach().float().cpu().contiguous()
    with making_folder(folder, replace=True) as temporary:
        (temporary / "prompt.safetensors").write_bytes(save({"context": context}, {"coreg": json.dumps(record)}))


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, train, report."""
    job, view, method = read_settings(argv)
    with open_run("baselines/coop.py", argv, (job, view, method), annotate_digits, f"runs/coop_{job.shots}") as run:
        labelled = Labelled.of(run)
        towers = load_towers(labelled.model, run)
        images = ClipImages(run, labelled, towers, view, frozen=True)
        prompts = build_prompts(run, method, towers)
        learner = ClipLearner(prompts, prompts, towers.image, towers.scale)
        sgd = torch.optim.SGD(prompts.parameters(), job.lr, method.momentum, weight_decay=job.weight_decay)
        training = run.begin([learner], [sgd])

        for epoch in run.epochs(training, "CoOp"):
            # a frozen model normalises with running statistics, so that a batch may be one image
            places = np.arange(len(labelled.rows))
            order = ShuffledRows(places, job.batch_size, (job.seed, "labelled", epoch), smallest=1)
            for step in run.steps(training, order.per_round):
                lr = rate(job, method, epoch + step / order.per_round)
                training.learn(images.batch(order.batch(step), epoch), lr)
            run.log(training, {"lr": rate(job, method, epoch)})

        logits = predict(learner, images, labelled)
        record = {
            "model": labelled.model.spec,
            "weights": labelled.model.weights,
            "class_names": run.store.class_names,
            "class_position": method.class_position,
        }
        main_process_decides(run.accelerator, lambda: save_prompts(run.folder.root / "prompt", prompts, record))
        finish(
            run,
            training,
            labelled.method("CoOp", job),
            labelled.predictions(run, logits),
            tuned_model=labelled.model.spec,
            trainable_parameters=prompts.context.numel(),
            parameters=sum(weight.numel() for weight in towers.network.parameters()) + prompts.context.numel(),
            context=method.context,
            context_tokens=prompts.context.shape[-2],
        )


if __name__ == "__main__":
    main()
