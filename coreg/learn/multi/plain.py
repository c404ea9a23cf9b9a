"""Methods without a memory: each is one loss of the logits and the observed labels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from coreg.learn.multi.losses import (
    assume_negative,
    asymmetric,
    focal,
    ignore_unknown,
    pairwise_rank,
    smoothed,
    with_entropy,
)
from coreg.learn.multi_options import MultiOptions

# (logits (l, L), observed labels int8 (l, L), options) -> (l, L), the loss of each cell
CELLS: dict[str, Callable[[Tensor, Tensor, MultiOptions], Tensor]] = {
    # assume negative: what is not observed to be present is absent; on true labels the binary cross-entropy
    "an": lambda z, y, _: assume_negative(z, y),
    # AN whose unknown labels weigh 1 / (L-1), as much together as one present label (Mac Aodha et al., ICCV 2019); of one
    # label alone there is none to share the weight
    "wan": lambda z, y, _: assume_negative(z, y, 1 / max(z.shape[1] - 1, 1)),
    # AN with label smoothing (Cole et al., CVPR 2021); on true labels the smoothed binary cross-entropy
    "an_ls": lambda z, y, options: smoothed(z, y, options.smoothing),
    # AN with label smoothing of the unknown labels alone
    "n_ls": lambda z, y, options: smoothed(z, y, options.smoothing, unknown_alone=True),
    # ignore what is unknown: only observed labels count
    "iu": lambda z, y, _: ignore_unknown(z, y),
    # pairwise rank: an observed label's p is to lie 1 above that of each other one
    "pr": lambda z, y, _: pairwise_rank(z, y),
    # observed labels, and predictions of unknown ones that are drawn to be sure; degenerate, a warning
    "entmin": lambda z, y, options: with_entropy(z, y, options.entropy_weight),
    # entropy maximisation: unknown labels are acknowledged to be unknown (Zhou et al., ECCV 2022)
    "em": lambda z, y, options: with_entropy(z, y, -options.entropy_weight),
    # AN with the focal loss (Lin et al., ICCV 2017)
    "focal": lambda z, y, options: focal(z, y, options.focus, options.balance),
    # AN with the asymmetric loss (Ridnik et al., ICCV 2021), a mean over cells where libraries sum over the labels
    "asl": lambda z, y, options: asymmetric(z, y, options.focus_absent, options.focus_present, options.margin),
}
