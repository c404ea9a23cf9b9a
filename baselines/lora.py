"""LoRA: adapt a CLIP or a LLaVA-like chat model to the classes with a few labelled images, its own weights frozen.

    accelerate launch baselines/lora.py --shots 16                              # built-in digits, built-in tiny CLIP
    accelerate launch baselines/lora.py --annotations ann --shots 4 --towers image --output_dir runs/lora4
    accelerate launch baselines/lora.py --annotations ann --vlm chat:llava-1.5-7b-hf --shots 16 --precision bf16

CLIP: adapters on queries, keys and values of all layers of both towers, trained on the logits against the first template's
text features. Chat models: adapters on all linear layers of the language model, trained to answer the annotation's first
question with the class name; the loss sees the answer's tokens alone. The adapter is an ordinary one of PEFT.

The run folder is the job: the same command again goes on where it stopped, and a finished run says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from coreg.adapt.settings import Outlook, TuningJob, ViewOptions, read_tuning
from coreg.config import option
from coreg.errors import UserError, exits_with_one_line

CLIP = {"lr": 2e-4, "weight_decay": 1e-2}
CHAT = {"rank": 16, "alpha": 32.0, "dropout": 0.05, "rslora": False, "lr": 2e-4, "weight_decay": 0.0, "warmup": 0.03}
CHAT |= {"lr_floor": 0.0, "batch_size": 16, "epochs": 10, "crop": 1.0, "flip": False}
# Digits must not be mirrored, and most of one has to be seen. The tiny CLIP is an eighth as wide as a real one: with the
# learning rate for that, the training loss hardly falls.
DIGITS = CLIP | {"lr": 2e-3, "steps_per_shot": 100, "crop": 0.7, "flip": False}
PRESETS = {"clip": CLIP, "chat": CHAT, "digits": DIGITS}


@dataclass
class LoraOptions:
    """LoRA: the adapters and how they are trained."""

    preset: Literal["clip", "chat", "digits"] | None = option(
        None, "named defaults (default: by the kind of model; digits for the built-in digits)"
    )
    towers: Literal["both", "image", "text"] = option("both", "CLIP models: where adapters are put")
    rank: int = option(2, "rank of the adapters", (1, 65_536))
    alpha: float = option(1.0, "the adapters' outputs are multiplied by alpha / sqrt(rank), or alpha / rank", (1e-6, 1e6))
    rslora: bool = option(True, "alpha / sqrt(rank) instead of alpha / rank")
    dropout: float = option(
        0.0, "dropout of the adapters' inputs, where attention keeps queries, keys and values apart", (0, 0.999999)
    )
    template: str | None = option(None, "text or question with one {}; default: the first of the annotation")
    steps_per_shot: int = option(
        500, "steps for every shot, from which the epochs follow where none are given", (1, 1_000_000)
    )
    warmup: float = option(0.0, "share of all steps in which the learning rate rises", (0, 0.999999))
    lr_floor: float = option(1e-6, "learning rate at the end of the cosine schedule", (0, 1e6))
    precision: Literal["fp32", "bf16"] = option("fp32", "type of the frozen weights")
    chat_mode: Literal["likelihood", "generate"] = option(
        "likelihood", "chat models are judged by the likelihood of every class name, or by their answers in words"
    )


def preset_of(job: TuningJob, view: ViewOptions, method: LoraOptions) -> Mapping[str, Any]:
    """The named defaults, of the kind of model or of the digits where no others are asked for."""
    outlook = Outlook.of(job)
    name = method.preset or ("chat" if outlook.spec.startswith("chat:") else "digits" if outlook.digits else "clip")
    return {"preset": name} | PRESETS[name]


@exits_with_one_line
def read_settings(argv: Sequence[str] | None = None) -> tuple[TuningJob, ViewOptions, LoraOptions]:
    """Preset, recipe and command line, checked."""
    job, view, method = read_tuning(argv, "baselines/lora.py", __doc__, LoraOptions, preset_of)
    steps = math.ceil(job.shots * Outlook.of(job).classes / job.batch_size)
    job.epochs = job.epochs or math.ceil(method.steps_per_shot * job.shots / steps)
    if method.template is not None and method.template.count("{}") != 1:
        raise UserError(f"--template {method.template!r} needs exactly one {{}}, such as: a photo of a {{}}")
    return job, view, method


if __name__ == "__main__":
    read_settings()  # faults in them are reported before the imports below, which take seconds

import numpy as np
import torch
from accelerate.utils import set_seed
from peft import PeftModel
from torch import nn

from annotate_vlm import annotate_digits
from coreg.adapt.chat import ChatImages
from coreg.adapt.learner import ChatLearner, ClipLearner
from coreg.adapt.tuning import ClipImages, Labelled, load_towers, predict
from coreg.adapt.views import RandomView
from coreg.annotate.chat import CHAT_TEMPLATES, ChatAnnotator
from coreg.annotate.prompts import TEMPLATES, prompts
from coreg.annotate.texts import refuse_same, same_rows
from coreg.data.keyed import keyed_generator
from coreg.learn.collective import rank_and_world
from coreg.nets.tuners.lora import attach, attention_targets, decoder_targets, refuse_dead, save_adapter
from coreg.process import main_process_decides
from coreg.run.job import open_run
from coreg.run.loop import Run
from coreg.run.results import finish
from coreg.views.order import ShuffledRows

PROBED = 8  # images on which adapters are proven to act


def rate(job: TuningJob, method: LoraOptions, epochs: float) -> float:
    """Learning rate after so many epochs: a line up to the peak, then a cosine down to the floor, changed every step."""
    done, risen = epochs / job.epochs, method.warmup
    if done < risen:
        return job.lr * done / risen
    left = (done - risen) / (1 - risen)
    return method.lr_floor + (job.lr - method.lr_floor) * (1 + math.cos(math.pi * left)) / 2


def template_of(run: Run, labelled: Labelled, method: LoraOptions) -> str:
    """The text with the class name, or the question with all of them."""
    if method.template:
        return method.template
    chat, asked = labelled.model.kind == "chat", run.store.manifest["model"]["spec"].startswith("chat:")
    first = next(iter(run.store.templates), "")
    return first if chat == asked and first.count("{}") == 1 else (CHAT_TEMPLATES if chat else TEMPLATES)[0]


def adapt(
    run: Run, labelled: Labelled, method: LoraOptions, network: nn.Module, layers: list[str], parameters: list[str]
) -> PeftModel:
    """Put the adapters into `network`, in place, the same on every process and in every run with this seed."""
    set_seed(run.job.seed)
    how = {"rank": method.rank, "alpha": method.alpha, "dropout": method.dropout, "rslora": method.rslora}
    return attach(network, layers, parameters, **how, base=labelled.model.spec)


def clip_learner(run: Run, labelled: Labelled, view: ViewOptions, method: LoraOptions) -> tuple[ClipLearner, ClipImages]:
    """A CLIP model with adapters that are proven to act.

    Raises:
        UserError: two class names are the same to the model, a tower has nothing to put adapters on, or some of them
            would be dead.
    """
    towers = load_towers(labelled.model, run, method.precision)
    tokens = towers.tokenize(prompts([template_of(run, labelled, method)], run.store.class_names))
    refuse_same(same_rows(tokens["input_ids"]), run.store.class_names, labelled.model.spec)
    normalize = torch.nn.functional.normalize
    images = ClipImages(run, labelled, towers, view, frozen=method.towers == "text")
    pixels, encoded = images.sample(PROBED)
    runs = {"image": lambda: encoded or towers.image(pixels), "text": lambda: towers.text(tokens)}
    layers, parameters = [], []
    for tower in runs if method.towers == "both" else [method.towers]:
        targets = attention_targets(towers.network, runs[tower])
        if not any(targets):
            raise UserError(
                f"the {tower} tower of {labelled.model.spec} has no attention layer that an adapter could be put on; "
                f"adapt the other one with --towers {'text' if tower == 'image' else 'image'}"
            )
        layers, parameters = layers + targets[0], parameters + targets[1]
    with torch.no_grad():
        fixed = normalize(towers.text(tokens), dim=-1) if method.towers == "image" else None
    adapted = adapt(run, labelled, method, towers.network, layers, parameters)
    text = lambda: normalize(towers.text(tokens), dim=-1) if fixed is None else fixed  # noqa: E731
    learner = ClipLearner(adapted, text, towers.image, towers.scale)
    learner.train(False)
    refuse_dead(learner.trainable(), lambda: learner.logits(pixels, encoded))
    return learner, images


def chat_learner(run: Run, labelled: Labelled, view: ViewOptions, method: LoraOptions) -> tuple[ChatLearner, ChatImages]:
    """A chat model with adapters that are proven to act.

    Raises:
        UserError: it cannot be loaded or asked, or some adapters would be dead.
    """
    template = template_of(run, labelled, method)
    annotator = ChatAnnotator(
        labelled.model, [template], run.store.class_names, run.accelerator.device, method.precision, method.chat_mode
    )
    if run.job.dtype == "float64":
        annotator.network.double()
        annotator.dtype = torch.float64
    images = ChatImages(run, labelled, annotator, RandomView(view.crop, view.flip, None))
    adapted = adapt(run, labelled, method, annotator.network, decoder_targets(annotator.network), [])
    learner = ChatLearner(adapted, annotator.keeps_logits)
    learner.train(False)
    probe = images.batch(np.arange(min(len(labelled.rows), rank_and_world()[1])), 0)
    refuse_dead(learner.trainable(), lambda: learner.logits(probe)[0])
    return learner, images


@exits_with_one_line
def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check, annotate where there is no store yet, train, report."""
    job, view, method = read_settings(argv)
    with open_run("baselines/lora.py", argv, (job, view, method), annotate_digits, f"runs/lora_{job.shots}") as run:
        labelled = Labelled.of(run)
        chat = labelled.model.kind == "chat"
        learner, images = (chat_learner if chat else clip_learner)(run, labelled, view, method)
        adam = torch.optim.AdamW(learner.trainable().values(), job.lr, weight_decay=job.weight_decay)
        training = run.begin([learner], [adam])

        for epoch in run.epochs(training, "LoRA"):
            # a frozen model normalises with running statistics, so that a batch may be one image
            order = ShuffledRows(np.arange(len(labelled.rows)), job.batch_size, (job.seed, "labelled", epoch), smallest=1)
            for step in run.steps(training, order.per_round):
                places, lr = order.batch(step), rate(job, method, epoch + step / order.per_round)
                if method.dropout:  # drawn from a generator that the step's own images seed
                    key = (job.seed, "dropout", rank_and_world()[0], epoch, *places[:1].tolist())
                    torch.manual_seed(int(keyed_generator(*key).integers(1 << 62)))
                training.learn(images.batch(places, epoch), lr)
            run.log(training, {"lr": rate(job, method, epoch)})

        learner.train(False)
        logits, classes = images.predict() if chat else (predict(learner, images, labelled), None)
        folder = run.folder.root / "adapter"
        main_process_decides(run.accelerator, lambda: save_adapter(learner.trained, folder))
        finish(
            run,
            training,
            labelled.method("LoRA", job),
            labelled.predictions(run, logits, classes),
            tuned_model=labelled.model.spec,
            trainable_parameters=sum(weight.numel() for weight in learner.trainable().values()),
            parameters=sum(weight.numel() for weight in learner.trained.parameters()),
            rank=method.rank,
        )


if __name__ == "__main__":
    main()
