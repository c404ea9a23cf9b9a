"""The settings of Co-Reg, with the papers' symbols. Defaults follow the public reference code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from coreg.config import advanced, option

# forms of the contrastive loss: the table of `coreg.learn.losses.contrastive_loss`
Contrast = Literal["noise_tolerant", "supervised", "hcp", "hcpn", "unsupervised"]


@dataclass
class CoRegOptions:
    """Co-Reg: hyper-parameters of the method."""

    preset: Literal["reference", "paper", "fast"] = option("reference", "form of the method, below recipe and command line")
    warmup_epochs: int = option(50, "W, epochs of partial cross-entropy before the first division", (0, 1_000_000))
    warmup_view: Literal["strong", "weak"] = advanced("strong", "view of an image in warm-up")
    entropy_weight: float = advanced(1.0, "weight of L_reg, the negative entropy in warm-up", (0, 1e6))
    skip_full_sets: bool = advanced(True, "leave images whose candidate set is full out of the mean of the warm-up loss")
    contrast_after: int = advanced(
        10, "prototype and contrastive losses count from epoch W + this + 1 on; -1 for at once", (-1, 1_000_000)
    )
    alignment: Literal["uniform", "annotator", "none"] = advanced(
        "uniform", "distribution alignment of the division's predictions: the prior they are drawn towards"
    )
    division_view: Literal["weak", "plain"] = advanced("weak", "view of an image in division")
    history: int = advanced(5, "epochs over which the division losses are averaged", (1, 1000))
    threshold: float = advanced(
        0.5, "tau_div, an image is trusted (in P) when its weight w lies above it", (1e-300, 0.9999999999999999)
    )
    monotone: bool = advanced(False, "division: let no image lose trust by having a smaller loss")
    co_pseudo_labels: bool = advanced(True, "use the peer's division and predictions; otherwise only the network's own")
    use_unlabeled: bool = advanced(True, "train on distrusted images U too")
    guesses: Literal["step", "epoch"] = advanced(
        "step", "when weak views are predicted: in every step, or once an epoch, which saves 6 of 14 forward passes"
    )
    guess_mode: Literal["train", "eval"] = advanced(
        "train", "mode of the own network while it predicts weak views; eval merges the passes into one"
    )
    temperature: float = advanced(0.5, "T, sharpening of pseudo-labels", (0.001, 1))
    mixup_alpha: float = option(4.0, "MixUp's lambda is drawn from Beta(alpha, alpha); 0 switches MixUp off", (0, 1e6))
    squared_error: Literal["mean", "sum"] = advanced(
        "mean", "squared error of two distributions: its mean or its sum over classes"
    )
    lambda_u: float = option(1.0, "weight of the loss on distrusted images U", (0, 1e6))
    rampup_epochs: int = advanced(
        16, "epochs over which lambda_u grows from 0 after warm-up; 0 for at once", (0, 1_000_000)
    )
    prototype_weight: float = option(0.1, "lambda_1, weight of the prototype alignment loss; 0 switches it off", (0, 1e6))
    prototype_momentum: float = advanced(0.999, "gamma, momentum of the class prototypes", (0, 0.999999))
    prototype_update: Literal["trusted", "all"] = advanced("trusted", "images whose features move the prototypes")
    prototype_temperature: float = advanced(0.3, "T', temperature of the similarities to prototypes", (0.001, 1000))
    prototype_form: Literal["reference", "paper"] = advanced(
        "reference", "T' on similarities alone (reference), or on trusted targets too and not at all on U (paper)"
    )
    contrast: Contrast = advanced("noise_tolerant", "form of the contrastive loss")
    contrast_weight: float = option(0.1, "lambda_2, weight of the contrastive loss; 0 switches it off", (0, 1e6))
    contrast_temperature: float = advanced(0.07, "T'', temperature of the contrastive similarities", (0.001, 1000))
    key_momentum: float = advanced(0.999, "momentum of the encoder that makes the keys", (0, 0.999999))
    key_reset: Literal["epoch", "never"] = advanced("epoch", "copy the query encoder into the key encoder at epoch start")
    queue_size: int = advanced(8192, "keys kept for contrast", (1, 10_000_000))
    projection_dim: int = advanced(128, "D, width of the projected features", (1, 65_536))
    tables: Literal["whole", "sharded"] = advanced(
        "whole",
        "tables with a row for each training image and a column for each class: whole on every process, or sharded, each "
        "process holding its part and sending the others what a step needs, which gives the same results",
        job=False,
    )


# `reference` follows the public code, `paper` the text where the two differ, `fast` saves passes; recipes and the command
# line win over a preset
PRESETS: dict[str, dict[str, Any]] = {
    "reference": {},
    "paper": {
        "skip_full_sets": False,
        "contrast_after": -1,
        "alignment": "none",
        "history": 1,
        "squared_error": "sum",
        "rampup_epochs": 0,
        "prototype_update": "all",
        "prototype_form": "paper",
        "key_reset": "never",
    },
    "fast": {"guesses": "epoch"},
}
