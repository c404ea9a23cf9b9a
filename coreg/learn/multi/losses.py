"""Losses of several labels an image as pure functions that return one value a cell.

Cells are never averaged here: a loss is a mean over the cells of all processes, so the caller sums those it holds and
divides by the global count. Reductions run in float32 or wider, whatever the inputs are.

Shapes: n images, L labels; logits (n, L), p their sigmoid; observed (n, L), +1 present, -1 absent, 0 unknown. nl(x) is
-log(x + 1e-5) as in the public code of single-positive learning (Cole et al., CVPR 2021, and those that build on it), so
that a cell whose p is below 1e-5 draws hardly at all; H(p) = p nl(p) + (1-p) nl(1-p). What is observed to be absent counts
nl(1-p) in every loss that does not say otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coreg.learn.losses import wide

EPSILON = 1e-5


def _either(where: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """One number or the other, in the dtype of `like`: `torch.where` would round them to float32 before."""
    return torch.full_like(like, no).masked_fill(where, yes)


def probabilities(logits: Tensor) -> tuple[Tensor, Tensor]:
    """p and 1-p, float32 or wider, shape of `logits` each."""
    z = wide(logits)
    return torch.sigmoid(z), torch.sigmoid(-z)


def negative_log(p: Tensor) -> Tensor:
    """nl(p), shape of `p`."""
    return -torch.log(p + EPSILON)


def log_losses(logits: Tensor) -> tuple[Tensor, Tensor]:
    """nl(p) and nl(1-p): the loss of each label as present and as absent. (n, L) each."""
    p, q = probabilities(logits)
    return negative_log(p), negative_log(q)


def soft_loss(logits: Tensor, target: Tensor | float) -> Tensor:
    """t nl(p) + (1-t) nl(1-p) for targets t in [0, 1], (n, L) or a number. -> (n, L)."""
    present, absent = log_losses(logits)
    return target * present + (1 - target) * absent


def entropy(logits: Tensor) -> Tensor:
    """H(p), (n, L)."""
    return soft_loss(logits, torch.sigmoid(wide(logits)))


def assume_negative(logits: Tensor, observed: Tensor, unknown_weight: float = 1.0) -> Tensor:
    """Unknown labels count as absent, with this weight (AN; WAN with 1 / (L-1)). -> (n, L).

    Where all labels are observed it is the binary cross-entropy.
    """
    present, absent = log_losses(logits)
    return torch.where(observed > 0, present, _either(observed == 0, unknown_weight, 1.0, absent) * absent)


def smoothed(logits: Tensor, observed: Tensor, smoothing: float, unknown_alone: bool = False) -> Tensor:
    """`assume_negative` with targets 1-smoothing and smoothing (LS-AN), or so for unknown labels alone (N-LS). -> (n, L).

    Cole et al. write smoothing / 2 in the paper; this is their code.
    """
    share = _either(observed == 0, smoothing, 0.0 if unknown_alone else smoothing, wide(logits.detach()))
    return soft_loss(logits, torch.where(observed > 0, 1 - share, share))


def ignore_unknown(logits: Tensor, observed: Tensor) -> Tensor:
    """Observed labels alone; unknown ones count 0 (IU, and IUN where all absent labels are observed). -> (n, L)."""
    return torch.where(observed == 0, 0.0, assume_negative(logits, observed))


def with_entropy(logits: Tensor, observed: Tensor, weight: float) -> Tensor:
    """Unknown labels count `weight` H(p). -> (n, L).

    A positive weight makes them sure (EntMin), a negative one unsure (EM, Zhou et al., ECCV 2022).
    """
    return torch.where(observed == 0, weight * entropy(logits), assume_negative(logits, observed))


def pairwise_rank(logits: Tensor, observed: Tensor) -> Tensor:
    """Sum over the labels j that are not observed to be present of max(0, 1 - p_i + p_j), for each i that is. -> (n, L)."""
    p, _ = probabilities(logits)
    short = (1 - p[:, :, None] + p[:, None, :]).clamp_min(0)
    return (short * (observed <= 0)[:, None, :]).sum(dim=2) * (observed > 0)


def focal(logits: Tensor, observed: Tensor, gamma: float, alpha: float) -> Tensor:
    """Focal loss with unknown labels as absent (Lin et al., ICCV 2017); alpha < 0 for none. -> (n, L)."""
    target = (observed > 0).to(wide(logits).dtype)
    p, q = probabilities(logits)
    missing = torch.where(target > 0, q, p)
    loss = F.binary_cross_entropy_with_logits(wide(logits), target, reduction="none") * missing**gamma
    return loss if alpha < 0 else _either(target > 0, alpha, 1 - alpha, target) * loss


def asymmetric(logits: Tensor, observed: Tensor, gamma_absent: float, gamma_present: float, margin: float) -> Tensor:
    """Asymmetric loss with unknown labels as absent (Ridnik et al., ICCV 2021), as timm differentiates it. -> (n, L).

    The gradient goes through the focusing factors too; that of the authors' default does not.
    """
    p, q = probabilities(logits)
    q = (q + margin).clamp(max=1)
    chance = torch.where(observed > 0, p, q)
    gamma = _either(observed > 0, gamma_present, gamma_absent, p.detach())
    return -torch.log(chance.clamp(min=1e-8)) * (1 - chance) ** gamma


def suggested_labels(
    logits: Tensor, observed: Tensor, suggested: Tensor, alpha: float, beta: float, gamma: float, smoothing: float
) -> Tensor:
    """Loss of VLPL (Xing et al., CVPR workshops 2024) with the sign of its code and of its section 4.6. -> (n, L).

    Unknown labels that the annotator suggests to be present count beta ((1-s) nl(p) + s nl(1-p)), those that it suggests to
    be absent gamma (s nl(p) + (1-s) nl(1-p)), and the others -alpha H(p). In eq. 4 to 6 the smoothed term stands within the
    minus of the others, which would turn its sign.

    Args:
        suggested: int (n, L), +1 present, -1 absent, 0 neither. smoothing: s.
    """
    unknown = -alpha * entropy(logits)
    unknown = torch.where(suggested > 0, beta * soft_loss(logits, 1 - smoothing), unknown)
    unknown = torch.where(suggested < 0, gamma * soft_loss(logits, smoothing), unknown)
    return torch.where(observed == 0, unknown, assume_negative(logits, observed))


def suggested_labels_focal(logits: Tensor, observed: Tensor, suggested: Tensor) -> Tensor:
    """`suggested_labels` with focal factors in the place of weights and smoothing, as public code has it. -> (n, L).

    (1-p)^2 nl(p) where present, suggested or observed; p^4 nl(1-p) where absent; -(1-p)^4 H(p) elsewhere.
    """
    p, q = probabilities(logits)
    state = torch.where(observed == 0, suggested, observed)
    loss = torch.where(state > 0, q**2 * negative_log(p), -(q**4) * entropy(logits))
    return torch.where(state < 0, p**4 * negative_log(q), loss)


def large_losses(losses: Tensor, unknown: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The unknown cells of a batch with the `count` largest losses (Kim et al., CVPR 2022).

    Args:
        losses: (n, L). unknown: bool (n, L). count: of the global batch; of fewer unknown cells all.

    Returns:
        bool (n, L): cells with at least the count-th largest loss, and cells strictly above it.
    """
    ordered = losses[unknown].sort(descending=True).values[:count]
    if not len(ordered):
        return torch.zeros_like(unknown), torch.zeros_like(unknown)
    return unknown & (losses >= ordered[-1]), unknown & (losses > ordered[-1])
