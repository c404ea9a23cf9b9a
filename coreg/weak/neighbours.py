"""What an image's nearest neighbours are called: the plainest way in which features mend an annotator's probabilities.

Images of a class lie near each other, so that the mean of what the neighbours are called is right where only single images
are misnamed. It assumes nothing about the sizes of classes, and costs N^2 cosines.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIMILARITIES_AT_ONCE = 1 << 24  # cosines that are held at the same time: 64 MB of float32
VOTERS = 20


def nearest(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest neighbours of every image by cosine, itself excluded; of fewer images, all others.

    Args:
        features: (N, D), rows of length 1.

    Returns:
        rows int64 (N, k) and cosines (N, k), negative ones as 0: a neighbour never pushes away.
    """
    n = len(features)
    k = min(k, n - 1)
    rows, cosines = [], []
    step = max(1, SIMILARITIES_AT_ONCE // n)
    for start in range(0, n, step):
        similarity = features[start : start + step] @ features.T
        here = torch.arange(len(similarity), device=features.device)
        similarity[here, start + here] = -torch.inf
        best = similarity.topk(k, dim=1)
        rows.append(best.indices)
        cosines.append(best.values.clamp_min(0))
    return torch.cat(rows), torch.cat(cosines)


def directions(features: Tensor) -> Tensor:
    """Features (N, D) without their mean, scaled to length 1; one that is the mean stays zero.

    Features of a network share one large direction, which would make every cosine nearly 1.
    """
    return torch.nn.functional.normalize(features - features.mean(dim=0), dim=1)


def vote(features: Tensor, probs: Tensor, k: int = VOTERS) -> Tensor:
    """The mean of the neighbours' probabilities, weighted by cosine.

    Args:
        features: float (N, D), N >= 1. probs: (N, C), rows sum to 1.
        k: neighbours that vote, the image itself not among them; of fewer images, all others.

    Returns:
        (N, C) in the dtype of `features`, rows sum to 1; an image with nobody on its side keeps its own.
    """
    rows, cosines = nearest(directions(features), k)
    probs = probs.to(features.dtype)
    total = torch.zeros_like(probs)
    for near, weight in zip(rows.T, cosines.T):
        total += weight[:, None] * probs[near]
    weight = cosines.sum(dim=1, keepdim=True)
    return torch.where(weight > 0, total / weight.clamp_min(torch.finfo(features.dtype).tiny), probs)
