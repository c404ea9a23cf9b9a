"""The settings of Co-Reg, with the papers' symbols. Defaults follow the public reference code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from coreg.learn.losses import Contrast


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class CoRegOptions:
    """Hyper-parameters of the method; everything an equation needs and nothing else."""

    _argument_group_name = "Co-Reg"

    warmup_epochs: int = _option(50, "W, epochs of partial cross-entropy before the first division")
    contrast_after: int = _option(10, "prototype and contrastive losses count from epoch W + this + 1 on")
    alignment: Literal["uniform", "annotator", "none"] = _option(
        "uniform", "distribution alignment of the division's predictions: the prior they are drawn towards"
    )
    history: int = _option(5, "epochs over which the division losses are averaged")
    threshold: float = _option(0.5, "tau_div, an image is trusted (in P) when its weight w lies above it")
    temperature: float = _option(0.5, "T, sharpening of pseudo-labels")
    mixup_alpha: float = _option(4.0, "MixUp's lambda is drawn from Beta(alpha, alpha); 0 switches MixUp off")
    lambda_u: float = _option(1.0, "weight of the loss on distrusted images U")
    rampup_epochs: int = _option(16, "epochs over which lambda_u grows from 0 after warm-up; 0 for at once")
    prototype_weight: float = _option(0.1, "lambda_1, weight of the prototype alignment loss")
    prototype_momentum: float = _option(0.999, "gamma, momentum of the class prototypes")
    prototype_temperature: float = _option(0.3, "T', of the similarities to prototypes")
    contrast: Contrast = _option("noise_tolerant", "form of the contrastive loss")
    contrast_weight: float = _option(0.1, "lambda_2, weight of the contrastive loss")
    contrast_temperature: float = _option(0.07, "T'', of the contrastive similarities")
    key_momentum: float = _option(0.999, "momentum of the encoder that makes the keys")
    key_reset: Literal["epoch", "never"] = _option("epoch", "copy the query encoder into the key encoder at epoch start")
    queue_size: int = _option(8192, "keys kept for contrast")
    projection_dim: int = _option(128, "D, width of the projected features")
