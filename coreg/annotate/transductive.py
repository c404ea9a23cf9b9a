"""Judging images together: zero-shot predictions corrected by how the images' features lie, without labels or training.

Text predictions judge one image at a time. Here all images of a set are judged at once: images of a class form a
Gaussian in feature space, near neighbours belong together, and nobody strays far from what the text side predicts. In the
manner of TransCLIP, its zero-shot form: Zanella, Gérin and Ben Ayed, "Boosting Vision-Language Models with
Transduction" (NeurIPS 2024).

With z (N, C) the soft assignments, y the text predictions, N(f; mu_c, s) Gaussians that share one diagonal covariance
s, and W = (A + A') / 2k, where row i of A holds the cosines of image i with its k nearest neighbours, what is minimised is

    J = sum_i [ sum_c z_ic (log z_ic - a log y_ic - b log N(f_i; mu_c, s)) ] - 1/2 sum_ij W_ij z_i . z_j

block by block: z with the last term replaced by its tangent, which is a bound where W is positive semi-definite and has a
closed form for each image; then mu and s, which are weighted means. Memory is O(N (k + C + D)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from coreg.weak.neighbours import nearest

SURE_IMAGES = 8  # a class, from which its first mean is made
SMALLEST_SHARE = 2.0**-24  # of a class in a text prediction: the smallest float16, to which stores round
SMALLEST_VARIANCE = 1e-8


def pull(z: Tensor, rows: Tensor, cosines: Tensor) -> Tensor:
    """W z, what the neighbours of every image say, those that it chose and those that chose it. (N, C) -> (N, C)."""
    total = torch.zeros_like(z)
    for near, weight in zip(rows.T, cosines.T):
        total += weight[:, None] * z[near]
        total.index_add_(0, near, weight[:, None] * z)
    return total / (2 * max(rows.shape[1], 1))


def log_likelihood(features: Tensor, means: Tensor, variance: Tensor) -> Tensor:
    """log N(f; mu_c, s) without the terms that all classes share. (N, D), (C, D), (D,) -> (N, C)."""
    scaled = means / variance
    return features @ scaled.T - (means * scaled).sum(dim=1) / 2


def fit(features: Tensor, z: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """The means (C, D) and shared variance (D,) that maximise the likelihood of soft assignments z (N, C).

    A class without any image keeps its mean of `means` (C, D).
    """
    mass = z.sum(dim=0)[:, None]
    means = torch.where(mass > 0, z.T @ features / mass.clamp_min(torch.finfo(z.dtype).tiny), means)
    # about weighted means, the mean squared distance is the mean of f^2 minus the classes' shares of mu^2
    variance = features.square().mean(dim=0) - (mass * means.square()).sum(dim=0) / len(features)
    return means, variance.clamp_min(SMALLEST_VARIANCE)


@torch.no_grad()
def transduce(
    features: Tensor,
    text: Tensor,
    neighbours: int = 3,
    text_weight: float = 1.0,
    likelihood_weight: float = 1 / 50,
    rounds: int = 10,
    sweeps: int = 5,
) -> Tensor:
    """Soft assignments of all images, judged together. Defaults are those of the authors' code.

    Unlike there, means are not scaled to length 1, so that they are what the objective asks for, and the first mean of a
    class is the plain mean of its surest images.

    Args:
        features: float (N, D), rows of length 1, N >= 1.
        text: (N, C), probabilities y that the text side gave.
        neighbours: k. text_weight: a. likelihood_weight: b.
        rounds: times that Gaussians are fitted. sweeps: times that all assignments move in between.

    Returns:
        (N, C), rows sum to 1, in the dtype of `features`.
    """
    prior = text.to(features.dtype).clamp_min(SMALLEST_SHARE)
    z = prior / prior.sum(dim=1, keepdim=True)
    prior = text_weight * z.log()
    rows, cosines = nearest(features, neighbours)
    surest = z.topk(min(SURE_IMAGES, len(z)), dim=0).indices
    means = features[surest].mean(dim=0)
    variance = torch.full_like(features[0], 1 / features.shape[1])
    for number in range(rounds + 1):
        evidence = prior + likelihood_weight * log_likelihood(features, means, variance)
        for _ in range(sweeps):
            z = torch.softmax(evidence + pull(z, rows, cosines), dim=1)
        if number < rounds:
            means, variance = fit(features, z, means)
    return z
