"""What is random about the colours of a view: which operations a row gets, in which order and how strong.

RandomAugment (PiCO, Wang et al., ICLR 2022; after RandAugment, Cubuk et al., 2020), torchvision's ColorJitter with
RandomGrayscale (PiCO's weak view), and AutoAugment's learned policies (Cubuk et al., CVPR 2019). Every function takes
uint8 images (n, c, size, size) with c = 1 or 3 and uniform draws in [0, 1) (n, columns) on the CPU, one column for
every parameter, and returns new images.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from coreg.views.augment_ops import apply_ops
from coreg.views.operations import RANDAUGMENT

_JITTER = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "color": (0.6, 1.4), "hue": (-0.1, 0.1)}
_JITTER_CHANCE, _GREY_CHANCE = 0.8, 0.2
COLOUR_JITTER_DRAWS = 2 + 2 * len(_JITTER)  # whether to jitter, whether to grey, magnitudes, ranks in the order

# AutoAugment's name of an operation -> ours, its magnitude at levels 0 and 9 of 0..9, and what the magnitude is added to
# or, by a random sign, taken from; None: the magnitude is taken as it is. Magnitudes of translations are shares of 331
# pixels, whole pixels of the image once scaled.
_AUTO_OPS = {
    "AutoContrast": ("auto_contrast", 0.0, 0.0, None),
    "Brightness": ("brightness", 0.0, 0.9, 1.0),
    "Color": ("color", 0.0, 0.9, 1.0),
    "Contrast": ("contrast", 0.0, 0.9, 1.0),
    "Equalize": ("equalize", 0.0, 0.0, None),
    "Identity": ("identity", 0.0, 0.0, None),
    "Invert": ("invert", 0.0, 0.0, None),
    "Posterize": ("posterize", 8.0, 4.0, None),
    "Sharpness": ("sharpness", 0.0, 0.9, 1.0),
    "Solarize": ("solarize", 255.0, 0.0, None),
    "Rotate": ("rotate", 0.0, 30.0, 0.0),
    "ShearX": ("shear_x", 0.0, 0.3, 0.0),
    "ShearY": ("shear_y", 0.0, 0.3, 0.0),
    "TranslateX": ("translate_x", 0.0, 150 / 331, 0.0),
    "TranslateY": ("translate_y", 0.0, 150 / 331, 0.0),
}
_AUTO_NAMES = [name for name, *_ in _AUTO_OPS.values()]
AUTO_AUGMENT_DRAWS = 5  # sub-policy; for either of its two operations whether, and the sign


def random_augment(images: Tensor, draws: Tensor, names: Sequence[str]) -> Tensor:
    """An operation for every two columns (which, how strong), uniform with replacement over `names` of `RANDAUGMENT`."""
    names = sorted(names, key=list(RANDAUGMENT).index)
    lowest, highest = torch.tensor([RANDAUGMENT[name] or (0, 1) for name in names], dtype=torch.float64).view(-1, 2).T
    draws = draws.double()
    for column in range(0, draws.shape[1], 2):
        which = (draws[:, column] * len(names)).long()
        magnitudes = lowest[which] + (highest - lowest)[which] * draws[:, column + 1]
        images = apply_ops(images, names, which, magnitudes)
    return images


def colour_jitter(images: Tensor, draws: Tensor) -> Tensor:
    """ColorJitter(0.4, 0.4, 0.4, 0.1) with chance 0.8, its four operations in random order, then grey with chance 0.2.

    draws: (n, COLOUR_JITTER_DRAWS). Grey images have no saturation and no hue to change.
    """
    draws = draws.double()
    jittered = draws[:, 0] < _JITTER_CHANCE
    lowest, highest = torch.tensor(list(_JITTER.values()), dtype=torch.float64).T
    magnitudes = lowest + (highest - lowest) * draws[:, 2 : 2 + len(_JITTER)]
    order = draws[:, 2 + len(_JITTER) :].argsort(1)
    for place in range(len(_JITTER)):
        turn = order[:, place : place + 1]
        which = torch.where(jittered, turn.squeeze(1) + 1, 0)
        images = apply_ops(images, ("identity", *_JITTER), which, magnitudes.gather(1, turn).squeeze(1))
    return apply_ops(images, ("identity", "grey"), (draws[:, 1] < _GREY_CHANCE).long(), draws[:, 1])


@functools.cache
def _sub_policies(policy: str, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of both operations of every sub-policy (25, 2): position in _AUTO_NAMES, chance, fixed and signed magnitude."""
    from torchvision.transforms import AutoAugment, AutoAugmentPolicy  # slow to import, and not every view needs it

    rows = []
    for theirs, chance, level in itertools.chain.from_iterable(AutoAugment(AutoAugmentPolicy(policy)).policies):
        name, first, last, centre = _AUTO_OPS[theirs]
        magnitude = torch.linspace(first, last * size if "Translate" in theirs else last, 10)[level or 0].item()
        if "Translate" in theirs:
            magnitude = -int(magnitude) / size
        elif theirs == "Posterize":
            magnitude = round(magnitude)
        parts = (magnitude, 0.0) if centre is None else (centre, magnitude)
        rows.append((_AUTO_NAMES.index(name), chance, *parts))
    which, chance, fixed, signed = torch.tensor(rows, dtype=torch.float64).view(-1, 2, 4).unbind(2)
    return which.long(), chance, fixed, signed


def auto_augment(images: Tensor, draws: Tensor, policy: str) -> Tensor:
    """One of the 25 sub-policies of "cifar10" or "svhn" (those of torchvision), each two operations with a chance.

    draws: (n, AUTO_AUGMENT_DRAWS).
    """
    which, chance, fixed, signed = _sub_policies(policy, images.shape[-1])
    draws = draws.double()
    drawn = (draws[:, 0] * len(which)).long()
    for step in range(2):
        happens, sign = draws[:, 1 + step] < chance[drawn, step], torch.where(draws[:, 3 + step] < 0.5, -1, 1)
        chosen = torch.where(happens, which[drawn, step], _AUTO_NAMES.index("identity"))
        images = apply_ops(images, _AUTO_NAMES, chosen, fixed[drawn, step] + sign * signed[drawn, step])
    return images
