"""Everything that changes while networks train, in one object: what a checkpoint holds, and nothing else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from coreg.learn.collective import gather_rows, rank_and_world
from coreg.nets.model import CoRegNet, create_backbone, evaluate_lone_values, parse_backbone_args
from coreg.run.batches import Verdict
from coreg.settings import ImageConfig, JobConfig

T = TypeVar("T")


class Batch(Protocol):
    """What a learner takes: `size` is the number of images of the global step."""

    @property
    def size(self) -> int: ...


@dataclass
class Training:
    """One or two networks, their learners and optimisers, and how far they are, down to the step.

    nets: [net1, net2], or one alone. learners: their training steps, modules whose forward takes a batch and returns the
    `loss` with gradient beside its detached parts, and whose buffers are their state. Each of these scalars is this
    process's share: added up over all processes it is that of the global batch. steps: the learners wrapped for data
    parallelism.
    losses: for each network the division losses (N,) of the last epochs, oldest first.
    weights: w (N,) of both networks' last division; empty before the first.
    epoch: finished epochs; number, step: network (0 or 1) and step to go on with in the present one.
    verdicts: of this epoch's division; sums: this process's shares of the loss parts, added up over this network's steps
    so far; partial: curves of this epoch so far.
    curves: one mapping of scalars for each finished epoch. chosen: of the networks that looked best without labels so
    far, the number of finished epochs, the score and the weights.
    seconds, making_seconds: spent training, and on making batches within that, over all restarts.
    """

    nets: list[CoRegNet]
    learners: list[nn.Module]
    steps: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]
    losses: list[list[np.ndarray]] = field(default_factory=lambda: [[], []])
    weights: list[np.ndarray] = field(default_factory=list)
    epoch: int = 0
    number: int = 0
    step: int = 0
    verdicts: list[Verdict] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    partial: dict[str, float] = field(default_factory=dict)
    curves: list[dict[str, float]] = field(default_factory=list)
    chosen: dict[str, Any] | None = None
    seconds: float = 0.0
    making_seconds: float = 0.0
    images_seen: int = 0
    updates: int = 0

    def __post_init__(self) -> None:
        self.first_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def set_rate(self, rate: float, peak: float) -> None:
        """The learning rate of weights that began with `peak`; those that began with another one get it in proportion."""
        for optimizer, first in zip(self.optimizers, self.first_rates):
            for group, own in zip(optimizer.param_groups, first):
                group["lr"] = rate * (own / peak)

    def optimise(self, accelerator: Accelerator, batch: Batch, update: bool, accumulated: int) -> None:
        """Train the present network on one batch; loss parts are summed on the device, without waiting for it.

        Args:
            update: whether the weights move now, or gradients go on adding up.
            accumulated: number of batches whose gradients are averaged.
        """
        for number, net in enumerate(self.nets):
            net.train(number == self.number)
        module = self.steps[self.number]
        with contextlib.nullcontext() if update else accelerator.no_sync(module):
            parts = module(batch)
            # gradients are averaged over processes, and the shares of a loss add up
            accelerator.backward(parts["loss"] * accelerator.num_processes / accumulated)
        if update:
            self.optimizers[self.number].step()
            self.optimizers[self.number].zero_grad(set_to_none=True)
        for name, part in parts.items():
            self.sums[name] = self.sums.get(name, 0) + part.detach()
        self.step += 1
        self.updates += 1

    def timed(self, make: Callable[[int], T], step: int) -> T:
        """The batch that `make` gives for a step; the time that it takes is added up."""
        started = time.perf_counter()
        made = make(step)
        self.making_seconds += time.perf_counter() - started
        return made

    def consider(self, score: float) -> None:
        """Remember the networks as they are now if no epoch before had a larger score."""
        if self.chosen is None or score > self.chosen["score"]:
            weights = [{k: v.detach().clone() for k, v in net.state_dict().items()} for net in self.nets]
            self.chosen = {"epoch": self.epoch, "score": score, "nets": weights}

    def shares(self) -> dict[str, Tensor]:
        """The sums of all W processes, (W,) for each loss part, the same on every process; all have to call it."""
        if not self.sums:
            return {}
        mine = torch.stack([value.double() for value in self.sums.values()])
        every = gather_rows(mine[None], rank_and_world()[1])
        # in the dtype that they are added up in, so that a resumed job rounds as this one does
        return {name: every[:, i].to(value.dtype) for i, (name, value) in enumerate(self.sums.items())}

    def finish_network(self) -> None:
        """Turn the sums of all processes into means of the present network's epoch, and go on with the next network."""
        for name, shares in self.shares().items():
            part = "total" if name == "loss" else name
            self.partial[f"loss/net{self.number + 1}/{part}"] = float(shares.double().sum()) / self.step
        self.sums, self.step, self.number = {}, 0, self.number + 1

    def finish_epoch(self, more: dict[str, float]) -> dict[str, float]:
        """Close the epoch; gives its curves."""
        curves = self.partial | more
        self.curves.append(curves)
        self.partial, self.verdicts, self.number = {}, [], 0
        self.epoch += 1
        return curves

    @property
    def serial(self) -> int:
        """A number for a checkpoint of this moment, larger than that of every moment before."""
        return self.updates + self.epoch

    def state_dict(self) -> dict[str, Any]:
        """All of it, with every process's sums; all processes have to call it."""
        return {
            "learners": [learner.state_dict() for learner in self.learners],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "losses": [torch.from_numpy(np.stack(rows)) if rows else None for rows in self.losses],
            "weights": [torch.from_numpy(weight) for weight in self.weights],
            "verdicts": [verdict.state_dict() for verdict in self.verdicts],
            "sums": self.shares(),
        } | {name: getattr(self, name) for name in PLAIN}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Take what `state_dict` gave.

        A process goes on with its own sums; where the number of processes is another one, the first has those of all.
        """
        for learner, saved in zip(self.learners, state["learners"]):
            learner.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.losses = [[] if rows is None else list(rows.numpy()) for rows in state["losses"]]
        self.weights = [weight.numpy() for weight in state["weights"]]
        self.verdicts = [Verdict.from_state(saved, device) for saved in state["verdicts"]]
        self.sums = {name: _own(shares).to(device) for name, shares in state["sums"].items()}
        for name in PLAIN:
            setattr(self, name, state[name])


def _own(shares: Tensor) -> Tensor:
    """What this process goes on with of sums that were (W,) processes' when they were saved."""
    rank, world = rank_and_world()
    if len(shares) == world:
        return shares[rank]
    return shares.sum() if rank == 0 else shares.new_zeros(())


PLAIN = (
    "epoch",
    "number",
    "step",
    "partial",
    "curves",
    "chosen",
    "seconds",
    "making_seconds",
    "images_seen",
    "updates",
)


def build_networks(
    accelerator: Accelerator, job: JobConfig, look: ImageConfig, n_classes: int, projection_dim: int, count: int
) -> list[CoRegNet]:
    """Networks of one architecture with different initialisation, in channels_last format, not yet on the device."""
    arguments = parse_backbone_args(look.backbone_args)
    nets = []
    for number in range(1, count + 1):
        set_seed(1000 * job.seed + number)
        backbone = create_backbone(look.backbone, n_classes, look.channels, arguments, look.pretrained)
        net = CoRegNet(backbone, projection_dim)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        elif accelerator.num_processes > 1:
            evaluate_lone_values(net)
        nets.append(net.to(memory_format=torch.channels_last))
    return nets


def build_optimizer(net: nn.Module, job: JobConfig) -> torch.optim.Optimizer:
    """The optimiser of one network's weights; the epoch sets its learning rate."""
    if job.optimizer == "adamw":
        return torch.optim.AdamW(net.parameters(), lr=job.lr, weight_decay=job.weight_decay)
    return torch.optim.SGD(net.parameters(), lr=job.lr, momentum=job.momentum, weight_decay=job.weight_decay)


def assemble(accelerator: Accelerator, job: JobConfig, nets: list[CoRegNet], learners: Sequence[nn.Module]) -> Training:
    """Learners on the device, compiled where that is asked for, each with its optimiser.

    Args:
        learners: one for each network, which it holds as `net` (and its momentum encoder, if any, as `key_net`).
    """
    learners = [learner.to(accelerator.device, getattr(torch, job.dtype)) for learner in learners]
    for learner in learners if job.compile else ():
        for name in ("net", "key_net"):
            if hasattr(learner, name):
                getattr(learner, name).compile()
    optimizers = [build_optimizer(learner.net, job) for learner in learners]
    return Training(nets, list(learners), [accelerator.prepare_model(learner) for learner in learners], optimizers)
