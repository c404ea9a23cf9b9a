"""The settings of the single-network partial-label methods."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Name = Literal[
    "cc", "rc", "proden", "lws", "lwc", "cr_dpll", "pico", "pico_plus", "irnet", "alim_onehot", "alim_scale", "supervised"
]
# of `coreg.views.augment.VIEWS`
View = Literal["plain", "weak", "strong", "pico_weak", "pico_strong", "cr_weak", "cr_strong", "cr_strong_svhn"]


def _option(default: Any, text: str, bounds: tuple[float, float] | None = None) -> Any:
    made = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**made, metadata={"help": text, "bounds": bounds})


@dataclass
class PartialOptions:
    """Which method, and its hyper-parameters; starting times are shares of all epochs."""

    _argument_group_name = "partial-label method"

    method: Name = _option("proden", "what is trained; supervised takes the store's true labels, an upper bound")
    preset: Literal["matched", "official"] = _option(
        "matched",
        "matched: Co-Reg's student, batch, schedule and views; official: optimiser, epochs, batch and views of the "
        "method's authors for --dataset, or for CIFAR-10 where they give none; these win over the recipe",
    )
    weak_view: View = _option("weak", "what a weak view is")
    strong_view: View = _option("strong", "what a strong view is; the CR authors' views of SVHN: plain and cr_strong_svhn")
    schedule: Literal["cosine", "halving", "steps"] = _option(
        "cosine", "learning rate: cosine to --lr_floor, halved five times, or a tenth at half and at three quarters"
    )
    leverage: float = _option(1.0, "LWS, LWC: beta, weight of the classes outside the candidate set", (0, 1e6))
    consistency_weight: float = _option(1.0, "CR-DPLL: lambda, weight of the consistency loss", (0, 1e6))
    consistency_ramp: float = _option(0.5, "CR-DPLL: share of the epochs over which lambda grows from 0", (0, 1))
    contrast_weight: float = _option(
        0.5,
        "PiCO and its kin: weight of the contrastive loss; PiCO+: in it, of reliable images beside the others",
        (0, 1e6),
    )
    contrast_temperature: float = _option(0.07, "PiCO and its kin: of the contrastive similarities", (0.001, 1000))
    prototype_start: int = _option(
        1,
        "PiCO and its kin: epoch from which prototypes move the confidence; the first is 0, of ALIM and IRNet 1",
        (0, 1_000_000),
    )
    prototype_momentum: float = _option(0.99, "PiCO and its kin: momentum of the class prototypes", (0, 0.999999))
    key_momentum: float = _option(0.999, "PiCO and its kin: momentum of the encoder that makes the keys", (0, 0.999999))
    confidence_momentum: list[float] = _option(
        [0.95, 0.8], "PiCO and its kin: phi in the first and in the last epoch", (0, 1)
    )
    queue_size: int = _option(8192, "PiCO and its kin: keys kept for contrast", (1, 10_000_000))
    projection_dim: int = _option(128, "D, width of the projected features", (1, 65_536))
    mixup_alpha: float = _option(4.0, "PiCO+, ALIM: MixUp's lambda is drawn from Beta(alpha, alpha)", (0, 1e6))
    pure_ratio: float = _option(0.6, "PiCO+: share of the images that count as reliable", (0.001, 1))
    neighbours: int = _option(
        16, "PiCO+: nearest features that an unreliable image is drawn to, its own included", (1, 1_000_000)
    )
    neighbour_start: float = _option(0.125, "PiCO+: share of the epochs before that begins", (0, 1))
    correction_start: float = _option(0.1, "ALIM, IRNet: share of the epochs before candidate sets are doubted", (0, 1))
    noise_rate: float = _option(
        -1.0,
        "ALIM: share of candidate sets without the truth; -1 to count it on labelled images, if there are any",
        (-1, 0.999999),
    )
    importance: float = _option(
        0.4, "ALIM: lambda, weight of classes outside the set, where the noise rate is unknown", (0, 1)
    )
    correction_margin: float = _option(
        0.2, "IRNet: tau times C, by how much a score outside the set has to be larger", (0, 1e6)
    )
    symmetric: bool = _option(False, "IRNet: symmetric cross-entropy, as its authors use on CIFAR-10")


_DEEP: dict[str, Any] = {
    "optimizer": "sgd",
    "lr": 0.05,
    "lr_floor": 0,
    "lr_horizon": 0,
    "weight_decay": 1e-3,
    "batch_size": 256,
    "epochs": 250,
}
_LEVERAGED = {"optimizer": "sgd", "batch_size": 256, "epochs": 250, "schedule": "halving"}
_PICO = {
    "optimizer": "sgd",
    "lr": 0.01,
    "lr_floor": 1e-5,
    "lr_horizon": 0,
    "weight_decay": 1e-3,
    "batch_size": 256,
    "epochs": 800,
    "weak_view": "pico_weak",
    "strong_view": "pico_strong",
    "prototype_start": 1,
    "prototype_momentum": 0.99,
    "key_momentum": 0.999,
    "queue_size": 8192,
}
_NOISY = _PICO | {"batch_size": 128, "epochs": 1000}

_CR = {
    "optimizer": "sgd",
    "lr": 0.1,
    "weight_decay": 1e-4,
    "batch_size": 64,
    "epochs": 200,
    "schedule": "steps",
    "weak_view": "cr_weak",
    "strong_view": "cr_strong",
}
_ALIM = _NOISY | {"correction_start": 0.08}

# What the methods' authors train with, by data set as recipes name it; those of CIFAR-10 count where they give none. The
# backbone and the normalisation stay the recipe's. CC, RC and PRODEN: values in the range that their authors search.
OFFICIAL: dict[str, dict[str, dict[str, Any]]] = {
    "cc": {"cifar10": _DEEP},
    "rc": {"cifar10": _DEEP},
    "proden": {"cifar10": _DEEP},
    "supervised": {"cifar10": _DEEP},
    "lws": {"cifar10": _LEVERAGED | {"lr": 0.05, "weight_decay": 1e-3}},
    "lwc": {"cifar10": _LEVERAGED | {"lr": 0.01, "weight_decay": 1e-2}},
    "cr_dpll": {
        "cifar10": _CR,
        "cifar100": _CR,
        "svhn": _CR | {"weak_view": "plain", "strong_view": "cr_strong_svhn"},
        # the recipe's strong view: crop, flip and a square of 16 pixels, without a policy
        "fashion_mnist": _CR | {"strong_view": "strong"},
    },
    "pico": {"cifar10": _PICO, "cifar100": _PICO},
    "pico_plus": {
        "cifar10": _PICO | {"prototype_start": 5, "neighbours": 16},
        "cifar100": _PICO | {"prototype_start": 50, "neighbours": 5},
    },
    # tau is 0.02 of ten classes (their value for few candidates and little noise; 0.008 for many), 0.002 of a hundred
    "irnet": {
        "cifar10": _NOISY | {"correction_start": 0.15, "symmetric": True, "correction_margin": 10 * 0.02},
        "cifar100": _NOISY | {"correction_start": 0.15, "symmetric": False, "correction_margin": 100 * 0.002},
    },
    "alim_onehot": {"cifar10": _ALIM, "cifar100": _ALIM},
    "alim_scale": {"cifar10": _ALIM, "cifar100": _ALIM},
}
