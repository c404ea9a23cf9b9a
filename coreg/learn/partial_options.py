"""The settings of the single-network partial-label methods, and what their authors train with.

Each method has a class in `OPTIONS`, with its own hyper-parameters beside what all have. `OFFICIAL` holds, for each method,
the values of its authors by data set as recipes name it; the first ones count where they give none. Backbone and
normalisation stay the recipe's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from coreg.config import advanced, option

Name = Literal[
    "cc", "rc", "proden", "abs_mae", "abs_gce", "cavl", "pop", "lws", "lwc", "cr_dpll", "pico", "pico_plus", "irnet",
    "alim_onehot", "alim_scale", "able", "idgp", "solar", "records", "htc", "supervised",
]  # fmt: skip
# of `coreg.views.augment.VIEWS`
View = Literal[
    "plain", "weak", "strong", "pico_weak", "pico_strong", "cr_weak", "cr_strong", "cr_strong_svhn", "clip_train"
]  # fmt: skip
Values = dict[str, dict[str, Any]]


@dataclass
class PartialOptions:
    """partial-label method: which method, and how it is trained."""

    method: Name = option(
        "proden",
        "what is trained; supervised takes the store's true labels, an upper bound; each has options of its own: "
        "--method NAME --help",
    )
    preset: Literal["matched", "official"] = option(
        "matched",
        "matched: Co-Reg's student, batch, schedule and views; official: optimiser, epochs, batch and views of the "
        "method's authors for --dataset, or for CIFAR-10 where they give none",
    )
    weak_view: View = advanced("weak", "what a weak view is")
    schedule: Literal["cosine", "halving", "steps"] = advanced(
        "cosine", "learning rate: cosine to --lr_floor, halved five times, or a tenth at half and at three quarters"
    )

    # of networks whose projected features, and of methods whose strong views, are not used
    projection_dim: ClassVar[int] = 128
    strong_view: ClassVar[View] = "strong"


# CC, RC and PRODEN: values in the range that their authors search
_DEEP: Values = {
    "cifar10": {"optimizer": "sgd", "lr": 0.05, "lr_floor": 0, "lr_horizon": 0, "weight_decay": 1e-3}
    | {"batch_size": 256, "epochs": 250}
}


@dataclass
class ABSGCEOptions(PartialOptions):
    """ABS-GCE: the generalised cross-entropy."""

    gce_exponent: float = option(0.7, "q, from a cross-entropy (towards 0) to the absolute error (1)", (0.001, 1))


@dataclass
class POPOptions(PartialOptions):
    """POP: candidate sets that lose classes for good."""

    purify_after: int = option(20, "epochs before a class can leave a candidate set", (0, 1_000_000))
    purify_window: int = option(5, "W, epochs between two purifications, whose confidences are averaged", (1, 1000))
    purify_threshold: float = option(
        0.001, "theta, share of the largest confidence below which a class leaves, in the beginning", (0, 1)
    )
    threshold_growth: float = option(0.001, "share by which theta grows where hardly any class leaves", (0, 1e6))


@dataclass
class LeveragedOptions(PartialOptions):
    """leveraged weighted loss: the loss of LWS and LWC."""

    leverage: float = option(1.0, "beta, weight of the classes outside the candidate set", (0, 1e6))


_LEVERAGED = {"optimizer": "sgd", "batch_size": 256, "epochs": 250, "schedule": "halving"}
_LWS: Values = {"cifar10": _LEVERAGED | {"lr": 0.05, "weight_decay": 1e-3}}
_LWC: Values = {"cifar10": _LEVERAGED | {"lr": 0.01, "weight_decay": 1e-2}}


@dataclass
class CRDPLLOptions(PartialOptions):
    """CR-DPLL: consistency of three views of an image."""

    strong_view: View = advanced("strong", "what a strong view is; the authors' views of SVHN: plain and cr_strong_svhn")
    consistency_weight: float = option(1.0, "lambda, weight of the consistency loss", (0, 1e6))
    consistency_ramp: float = option(0.5, "share of the epochs over which lambda grows from 0", (0, 1))


_CR = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 1e-4, "batch_size": 64, "epochs": 200, "schedule": "steps"}
_CR |= {"weak_view": "cr_weak", "strong_view": "cr_strong"}
_CR_DPLL: Values = {
    "cifar10": _CR,
    "cifar100": _CR,
    "svhn": _CR | {"weak_view": "plain", "strong_view": "cr_strong_svhn"},
    # the recipe's strong view: crop, flip and a square of 16 pixels, without a policy
    "fashion_mnist": _CR | {"strong_view": "strong"},
}


@dataclass
class PiCOOptions(PartialOptions):
    """PiCO: contrast, and prototypes that move a confidence."""

    strong_view: View = advanced("strong", "what a strong view is")
    contrast_weight: float = option(0.5, "weight of the contrastive loss", (0, 1e6))
    contrast_temperature: float = advanced(0.07, "temperature of the contrastive similarities", (0.001, 1000))
    prototype_start: int = option(
        1, "epoch from which prototypes move the confidence; the first is 0, of ALIM and IRNet 1", (0, 1_000_000)
    )
    prototype_momentum: float = advanced(0.99, "momentum of the class prototypes", (0, 0.999999))
    key_momentum: float = advanced(0.999, "momentum of the encoder that makes the keys", (0, 0.999999))
    confidence_momentum: list[float] = advanced(
        [0.95, 0.8], "phi, momentum of the confidence in the first and in the last epoch", (0, 1)
    )
    queue_size: int = advanced(8192, "keys kept for contrast", (1, 10_000_000))
    projection_dim: int = advanced(128, "D, width of the projected features", (1, 65_536))


_PICO = {"optimizer": "sgd", "lr": 0.01, "lr_floor": 1e-5, "lr_horizon": 0, "weight_decay": 1e-3, "batch_size": 256}
_PICO |= {"epochs": 800, "weak_view": "pico_weak", "strong_view": "pico_strong"}
_PICO |= {"prototype_start": 1, "prototype_momentum": 0.99, "key_momentum": 0.999, "queue_size": 8192}
_NOISY = _PICO | {"batch_size": 128, "epochs": 1000}


@dataclass
class PiCOPlusOptions(PiCOOptions):
    """PiCO+: reliable images, and neighbours for the others."""

    mixup_alpha: float = advanced(4.0, "MixUp's lambda is drawn from Beta(alpha, alpha)", (0, 1e6))
    pure_ratio: float = option(0.6, "share of the images that count as reliable", (0.001, 1))
    neighbours: int = option(16, "nearest features that an unreliable image is drawn to, its own included", (1, 1_000_000))
    neighbour_start: float = option(
        0.125,
        "share of the epochs before neighbours count, from when on --contrast_weight is that of reliable images",
        (0, 1),
    )


_PICO_PLUS: Values = {
    "cifar10": _PICO | {"prototype_start": 5, "neighbours": 16},
    "cifar100": _PICO | {"prototype_start": 50, "neighbours": 5},
}


@dataclass
class IRNetOptions(PiCOOptions):
    """IRNet: classes that join a candidate set."""

    correction_start: float = option(0.1, "share of the epochs before candidate sets are doubted", (0, 1))
    correction_margin: float = option(0.2, "tau times C, by how much a score outside the set has to be larger", (0, 1e6))
    symmetric: bool = option(False, "symmetric cross-entropy, as the authors use on CIFAR-10")


# tau is 0.02 of ten classes (their value for few candidates and little noise; 0.008 for many), 0.002 of a hundred
_IRNET: Values = {
    "cifar10": _NOISY | {"correction_start": 0.15, "symmetric": True, "correction_margin": 10 * 0.02},
    "cifar100": _NOISY | {"correction_start": 0.15, "symmetric": False, "correction_margin": 100 * 0.002},
}


@dataclass
class ALIMOptions(PiCOOptions):
    """ALIM: the weight of classes outside a candidate set."""

    correction_start: float = option(0.1, "share of the epochs before candidate sets are doubted", (0, 1))
    mixup_alpha: float = advanced(4.0, "MixUp's lambda is drawn from Beta(alpha, alpha)", (0, 1e6))
    noise_rate: float = option(
        -1.0,
        "share of candidate sets without the truth; -1 to count it on labelled images, if there are any",
        (-1, 0.999999),
    )
    importance: float = option(0.4, "lambda, weight of classes outside the set, where the noise rate is unknown", (0, 1))


_ALIM: Values = dict.fromkeys(("cifar10", "cifar100"), _NOISY | {"correction_start": 0.08})


@dataclass
class ABLEOptions(PartialOptions):
    """ABLE: contrast among images that stand for a candidate."""

    strong_view: View = advanced("strong", "what a strong view is")
    contrast_weight: float = option(1.0, "weight of the contrastive loss", (0, 1e6))
    contrast_temperature: float = advanced(0.1, "temperature of the contrastive similarities", (0.001, 1000))
    projection_dim: int = advanced(128, "D, width of the projected features", (1, 65_536))


_COSINE = {"optimizer": "sgd", "lr": 0.01, "lr_floor": 1e-5, "lr_horizon": 0, "weight_decay": 1e-3, "batch_size": 256}
_ABLE: Values = {"cifar10": _COSINE | {"batch_size": 64, "epochs": 500, "contrast_temperature": 0.1}}


@dataclass
class IDGPOptions(PartialOptions):
    """IDGP: a second network for how candidates come about."""

    joint_start: float = option(
        0.05, "share of the steps in which the classifier and the network of candidates learn apart", (0, 1)
    )
    divergence_ramp: float = option(
        0.2, "share of the steps over which the divergences from the tables of both grow from 0", (0, 1)
    )


_IDGP: Values = {"cifar100": _COSINE | {"lr": 0.001, "epochs": 500, "joint_start": 5 / 500}}


@dataclass
class SoLarOptions(PartialOptions):
    """SoLar: soft labels that obey the class prior."""

    strong_view: View = advanced("strong", "what a strong view is")
    mixup_alpha: float = advanced(4.0, "MixUp's lambda is drawn from Beta(alpha, alpha)", (0, 1e6))
    estimation: float = option(
        0.1, "share of the epochs that only estimate the class prior; after them the network begins anew", (0, 0.9)
    )
    prior_rate: list[float] = advanced(
        [0.1, 0.01], "gamma, by how much an epoch moves the class prior, in the estimation and after it", (0, 1)
    )
    selected: list[float] = advanced(
        [0.2, 0.8], "rho, share of each class that is trained on the plan, at first and after the ramp", (0, 1)
    )
    selection_ramp: float = option(
        0.05, "share of the epochs over which rho and the plan's weight grow; those of the estimation do not count", (0, 1)
    )
    plan_weight: float = option(0.9, "eta, weight of the plan's loss after the ramp; the others have the rest", (0, 1))
    plan_queue: int = advanced(4096, "earlier images that the plan takes in", (1, 10_000_000))
    sure: float = advanced(0.99, "tau, agreement of plan and prediction from which on an image is always selected", (0, 1))


_SOLAR_VALUES = _COSINE | {"epochs": 1000, "selection_ramp": 50 / 1000, "plan_queue": 64 * 256}
_SOLAR: Values = {
    "cifar10": _SOLAR_VALUES | {"estimation": 100 / 1000, "selected": [0.2, 0.6], "prior_rate": [0.1, 0.01]},
    "cifar100": _SOLAR_VALUES | {"estimation": 20 / 1000, "selected": [0.2, 0.5], "prior_rate": [0.05, 0.01]},
}


@dataclass
class RECORDSOptions(PartialOptions):
    """RECORDS: predictions without the class prior."""

    strong_view: View = advanced("strong", "what a strong view is")
    mixup_alpha: float = advanced(4.0, "MixUp's lambda is drawn from Beta(alpha, alpha)", (0, 1e6))
    mixup_weight: float = option(1.0, "weight of the loss on mixed views", (0, 1e6))
    update_start: int = option(
        1, "epoch from which the confidence moves and mixed views are trained on; the first is 0", (0, 1_000_000)
    )
    feature_momentum: float = advanced(0.9, "momentum of the mean feature that gives the class prior", (0, 0.999999))


_RECORDS: Values = dict.fromkeys(("cifar10", "cifar100"), _COSINE | {"epochs": 800, "update_start": 1})


@dataclass
class HTCOptions(PartialOptions):
    """HTC: one classifier for frequent, one for rare classes."""

    strong_view: View = advanced("strong", "what a strong view is")
    mixup_alpha: float = advanced(4.0, "MixUp's lambda is drawn from Beta(alpha, alpha)", (0, 1e6))
    logit_adjustment: float = option(2.0, "times the logarithm of the class prior that the tail's targets lack", (0, 1e6))
    confidence_rate: float = option(0.6, "mu, by how much a step moves the confidence to the tail's prediction", (0, 1))
    selected: list[float] = advanced(
        [0.2, 0.6], "alpha, share of each class whose strong and mixed views count, at first and after the ramp", (0, 1)
    )
    selection_ramp: float = option(0.0625, "share of the epochs over which alpha and the views' weight grow", (0, 1))
    strong_weight: float = option(0.9, "eta, weight of the strong and mixed views after the ramp", (0, 1e6))
    fusion_weight: float = option(0.5, "weight of the gate's loss in the last epoch, growing from 0", (0, 1e6))


_HTC: Values = dict.fromkeys(("cifar10", "cifar100"), _COSINE | {"epochs": 800, "selection_ramp": 50 / 800})

# method -> its name in reports, its options, what its authors train with
_METHODS: dict[str, tuple[str, type[PartialOptions], Values]] = {
    "cc": ("CC", PartialOptions, _DEEP),
    "rc": ("RC", PartialOptions, _DEEP),
    "proden": ("PRODEN", PartialOptions, _DEEP),
    "abs_mae": ("ABS-MAE", PartialOptions, _DEEP),
    "abs_gce": ("ABS-GCE", ABSGCEOptions, _DEEP),
    "cavl": ("CAVL", PartialOptions, _DEEP),
    "pop": ("POP", POPOptions, _DEEP),
    "lws": ("LWS", LeveragedOptions, _LWS),
    "lwc": ("LWC", LeveragedOptions, _LWC),
    "cr_dpll": ("CR-DPLL", CRDPLLOptions, _CR_DPLL),
    "pico": ("PiCO", PiCOOptions, dict.fromkeys(("cifar10", "cifar100"), _PICO)),
    "pico_plus": ("PiCO+", PiCOPlusOptions, _PICO_PLUS),
    "irnet": ("IRNet", IRNetOptions, _IRNET),
    "alim_onehot": ("ALIM-Onehot", ALIMOptions, _ALIM),
    "alim_scale": ("ALIM-Scale", ALIMOptions, _ALIM),
    "able": ("ABLE", ABLEOptions, _ABLE),
    "idgp": ("IDGP", IDGPOptions, _IDGP),
    "solar": ("SoLar", SoLarOptions, _SOLAR),
    "records": ("RECORDS", RECORDSOptions, _RECORDS),
    "htc": ("HTC", HTCOptions, _HTC),
    "supervised": ("Supervised", PartialOptions, _DEEP),
}
NAMES = {name: shown for name, (shown, _, _) in _METHODS.items()}
OPTIONS = {name: options for name, (_, options, _) in _METHODS.items()}
OFFICIAL = {name: values for name, (_, _, values) in _METHODS.items()}
