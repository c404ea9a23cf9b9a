"""Networks, what trains them, and how far they are, down to the step: what a checkpoint holds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.functional import normalize

from coreg.learn.collective import gather_rows, my_slice, rank_and_world
from coreg.learn.tables import share
from coreg.learn.two_nets import Divisions
from coreg.nets.heads import ClassText
from coreg.nets.model import Model, create_backbone, evaluate_lone_values, parse_backbone_args
from coreg.nets.tuners.audit import audit
from coreg.nets.tuning import start_head
from coreg.network_options import ImageConfig
from coreg.run.task import Task, pooled
from coreg.settings import JobConfig

# devices whose AdamW goes over the weights once, in a third of the time
FUSED = ("cpu", "cuda")


class Batch(Protocol):
    """What a learner takes: `size` is the number of images of the global step."""

    @property
    def size(self) -> int: ...


@dataclass
class Training:
    """One or two learners with their optimisers, and how far they are.

    A learner is a module whose forward takes a batch and returns the `loss` with gradient beside its detached parts. Each
    of these scalars is this process's share: added up over all processes it is that of the global batch.
    """

    accelerator: Accelerator
    learners: list[nn.Module]  # their state_dict is what is trained and what they remember
    optimizers: list[torch.optim.Optimizer]  # a learner without one is not trained
    divisions: Divisions | None = None  # what two networks remember of their divisions, where they divide
    accumulated: int = 1  # number of batches whose gradients are averaged before the weights move
    compiled: int | None = None  # networks are compiled for global batches of multiples of so many images; None: for none
    epoch: int = 0  # finished epochs
    number: int = 0  # network (0 or 1) to go on with in the present epoch
    step: int = 0  # and its step
    count: int = 0  # its steps in an epoch
    # this process's shares of the loss parts, added up over this network's steps so far
    sums: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, float] = field(default_factory=dict)  # of the networks that are through with this epoch
    curves: list[dict[str, float]] = field(default_factory=list)  # scalars by name for each finished epoch
    seconds: float = 0.0  # spent training, over all restarts
    making_seconds: float = 0.0  # spent on making batches within that
    images_seen: int = 0  # images trained on
    updates: int = 0  # batches trained on

    def __post_init__(self) -> None:
        # wrapped for data parallelism
        self.steps = [self.accelerator.prepare_model(learner) for learner, _ in zip(self.learners, self.optimizers)]
        self.first_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.began = time.perf_counter()

    @property
    def nets(self) -> list[Model]:
        """The networks of the learners."""
        return [learner.net for learner in self.learners]

    @property
    def moves(self) -> bool:
        """Whether the weights move in this step, or gradients go on adding up."""
        return (self.step + 1) % self.accumulated == 0 or self.step + 1 == self.count

    def turns(self) -> Iterator[int]:
        """The networks that have yet to train in this epoch, one after the other."""
        while self.number < len(self.learners):
            yield self.number

    def learn(self, batch: Batch, lr: float) -> None:
        """Train the present network on one batch: forward, backward, and the optimiser's step where it is due.

        Loss parts are summed on the device, without waiting for it.

        Args:
            lr: the learning rate of weights whose optimiser began with its own `lr`; weights that began with another one
                get it in proportion.
        """
        self.making_seconds += time.perf_counter() - self.began
        for number, learner in enumerate(self.learners):
            learner.train(number == self.number)
        module, optimizer = self.steps[self.number], self.optimizers[self.number]
        with self._for_size(batch.size), contextlib.nullcontext() if self.moves else self.accelerator.no_sync(module):
            parts = module(batch)
            # gradients are averaged over processes, and the shares of a loss add up
            self.accelerator.backward(parts["loss"] * self.accelerator.num_processes / self.accumulated)
        if self.moves:
            for group, first in zip(optimizer.param_groups, self.first_rates[self.number]):
                group["lr"] = lr * (first / optimizer.defaults["lr"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for name, part in parts.items():
            self.sums[name] = self.sums.get(name, 0) + part.detach()
        self.images_seen += batch.size
        self.updates += 1

    def _for_size(self, size: int) -> contextlib.AbstractContextManager:
        """Compiled networks run as they are for a batch that is left over: its size may never come again."""
        if self.compiled is None:
            return contextlib.nullcontext()
        if self.step % self.accumulated == 0:  # what CUDA graphs returned before is needed no more
            torch.compiler.cudagraph_mark_step_begin()
        return torch.compiler.set_stance("force_eager" if size % self.compiled else "default")

    def shares(self) -> dict[str, Tensor]:
        """The sums of all W processes, (W,) for each loss part, the same on every process; all have to call it."""
        if not self.sums:
            return {}
        my_sums = torch.stack([value.double() for value in self.sums.values()])
        every = gather_rows(my_sums[None], rank_and_world()[1])
        # in the dtype that they are added up in, so that a resumed job rounds as this one does
        return {name: every[:, i].to(value.dtype) for i, (name, value) in enumerate(self.sums.items())}

    def finish_network(self) -> None:
        """Turn the sums of all processes into means of the present network's epoch, and go on with the next network."""
        for name, shares in self.shares().items():
            part = "total" if name == "loss" else name
            self.means[f"loss/net{self.number + 1}/{part}"] = float(shares.double().sum()) / self.step
        self.sums, self.step, self.number = {}, 0, self.number + 1

    def finish_epoch(self, more: dict[str, float]) -> dict[str, float]:
        """Close the epoch; gives its curves."""
        curves = self.means | more
        self.curves.append(curves)
        self.means, self.number = {}, 0
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
            "divisions": None if self.divisions is None else self.divisions.state_dict(),
            "sums": self.shares(),
        } | {name: getattr(self, name) for name in PLAIN}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave.

        A process goes on with its own sums; where the number of processes is another one, the first has those of all.
        """
        device = self.accelerator.device
        for learner, saved in zip(self.learners, state["learners"]):
            learner.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if self.divisions is not None:
            self.divisions.load_state_dict(state["divisions"], device)
        self.sums = {name: _own(shares).to(device) for name, shares in state["sums"].items()}
        for name in PLAIN:
            setattr(self, name, state[name])


PLAIN = ("epoch", "number", "step", "means", "curves", "seconds", "making_seconds", "images_seen", "updates")


def _own(shares: Tensor) -> Tensor:
    """What this process goes on with of sums that were (W,) processes' when they were saved."""
    rank, world = rank_and_world()
    if len(shares) == world:
        return shares[rank]
    return shares.sum() if rank == 0 else shares.new_zeros(())


def build_networks(
    accelerator: Accelerator, job: JobConfig, image_options: ImageConfig, n_classes: int, projection_dim: int, count: int
) -> list[Model]:
    """Networks of one architecture with different initialisation, in channels_last format, not yet on the device.

    Raises:
        UserError: weights that cannot be had, or a head or tuners that do not fit.
    """
    nets = []
    for number in range(1, count + 1):
        set_seed(1000 * job.seed + number)
        net = build_model(image_options, n_classes, projection_dim)
        if image_options.tuner:
            size = image_options.image_size
            audit(net, torch.zeros(2, image_options.channels, size, size))
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        elif accelerator.num_processes > 1:
            evaluate_lone_values(net)
        nets.append(net.to(memory_format=torch.channels_last))
    return nets


def build_students(task: Task[Any], projection_dim: int, count: int) -> list[Model]:
    """`build_networks` for a task, whose images and candidate sets may give the heads their start.

    Where one network is but a classifier on frozen features, those of the plain views are made here once.
    """
    n_classes = len(task.store.class_names)
    nets = build_networks(task.accelerator, task.job, task.image_options, n_classes, projection_dim, count)
    if task.image_options.head_init == "class_mean":
        for net in nets:
            net.to(task.accelerator.device, getattr(torch, task.job.dtype))
            start_head(net.backbone, class_means(task, net))
    if count == 1 and nets[0].features_are_fixed:
        nets[0].to(task.accelerator.device, getattr(torch, task.job.dtype))
        for images in (task.data, task.test) if task.test is not None else (task.data,):
            images.features = pooled(nets[0], images, np.arange(len(images.samples)), 4 * task.job.batch_size)
    return nets


def class_means(task: Task[Any], net: Model) -> Tensor:
    """Unit vectors (C, d): where the images of each class lie, by uniform weights on their candidate sets.

    Features are brought to length 1 before they are added up. Images of which nothing is known are left out.
    """
    rows = np.flatnonzero(task.weak.usable)
    features = normalize(pooled(net, task.data, rows, 4 * task.job.batch_size), dim=1)
    if task.sharded:
        sets, features = share(task.table, rows).to(features.dtype), features[my_slice(len(rows))]
    else:
        sets = task.table[torch.from_numpy(rows).to(features.device)].to(features.dtype)
    sums = (sets / sets.sum(dim=1, keepdim=True)).T @ features
    if task.sharded:
        sums = gather_rows(sums[None], rank_and_world()[1]).sum(dim=0)
    return normalize(sums, dim=1)


def build_model(image_options: ImageConfig, n_classes: int, projection_dim: int, pretrained: bool | None = None) -> Model:
    """One network with its head and tuners.

    Args:
        pretrained: whether weights are loaded, if it is not as the options have it.
    """
    name = image_options.backbone
    arguments = parse_backbone_args(image_options.backbone_args)
    with_weights = image_options.pretrained if pretrained is None else pretrained
    backbone = create_backbone(name, n_classes, image_options.channels, arguments, with_weights)
    text = ClassText.read(Path(name.removeprefix("local-dir:"))) if image_options.head_init == "text" else None
    return Model(backbone, projection_dim, image_options.tuning().apply(backbone, n_classes, text))


def build_optimizer(net: nn.Module, job: JobConfig) -> torch.optim.Optimizer:
    """The optimiser of the weights of one network that are trained; the epoch sets its learning rate."""
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    if job.optimizer == "adamw":
        fused = weights[0].device.type in FUSED
        return torch.optim.AdamW(weights, lr=job.lr, weight_decay=job.weight_decay, fused=fused)
    return torch.optim.SGD(weights, lr=job.lr, momentum=job.momentum, weight_decay=job.weight_decay)


def compile_network(net: nn.Module, device: torch.device) -> None:
    """Have a call of the network run compiled code, for every shape of its input another one.

    On a GPU the kernels of a network for small images take less time than their launches, so that they are launched
    together, as CUDA graphs, whose results last until `torch.compiler.cudagraph_mark_step_begin` is called. `Training`
    calls it, and has batches of unusual sizes run uncompiled; what only predicts calls `forward`, which is not compiled.
    """
    torch.backends.cudnn.benchmark = True
    net.compile(dynamic=False, **({"mode": "reduce-overhead"} if device.type == "cuda" else {}))


def placed(learner: nn.Module, accelerator: Accelerator, job: JobConfig) -> nn.Module:
    """The learner on the device, its network `net` and its momentum encoder `key_net`, if any, compiled where asked for.

    In mixed precision on a GPU, weights that are frozen take half their memory.
    """
    learner = learner.to(accelerator.device, getattr(torch, job.dtype))
    nets = [getattr(learner, name) for name in ("net", "key_net") if hasattr(learner, name)]
    if nets[0].frozen and job.mixed_precision == "bf16" and accelerator.device.type == "cuda":
        nets[0].halve(*nets[1:])
    for net in nets if job.compile else ():
        compile_network(net, accelerator.device)
    return learner
