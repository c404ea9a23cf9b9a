"""One network's side of DivideMix: learning from one noisy label an image, the nearest relative of Co-Reg.

Li, Socher and Hoi, "DivideMix: Learning with Noisy Labels as Semi-supervised Learning" (ICLR 2020), and its public code
where the text leaves a choice. The skeleton is Co-Reg's, with a label in place of the candidate set, no prototypes and no
contrast; instead, a penalty keeps the mean prediction of a step near uniform. Batches are those of `coreg.learn.coreg`,
so that the draws of MixUp and the exactness under data parallelism are shared: losses are sums over this process's rows
divided by global counts and multiplied by the number of processes.

Shapes: n_x and n_u rows of P and U in the global step, l_x and l_u of them here, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from coreg.config import option
from coreg.learn import losses
from coreg.learn.collective import gather_rows, rank_and_world
from coreg.learn.coreg import CoRegBatch, WarmUpBatch
from coreg.learn.pseudo import fuse_trusted, mix, sharpen
from coreg.nets.model import CoRegNet


@dataclass
class DivideMixOptions:
    """Hyper-parameters of DivideMix."""

    _argument_group_name = "DivideMix"

    preset: Literal["matched", "official"] = option(
        "matched",
        "matched: Co-Reg's views, batch and schedule; official: those of the authors' code, which win over the recipe",
    )
    labels_from: Literal["single", "averaged"] = option(
        "averaged", "the noisy label of an image: what the first template names, or the largest mean probability"
    )
    warmup_epochs: int = option(10, "epochs of cross-entropy before the first division")
    entropy_weight: float = option(1.0, "weight of the negative entropy in warm-up; 0 for class-independent label noise")
    train_view: Literal["strong", "weak"] = option(
        "strong", "views to train on: strong ones as Co-Reg does, or the two weak ones that labels are guessed from"
    )
    history: int = option(1, "epochs over which the division losses are averaged; the authors take 5 for 90 % noise")
    threshold: float = option(0.5, "an image is trusted (in P) when its weight w lies above it")
    temperature: float = option(0.5, "T, sharpening of guessed labels")
    mixup_alpha: float = option(4.0, "MixUp's lambda is drawn from Beta(alpha, alpha); 0 switches MixUp off")
    lambda_u: float = option(25.0, "weight of the loss on distrusted images U; the authors try 0, 25, 50 and 150")
    rampup_epochs: int = option(16, "epochs over which lambda_u grows from 0 after warm-up; 0 for at once")
    penalty_weight: float = option(1.0, "weight of the penalty on an uneven mean prediction")
    lr_schedule: Literal["cosine", "step"] = option(
        "cosine", "learning rate: cosine, or a tenth in the second half of all epochs"
    )


# of the authors' code for CIFAR-10
OFFICIAL: dict[str, Any] = {
    "train_view": "weak",
    "lr_schedule": "step",
    "lr": 0.02,
    "batch_size": 64,
    "epochs": 300,
    "warmup_epochs": 10,
}


def uniformity_penalty(mean_prediction: Tensor) -> Tensor:
    """KL(uniform || mean prediction), L_reg of the paper's eq. 11. (C,) -> scalar, 0 where the mean is uniform."""
    floor = torch.finfo(mean_prediction.dtype).tiny
    return -mean_prediction.clamp_min(floor).log().mean() - math.log(len(mean_prediction))


class DivideMixLearner(nn.Module):
    """A network whose forward is a whole training step, in warm-up and in co-training."""

    def __init__(self, net: CoRegNet, options: DivideMixOptions) -> None:
        super().__init__()
        self.net = net
        self.options = options
        self._peer: list[CoRegNet] = []

    def set_peer(self, peer: CoRegNet) -> None:
        """The other network: read in evaluation mode, never trained here, and so no submodule of this one."""
        self._peer = [peer]

    def forward(self, batch: WarmUpBatch | CoRegBatch) -> dict[str, Tensor]:
        """The step's `loss` (with gradient) and its parts (without), each a scalar; the parts are this process's shares.

        Args:
            batch: in warm-up its candidate sets are singletons, in co-training `x_targets` (l_x, C) holds the noisy labels.
        """
        return self._warm_up(batch) if isinstance(batch, WarmUpBatch) else self._co_train(batch)

    def _warm_up(self, batch: WarmUpBatch) -> dict[str, Tensor]:
        """Cross-entropy plus negative entropy, the paper's confidence penalty for asymmetric noise (eq. 3)."""
        logits, _ = self.net(batch.images)
        supervised = losses.partial_cross_entropy(logits, batch.candidates).sum() / batch.n
        entropy = losses.negative_entropy(logits).sum() / batch.n
        _, world = rank_and_world()
        loss = supervised + self.options.entropy_weight * entropy
        return {"loss": loss * world, "supervised": supervised.detach(), "negative_entropy": entropy.detach()}

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
        return {"loss": loss * world} | {name: part.detach() for name, part in parts.items()}

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
    def _probabilities(net: CoRegNet, images: Tensor) -> Tensor:
        return losses.log_probabilities(net(images)[0]).exp()
