"""A linear or a cosine classifier on frozen features, from soft labels or candidate sets: solved by L-BFGS, not trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 200  # of L-BFGS, at most
SCALE = 20.0  # of cosines, to start with where no annotator has one


def probe_loss(weight: Tensor, bias: Tensor, features: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Mean cross-entropy to soft labels, or of candidate sets, plus penalty/2 |W|^2.

    Args:
        weight: (C, D). bias: (C,). features: (n, D).
        targets: float (n, C), distributions t: -sum_c t_c log p_c; or bool (n, C), sets S: -log sum of p_c over S, the
            partial cross-entropy (Jin and Ghahramani, NeurIPS 2002).
    """
    return _cross_entropy(features @ weight.T + bias, targets) + penalty / 2 * weight.square().sum()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits, dim=1)
    if targets.dtype == torch.bool:
        return -log_p.masked_fill(~targets, -torch.inf).logsumexp(dim=1).mean()
    return -(targets * log_p).sum(dim=1).mean()


def cosine_loss(
    weight: Tensor, log_scale: Tensor, features: Tensor, targets: Tensor, start: Tensor, penalty: float
) -> Tensor:
    """As `probe_loss`, of logits s cos(w_c, f) and with penalty/2 |W - W_0|^2.

    Args:
        weight, start: (C, D), W and W_0. log_scale: (), log s. features: (n, D) of length 1.
    """
    logits = log_scale.exp() * features @ F.normalize(weight, dim=1).T
    return _cross_entropy(logits, targets) + penalty / 2 * (weight - start).square().sum()


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
    loss = _solve([weight, bias], lambda: probe_loss(weight, bias, z, targets, penalty))
    with torch.no_grad():
        return weight * scale, bias - (weight * scale) @ mean, loss


@dataclass
class CosineHead:
    """Logits s cos(w_c, f - m)."""

    mean: Tensor  # (D,), m
    weight: Tensor  # (C, D), rows of length 1
    scale: float  # s
    loss: float  # what the fit reached

    def __call__(self, features: Tensor) -> Tensor:
        """(n, D) to logits (n, C), float64."""
        return self.scale * F.normalize(features.double() - self.mean, dim=1) @ self.weight.T


def fit_cosine(
    features: Tensor, targets: Tensor, penalty: float, start: Tensor | None = None, scale: float = SCALE
) -> CosineHead:
    """A cosine head, from text features or else from the classes' means.

    The problem is not convex, so that it matters where it starts; the penalty holds the head near there.

    Args:
        features: (n, D), n >= 1; with text features in the same space, without they are centred first.
        targets: as of `probe_loss`. start: (C, D), text features, or None. scale: s to start with.
    """
    features = features.double()
    mean = features.mean(dim=0) if start is None else torch.zeros_like(features[0])
    f = F.normalize(features - mean, dim=1)
    targets = targets if targets.dtype == torch.bool else targets.double()
    if start is None:
        shares = targets.double() / targets.sum(dim=1, keepdim=True)
        start = shares.T @ f
    start = F.normalize(start.double(), dim=1)
    weight = start.clone().requires_grad_()
    log_scale = torch.tensor(scale, dtype=torch.float64).log().requires_grad_()
    loss = _solve([weight, log_scale], lambda: cosine_loss(weight, log_scale, f, targets, start, penalty))
    return CosineHead(mean, F.normalize(weight.detach(), dim=1), float(log_scale.detach().exp()), loss)


def _solve(variables: list[Tensor], loss_of: Callable[[], Tensor]) -> float:
    """Move the variables to a minimum of the loss; gives it."""
    solver = torch.optim.LBFGS(
        variables, max_iter=STEPS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        return float(loss_of())
