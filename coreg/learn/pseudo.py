"""From predictions to training targets: rescaling, fusing, sharpening, MixUp.

Shapes: n rows, C classes. Everything here is without gradient by nature: targets are constants of a step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coreg.data.keyed import keyed_generator


def rescale(probabilities: Tensor, candidates: Tensor) -> Tensor:
    """Probabilities restricted to the candidate set and renormalised, p of the P split (AAAI eq. 4).

    A row with no mass left on its candidates becomes uniform over them instead of NaN.

    Args:
        probabilities: (n, C). candidates: bool (n, C), at least one True a row.

    Returns:
        (n, C), rows sum to 1, zero outside the candidate set.
    """
    kept = probabilities * candidates
    mass = kept.sum(dim=-1, keepdim=True)
    uniform = candidates / candidates.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, kept / mass.clamp_min(torch.finfo(kept.dtype).tiny), uniform.to(kept.dtype))


def sharpen(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1/T) renormalised (AAAI eq. 6), in log space: p^2 of a tiny p would underflow. (n, C) -> (n, C)."""
    return torch.softmax(probabilities.log() / temperature, dim=-1)


def fuse_trusted(peer: Tensor, own: Tensor, weight: Tensor) -> Tensor:
    """Pseudo-label of P before sharpening: w p + (1 - w) p-bar (AAAI eq. 5).

    Args:
        peer: (n, C), p, the dividing network's prediction rescaled to the candidate set.
        own: (n, C), p-bar, the mean of the own network's predictions on the weak views.
        weight: (n,), w, the posterior of the small-loss component.
    """
    return weight[:, None] * peer + (1 - weight[:, None]) * own


def mix(values: Tensor, partners: Tensor, share: float) -> Tensor:
    """MixUp: lambda values + (1 - lambda) partners, the same for inputs (n, ...) and targets (n, C)."""
    return share * values + (1 - share) * partners


def draw_mixup(alpha: float, n: int, key: tuple[int | str, ...]) -> tuple[float, np.ndarray]:
    """MixUp's lambda and partners for n rows, a function of the key (Berthelot et al., "MixMatch", 2019, eq. 8-9).

    Returns:
        lambda of Beta(alpha, alpha), at least 1/2, so that a mixed row is nearer to its own than to its partner; and a
        permutation int64 (n,). With alpha 0 nothing is mixed: 1, and every row is its own partner.
    """
    if not alpha:
        return 1.0, np.arange(n)
    draw = keyed_generator(*key)
    kept = float(draw.beta(alpha, alpha))
    return max(kept, 1 - kept), draw.permutation(n)
