"""The settings of DivideMix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from coreg.config import advanced, option


@dataclass
class DivideMixOptions:
    """DivideMix: hyper-parameters of DivideMix."""

    preset: Literal["matched", "official"] = option(
        "matched",
        "matched: Co-Reg's views, batch and schedule; official: those of the authors' code for --dataset, or for CIFAR-10 "
        "where they give none",
    )
    labels_from: Literal["single", "averaged"] = option(
        "averaged", "the noisy label of an image: what the first template names, or the largest mean probability"
    )
    warmup_epochs: int = option(10, "epochs of cross-entropy before the first division", (0, 1_000_000))
    entropy_weight: float = advanced(
        1.0, "weight of the negative entropy in warm-up; 0 for class-independent label noise", (0, 1e6)
    )
    train_view: Literal["strong", "weak"] = advanced(
        "strong", "views to train on: strong ones as Co-Reg does, or the two weak ones that labels are guessed from"
    )
    history: int = advanced(
        1, "epochs over which the division losses are averaged; the authors take 5 for 90 % noise", (1, 1000)
    )
    threshold: float = advanced(
        0.5, "an image is trusted (in P) when its weight w lies above it", (1e-300, 0.9999999999999999)
    )
    temperature: float = advanced(0.5, "T, sharpening of guessed labels", (0.001, 1))
    mixup_alpha: float = option(4.0, "MixUp's lambda is drawn from Beta(alpha, alpha); 0 switches MixUp off", (0, 1e6))
    lambda_u: float = option(25.0, "weight of the loss on distrusted images U; the authors try 0, 25, 50 and 150", (0, 1e6))
    rampup_epochs: int = advanced(
        16, "epochs over which lambda_u grows from 0 after warm-up; 0 for at once", (0, 1_000_000)
    )
    penalty_weight: float = advanced(1.0, "weight of the penalty on an uneven mean prediction", (0, 1e6))
    lr_schedule: Literal["cosine", "step"] = advanced(
        "cosine", "learning rate: cosine, or a tenth in the second half of all epochs"
    )
    tables: Literal["whole", "sharded"] = advanced(
        "whole",
        "tables with a row for each training image and a column for each class: whole on every process, or sharded, each "
        "process holding its part and sending the others what a step needs, which gives the same results",
        job=False,
    )


_CIFAR = {"train_view": "weak", "lr_schedule": "step", "optimizer": "sgd", "lr": 0.02, "batch_size": 64, "epochs": 300}

# of the authors' code, by data set as recipes name it; those of CIFAR-10 count where they give none
OFFICIAL: dict[str, dict[str, Any]] = {
    "cifar10": _CIFAR | {"warmup_epochs": 10},
    "cifar100": _CIFAR | {"warmup_epochs": 30},
}
