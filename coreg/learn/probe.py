"""A linear classifier on frozen features, from soft labels or candidate sets: a convex problem, solved and not trained."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 200  # of L-BFGS, at most


def probe_loss(weight: Tensor, bias: Tensor, features: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Mean cross-entropy to soft labels, or of candidate sets, plus penalty/2 |W|^2.

    Args:
        weight: (C, D). bias: (C,). features: (n, D).
        targets: float (n, C), distributions t: -sum_c t_c log p_c; or bool (n, C), sets S: -log sum of p_c over S, the
            partial cross-entropy (Jin and Ghahramani, NeurIPS 2002).
    """
    log_p = torch.log_softmax(features @ weight.T + bias, dim=1)
    if targets.dtype == torch.bool:
        loss = -log_p.masked_fill(~targets, -torch.inf).logsumexp(dim=1).mean()
    else:
        loss = -(targets * log_p).sum(dim=1).mean()
    return loss + penalty / 2 * weight.square().sum()


def fit_probe(features: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor, float]:
    """Weight (C, D) and bias (C,) for features as they are, float64, and the loss that they reach.

    Features are standardised for the fit, so that the penalty weighs them equally, and the scales are folded into the
    weights afterwards; one that does not vary gets the weight 0.

    Args:
        features: (n, D), n >= 1. targets: as of `probe_loss`.
    """
    features = features.double()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    scale = torch.where(deviation > 1e-6 * mean.abs(), 1 / deviation.clamp_min(1e-300), 0.0)
    z = (features - mean) * scale
    targets = targets if targets.dtype == torch.bool else targets.double()
    weight = torch.zeros(targets.shape[1], z.shape[1], dtype=torch.float64, device=z.device, requires_grad=True)
    bias = torch.zeros(targets.shape[1], dtype=torch.float64, device=z.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = probe_loss(weight, bias, z, targets, penalty)
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        loss = float(probe_loss(weight, bias, z, targets, penalty))
        return weight * scale, bias - (weight * scale) @ mean, loss
