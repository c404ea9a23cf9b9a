"""The settings of the methods that learn several labels an image, and what their authors train with.

As in `coreg.learn.partial_options`: a class for each method in `OPTIONS`, its authors' values by data set in `OFFICIAL`.
All of them train ResNet-50 from ImageNet weights at 448 px with Adam at a constant learning rate for 10 epochs, and keep
the epoch of the largest mAP on clean validation labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from coreg.config import advanced, option

Name = Literal[
    "bce", "bce_ls", "an", "wan", "an_ls", "n_ls", "iu", "l1r", "l2r", "pr", "epr", "role", "entmin", "em", "em_apl",
    "focal", "asl", "ll_r", "ll_ct", "ll_cp", "vlpl", "soft",
]  # fmt: skip
Evidence = Literal["image", "tiles", "ccd", "piaa"]
Values = dict[str, dict[str, Any]]


@dataclass
class MultiOptions:
    """several labels an image: which method, and how it is trained."""

    method: Name = option(
        "vlpl",
        "what is trained; bce and bce_ls take the true labels, an upper bound; each has options of its own: "
        "--method NAME --help",
    )
    preset: Literal["matched", "official"] = option(
        "matched",
        "matched: Co-Reg's student, batch and schedule; official: optimiser, epochs and numbers of the method's authors "
        "for --dataset, or for VOC where they give none",
    )
    view: Literal["weak", "plain"] = advanced(
        "weak",
        "views that are trained on; plain: as they are judged, of which a backbone that is frozen (--tuner linear) gives "
        "features once",
    )


@dataclass
class SmoothingOptions(MultiOptions):
    """label smoothing: how far targets are from 0 and 1."""

    smoothing: float = option(0.1, "epsilon: targets are epsilon and 1 - epsilon", (0, 1))


@dataclass
class PenaltyOptions(MultiOptions):
    """penalty: small weights of the network."""

    penalty: float = option(1e-6, "lambda, weight of the sum of absolute or squared weights", (0, 1e6))


@dataclass
class CountOptions(MultiOptions):
    """expected positives: how many labels an image has."""

    expected_positives: float = option(1.5, "k, labels that an image has on average", (0, 1e6))


@dataclass
class ROLEOptions(CountOptions):
    """ROLE: a table of labels that is learned too."""

    estimate_speed: float = advanced(10.0, "learning rate of the table, in those of the network", (0, 1e6))
    linear_epochs: int = option(
        0,
        "first epochs, in which classifier and table alone are trained, on features of the network as it begins (ROLE+LI: "
        "25 of 35)",
        (0, 1_000_000),
    )


@dataclass
class EntropyOptions(MultiOptions):
    """entropy of unknown labels."""

    entropy_weight: float = option(0.1, "alpha, weight of the entropy of unknown labels", (0, 1e6))


@dataclass
class EMAPLOptions(EntropyOptions):
    """EM+APL: unknown labels that become softly absent."""

    pseudo_after: int = option(5, "epochs before unknown labels become absent", (0, 1_000_000))
    pseudo_share: float = option(0.9, "share of the unknown labels that are absent in the end", (0, 1))
    pseudo_weight: float = option(0.1, "beta, weight of the labels that have become absent", (0, 1e6))


@dataclass
class FocalOptions(MultiOptions):
    """focal loss: cells that are predicted well count less."""

    focus: float = option(2.0, "gamma, exponent of what is missing from a right prediction", (0, 100))
    balance: float = option(0.25, "alpha, weight of present labels, of absent ones 1 - alpha; -1 for none", (-1, 1))


@dataclass
class ASLOptions(MultiOptions):
    """asymmetric loss: absent labels that are predicted well hardly count."""

    focus_absent: float = option(4.0, "gamma-, exponent of absent labels", (0, 100))
    focus_present: float = option(1.0, "gamma+, exponent of present labels", (0, 100))
    margin: float = option(0.05, "m, probability up to which an absent label does not count", (0, 1))


@dataclass
class LargeLossOptions(MultiOptions):
    """large losses: unknown labels that may be present."""

    large_share: float = option(
        0.002, "share of all labels of a batch that are doubted, of ll_r and ll_ct that many more in every epoch", (0, 1)
    )
    head_speed: float = advanced(1.0, "learning rate of the classifier, in those of the rest of the network", (0, 1e6))


EVIDENCE = (
    "what the annotator holds probable by: the whole image; tiles, the largest in it or a tile of it; ccd, debiased by "
    "label, with a share of the tiles; piaa, Gaussians of tiles; all but the first need a store with --tiles"
)
TEMPERATURE = (
    "tau, of the softmax over the annotator's similarities to the labels, 0 for the annotator's own; piaa has its own"
)


@dataclass
class SoftOptions(MultiOptions):
    """soft targets: labels that are as present as an annotator holds them probable."""

    evidence: Evidence = option("tiles", EVIDENCE)
    temperature: float = option(0.0, TEMPERATURE, (0, 1e3))


@dataclass
class VLPLOptions(EntropyOptions):
    """VLPL: labels that an annotator suggests."""

    evidence: Evidence = option("image", EVIDENCE)
    temperature: float = option(0.03, TEMPERATURE, (0, 1e3))
    suggestion_threshold: float = option(0.3, "theta, probability above which a label is suggested", (0, 1))
    suggestion_weight: float = option(0.7, "beta, weight of labels that are suggested to be present", (0, 1e6))
    absent_share: float = option(
        0.0, "delta, share of the labels of an image, the least probable ones, that are suggested to be absent", (0, 1)
    )
    absent_weight: float = option(0.0, "gamma, weight of labels that are suggested to be absent", (0, 1e6))
    smoothing: float = option(0.1, "distance of a suggested label's target from 0 or 1", (0, 1))
    focal: bool = option(False, "focal factors in the place of weights and smoothing")


def _values(batch_sizes: tuple[int, int, int, int], **numbers: tuple[float, float, float, float]) -> Values:
    """By data set; a constant learning rate is a cosine schedule that ends where it begins."""
    table: Values = {}
    for place, dataset in enumerate(("voc", "coco", "nuswide", "cub")):
        lr = 1e-4 if dataset == "cub" else 1e-5
        table[dataset] = {"optimizer": "adamw", "lr": lr, "lr_floor": lr, "weight_decay": 0.0, "epochs": 10}
        table[dataset] |= {"batch_size": batch_sizes[place]}
        table[dataset] |= {name: values[place] for name, values in numbers.items()}
    return table


# Cole et al. search batches of 8 and 16 and rates from 1e-5 to 1e-2 for each method and give no values; these are EM's
_SEARCHED = _values((8, 16, 16, 8))
_COUNT = _values((8, 16, 16, 8), expected_positives=(1.5, 2.9, 1.9, 31.4))
_ENTROPY = {"entropy_weight": (0.2, 0.1, 0.1, 0.01)}
_EM = _values((8, 16, 16, 8), **_ENTROPY)
_EM_APL = _values((8, 16, 16, 8), **_ENTROPY, pseudo_after=(5, 5, 4, 3), pseudo_weight=(0.02, 0.9, 0.2, 0.4))
# Kim et al. search the share from 0.1 % to 0.5 %
_LARGE = _values((16, 16, 16, 16), head_speed=(10.0, 10.0, 10.0, 10.0))
# of the paper, section 4.7: the public code takes 0.01 and 0.3 for every data set unless it is given others
_VLPL = _values(
    (8, 8, 8, 8),
    **_ENTROPY,
    temperature=(0.03, 0.01, 0.03, 0.03),
    suggestion_threshold=(0.3, 0.3, 0.1, 0.01),
    suggestion_weight=(0.7, 0.7, 0.7, 0.7),
)

# method -> its name in reports, its options, what its authors train with
_METHODS: dict[str, tuple[str, type[MultiOptions], Values]] = {
    "bce": ("BCE", MultiOptions, _SEARCHED),
    "bce_ls": ("BCE-LS", SmoothingOptions, _SEARCHED),
    "an": ("AN", MultiOptions, _SEARCHED),
    "wan": ("WAN", MultiOptions, _SEARCHED),
    "an_ls": ("LS-AN", SmoothingOptions, _SEARCHED),
    "n_ls": ("N-LS", SmoothingOptions, _SEARCHED),
    "iu": ("IU", MultiOptions, _SEARCHED),
    "l1r": ("L1R", PenaltyOptions, _SEARCHED),
    "l2r": ("L2R", PenaltyOptions, _SEARCHED),
    "pr": ("Pairwise rank", MultiOptions, _SEARCHED),
    "epr": ("EPR", CountOptions, _COUNT),
    "role": ("ROLE", ROLEOptions, _COUNT),
    "entmin": ("EntMin", EntropyOptions, _EM),
    "em": ("EM", EntropyOptions, _EM),
    "em_apl": ("EM+APL", EMAPLOptions, _EM_APL),
    "focal": ("Focal", FocalOptions, _SEARCHED),
    "asl": ("ASL", ASLOptions, _SEARCHED),
    "ll_r": ("LL-R", LargeLossOptions, _LARGE),
    "ll_ct": ("LL-Ct", LargeLossOptions, _LARGE),
    "ll_cp": ("LL-Cp", LargeLossOptions, _LARGE),
    "vlpl": ("VLPL", VLPLOptions, _VLPL),
    "soft": ("Soft targets", SoftOptions, _SEARCHED),
}
NAMES = {name: shown for name, (shown, _, _) in _METHODS.items()}
OPTIONS = {name: options for name, (_, options, _) in _METHODS.items()}
OFFICIAL = {name: values for name, (_, _, values) in _METHODS.items()}
