"""One network's side of DivideMix: learning from one noisy label an image, the nearest relative of Co-Reg.

Li, Socher and Hoi, "DivideMix: Learning with Noisy Labels as Semi-supervised Learning" (ICLR 2020), and its public code
where the text leaves a choice. The skeleton is Co-Reg's, with a label in place of the candidate set, no prototypes and no
contrast; instead, a penalty keeps the mean prediction of a step near uniform. Batches are those of `coreg.learn.coreg`,
so that the draws of MixUp and the exactness under data parallelism are shared: losses are sums over this process's rows
divided by global counts.

Shapes: n_x and n_u rows of P and U in the global step, l_x and l_u of them here, C classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from coreg.learn import losses
from coreg.learn.collective import gather_rows, rank_and_world
from coreg.learn.coreg import CoRegBatch, WarmUpBatch
from coreg.learn.dividemix_options import DivideMixOptions
from coreg.learn.pseudo import fuse_trusted, mix, sharpen
from coreg.nets.model import Model


def uniformity_penalty(mean_prediction: Tensor) -> Tensor:
    """KL(uniform || mean prediction), L_reg of the paper's eq. 11. (C,) -> scalar, 0 where the mean is uniform."""
    floor = torch.finfo(mean_prediction.dtype).tiny
    return -mean_prediction.clamp_min(floor).log().mean() - math.log(len(mean_prediction))


class DivideMixLearner(nn.Module):
    """A network whose forward is a whole training step, in warm-up and in co-training."""

    def __init__(self, net: Model, options: DivideMixOptions) -> None:
        super().__init__()
        self.net = net
        self.options = options
        self._peer: list[Model] = []

    def set_peer(self, peer: Model) -> None:
        """The other network: read in evaluation mode, never trained here, and so no submodule of this one."""
        self._peer = [peer]

    def forward(self, batch: WarmUpBatch | CoRegBatch) -> dict[str, Tensor]:
        """The step's `loss` (with gradient) and its parts (without), each a scalar and this process's share.

        All are means over rows (`trusted` over P, `distrusted` over U, `supervised` in co-training over the labelled rows)
        but for `penalty`, which is of the global mean prediction, and of which every process has an equal part.

        Args:
            batch: in warm-up its candidate sets are singletons, in co-training `x_targets` (l_x, C) holds the noisy labels.
        """
        return self._warm_up(batch) if isinstance(batch, WarmUpBatch) else self._co_train(batch)

    def _warm_up(self, batch: WarmUpBatch) -> dict[str, Tensor]:
        """Cross-entropy plus negative entropy, the paper's confidence penalty for asymmetric noise (eq. 3)."""
        logits, _ = self.net(batch.images)
        supervised = losses.partial_cross_entropy(logits, batch.candidates).sum() / batch.size
        entropy = losses.negative_entropy(logits).sum() / batch.size
        loss = supervised + self.options.entropy_weight * entropy
        return {"loss": loss, "supervised": supervised.detach(), "negative_entropy": entropy.detach()}

    def _co_train(self, batch: CoRegBatch) -> dict[str, Tensor]:
        """Refine labels of P, guess those of U, mix, and train (eq. 4-12)."""
        options, (_, world) = self.options, rank_and_world()
        targets = self._targets(batch)
        mixed = mix(targets[batch.position], targets[batch.partner_position], batch.share_kept)
        logits, _ = self.net(mix(batch.strong, batch.partners, batch.share_kept))
        n_p = 2 * len(batch.x_targets)  # P rows stand first
        trusted = losses.soft_cross_entropy(logits[:n_p], mixed[:n_p]).sum() / max(2 * batch.n_x, 1)
        p = losses.log_probabilities(logits).exp()
        distrusted = losses.squared_error(p[n_p:], mixed[n_p:]).sum() / max(2 * batch.n_u, 1)
        # the penalty is no sum over rows: every process computes that of the global mean, and owns an equal share of it
        total = gather_rows(p.sum(dim=0, keepdim=True), world).sum(dim=0)
        penalty = uniformity_penalty(total / (2 * (batch.n_x + batch.n_u))) / world
        loss = trusted + options.lambda_u * batch.ramp * distrusted + options.penalty_weight * penalty
        parts = {"trusted": trusted, "distrusted": distrusted, "penalty": penalty}
        if batch.labelled is not None:
            images, classes = batch.labelled
            supervised = nn.functional.nll_loss(losses.log_probabilities(self.net(images)[0]), classes, reduction="sum")
            parts["supervised"] = supervised / batch.n_labelled
            loss = loss + parts["supervised"]
        return {"loss": loss} | {name: part.detach() for name, part in parts.items()}

    @torch.no_grad()
    def _targets(self, batch: CoRegBatch) -> Tensor:
        """Sharpened labels of the global [x; x; u; u], (2 n_x + 2 n_u, C) (eq. 4-7).

        The network itself guesses in training mode, each view a batch of its own, the other one in evaluation mode.
        """
        u_guess = [self._probabilities(net, view) for net in (self.net, self._peer[0]) for view in batch.u_weak]
        own = sum(self._probabilities(self.net, view) for view in batch.x_weak) / len(batch.x_weak)
        x = sharpen(fuse_trusted(batch.x_targets, own, batch.x_weight), self.options.temperature)
        u = sharpen(sum(u_guess) / len(u_guess), self.options.temperature)
        x, u = gather_rows(x, batch.n_x), gather_rows(u, batch.n_u)
        return torch.cat([x, x, u, u])

    @staticmethod
    def _probabilities(net: Model, images: Tensor) -> Tensor:
        return losses.log_probabilities(net(images)[0]).exp()
