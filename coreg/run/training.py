"""Everything that changes while two networks train, in one object: what a checkpoint holds, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from coreg.learn.coreg import CoRegLearner
from coreg.learn.memory import Prototypes
from coreg.learn.options import CoRegOptions
from coreg.nets.model import CoRegNet, create_backbone, parse_backbone_args
from coreg.settings import ImageConfig, JobConfig


@dataclass
class Training:
    """Two networks, their learners and optimisers, and how far they are.

    nets: [net1, net2]. learners: their training steps. steps: the learners wrapped for data parallelism.
    losses: for each network the division losses (N,) of the last epochs, oldest first.
    weights: w (N,) of both networks' last division; empty before the first.
    curves: one mapping of scalars for each finished epoch. seconds: spent training, over all restarts.
    """

    nets: list[CoRegNet]
    learners: list[CoRegLearner]
    steps: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]
    losses: list[list[np.ndarray]] = field(default_factory=lambda: [[], []])
    epoch: int = 0
    weights: list[np.ndarray] = field(default_factory=list)
    curves: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    images_seen: int = 0

    def step(self, accelerator: Accelerator, number: int, batch: Any, sums: dict[str, Tensor]) -> None:
        """Train network `number` (0 or 1) on one batch; adds the loss parts to `sums` on the device, without waiting."""
        self.nets[number].train()
        self.nets[1 - number].eval()
        parts = self.steps[number](batch)
        accelerator.backward(parts["loss"])
        self.optimizers[number].step()
        self.optimizers[number].zero_grad(set_to_none=True)
        for name, part in parts.items():
            sums[name] = sums.get(name, 0) + part.detach()

    def state_dict(self) -> dict[str, Any]:
        return {
            "learners": [learner.state_dict() for learner in self.learners],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "losses": [torch.from_numpy(np.stack(rows)) if rows else None for rows in self.losses],
            "weights": [torch.from_numpy(weight) for weight in self.weights],
            "epoch": self.epoch,
            "curves": self.curves,
            "seconds": self.seconds,
            "images_seen": self.images_seen,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for learner, saved in zip(self.learners, state["learners"]):
            learner.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.losses = [[] if rows is None else list(rows.numpy()) for rows in state["losses"]]
        self.weights = [weight.numpy() for weight in state["weights"]]
        self.epoch, self.curves = state["epoch"], state["curves"]
        self.seconds, self.images_seen = state["seconds"], state["images_seen"]


def build_training(
    accelerator: Accelerator, job: JobConfig, look: ImageConfig, method: CoRegOptions, n_classes: int
) -> Training:
    """Two networks of one architecture with different initialisation, sharing prototypes, and what trains them."""
    dtype = getattr(torch, job.dtype)
    prototypes = Prototypes(n_classes, method.projection_dim)
    arguments = parse_backbone_args(look.backbone_args)
    nets = []
    for number in (1, 2):
        set_seed(1000 * job.seed + number)
        backbone = create_backbone(look.backbone, n_classes, look.channels, arguments, look.pretrained)
        net = CoRegNet(backbone, method.projection_dim)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        nets.append(net.to(memory_format=torch.channels_last))
    learners = [CoRegLearner(net, prototypes, method).to(accelerator.device, dtype) for net in nets]
    for learner, peer in zip(learners, reversed(nets)):
        learner.set_peer(peer)
    optimizers = [
        torch.optim.SGD(learner.net.parameters(), lr=job.lr, momentum=job.momentum, weight_decay=job.weight_decay)
        for learner in learners
    ]
    return Training(nets, learners, [accelerator.prepare_model(learner) for learner in learners], optimizers)
