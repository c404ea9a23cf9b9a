"""The losses of Co-Reg as pure functions that return one value a row.

Rows are never averaged here: under data parallelism a loss is a mean over the rows of all processes, so the caller
sums the rows it holds and divides by the global count. Reductions run in float32 or wider, whatever the inputs are.

Shapes: n rows, C classes, b anchors, M rows to contrast with, D = 128 projected features.
Source: "Pre-Trained Vision-Language Models as Partial Annotators" (AAAI), called AAAI below, its journal
extension (arXiv 2506.03229), and the public reference code where the texts leave a choice.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from coreg.learn.options import Contrast


def wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x if x.dtype == torch.float64 else x.float()


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """a b^T, (n, D), (m, D) -> (n, m), in float32 or wider: autocast would multiply float32 matrices in bfloat16."""
    with torch.autocast(a.device.type, enabled=False):
        return wide(a) @ wide(b).T


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over the last axis, float32 or wider, shape of `logits`."""
    return F.log_softmax(wide(logits), dim=-1)


def partial_cross_entropy(logits: Tensor, candidates: Tensor) -> Tensor:
    """-log of the probability mass on the candidate set, `L_sup` of warm-up (AAAI eq. 1).

    Args:
        logits: (n, C).
        candidates: bool (n, C), at least one True a row.

    Returns:
        (n,); exactly 0 for a full candidate set, which carries no information.
    """
    log_p = log_probabilities(logits)
    mass = torch.logsumexp(log_p.masked_fill(~candidates, -torch.inf), dim=-1)
    return torch.where(candidates.all(dim=-1), 0.0, -mass)


def negative_entropy(logits: Tensor) -> Tensor:
    """Sum over classes of p log p, `L_reg` of warm-up (AAAI eq. 1); keeps a network from being too sure. (n, C) -> (n,)."""
    log_p = log_probabilities(logits)
    return (log_p.exp() * log_p).sum(dim=-1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with soft targets, the P part of `L_pseu` (AAAI eq. 7). (n, C), (n, C) -> (n,)."""
    return -(targets * log_probabilities(logits)).sum(dim=-1)


def squared_error(probabilities: Tensor, targets: Tensor, over_classes: Literal["mean", "sum"] = "mean") -> Tensor:
    """Squared error of two distributions, the U part of `L_pseu` and `L_prot`. (n, C), (n, C) -> (n,).

    The papers write the squared norm, a sum over classes; the reference code divides by C, which is the default.
    """
    square = (probabilities - targets).square()
    return square.mean(dim=-1) if over_classes == "mean" else square.sum(dim=-1)


def divergence(targets: Tensor, log_probs: Tensor) -> Tensor:
    """KL(targets || probabilities) with 0 log 0 = 0, the P part of `L_prot` (AAAI eq. 8). (n, C), (n, C) -> (n,)."""
    return (torch.xlogy(targets, targets) - targets * log_probs).sum(dim=-1)


def prototype_log_probabilities(features: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """log softmax of the similarities q O^T / tau between features and class prototypes. (n, D), (C, D) -> (n, C)."""
    return F.log_softmax(_similarity(features, prototypes) / temperature, dim=-1)


def contrastive_loss(
    queries: Tensor,
    others: Tensor,
    labels: Tensor,
    confident: Tensor,
    other_labels: Tensor,
    other_confident: Tensor,
    self_position: Tensor,
    key_position: Tensor,
    temperature: float = 0.07,
    mode: Contrast = "noise_tolerant",
    n_batch: int = 0,
) -> Tensor:
    """Contrastive loss of every anchor, `L_ncont` (AAAI eq. 10) with its ablations.

    For anchor i with pseudo-label c_i and mark m_i (True when its image is in P), over the rows j of the contrast set
    A = [q; k; queue] except i itself:

    ==============  ======================================  ==============================================
    mode            positives besides the own key           left out of the denominator
    ==============  ======================================  ==============================================
    noise_tolerant  c_j = c_i with m_i and m_j              c_j = c_i without m_i and m_j
    supervised      c_j = c_i                               nothing
    hcp             c_j = c_i with m_i and m_j              nothing
    hcpn            the same; the loss is multiplied by m_i  j without m_j, where m_i
    unsupervised    none                                    the other q and k: only the queue is negative
    ==============  ======================================  ==============================================

    The own key is always a positive and always kept. The loss is -1/|P(i)| sum over positives of
    (a_ij - logsumexp over kept j of a_ij), a_ij = q_i . A_j / temperature, written as one masked logsumexp: subtracting
    the exponentials of what is left out, as the reference does, cancels when that part dominates.

    Args:
        queries: (b, D) anchors, unit length, with gradient.
        others: (M, D) the contrast set, unit length.
        labels, confident: (b,) int64 and bool, c and m of the anchors.
        other_labels, other_confident: (M,) the same for the contrast set.
        self_position, key_position: (b,) int64, the rows of `others` that hold the anchor itself and its own key.
        temperature: tau'' of the papers.
        mode: see the table.
        n_batch: rows of `others` that belong to this step's q and k; only `unsupervised` needs it.

    Returns:
        (b,) losses.
    """
    similarity = _similarity(queries, others) / temperature
    columns = torch.arange(len(others), device=queries.device)
    own_key = columns == key_position[:, None]
    itself = columns == self_position[:, None]
    same = labels[:, None] == other_labels[None, :]
    both = confident[:, None] & other_confident[None, :]
    if mode == "noise_tolerant":
        positive, kept = same & both, ~same | both
    elif mode == "supervised":
        positive, kept = same, torch.ones_like(same)
    elif mode == "hcp":
        positive, kept = same & both, torch.ones_like(same)
    elif mode == "hcpn":
        positive, kept = same & both, ~confident[:, None] | other_confident[None, :]
    else:
        positive, kept = torch.zeros_like(same), (columns >= n_batch).expand_as(same)
    positive = (positive | own_key) & ~itself
    kept = (kept | own_key) & ~itself
    log_total = torch.logsumexp(similarity.masked_fill(~kept, -torch.inf), dim=-1)
    mean_positive = (similarity * positive).sum(dim=-1) / positive.sum(dim=-1)
    loss = log_total - mean_positive
    return loss * confident if mode == "hcpn" else loss
