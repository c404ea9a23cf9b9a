"""The sides of the step's benchmark: ours, the plain one, and the bare passes through the networks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.augment import MEAN, STD, waves
from benchmarks.plain import PlainCoReg
from coreg.learn.coreg import CoRegBatch, CoRegLearner
from coreg.learn.memory import Prototypes
from coreg.learn.options import PRESETS, CoRegOptions
from coreg.learn.two_nets import Verdict, co_train_batch
from coreg.network_options import ImageConfig
from coreg.run.training import Training, build_networks, build_optimizer, compile_network, placed
from coreg.settings import JobConfig
from coreg.views.augment import Augmentation
from coreg.views.resident import TrainingImages

STORED = 4  # batches of images that are there to choose from


@dataclass(frozen=True)
class Case:
    """A network and what it is trained on: B images of P and as many of U in a step."""

    backbone: str
    size: int
    channels: int
    classes: int
    batch: int
    queue: int


# on a CPU the papers' network takes a second for every ten images, so that its batch is small there
CASES = {
    "demo": Case("preact_resnet_tiny", 16, 1, 10, 64, 1024),
    "papers": Case("preact_resnet18", 32, 3, 100, 256 if torch.cuda.is_available() else 16, 8192),
}


@dataclass
class Bench:
    """Everything that the sides share, and the sides themselves: functions of the step's number."""

    case: Case
    accelerator: Accelerator
    job: JobConfig

    def __post_init__(self) -> None:
        case, device = self.case, self.accelerator.device
        rng, count = np.random.default_rng(0), STORED * case.batch
        self.rng, self.pixels = rng, waves(count, case.size, case.channels, rng)
        views = Augmentation(case.size, case.size // 8, True, mean=MEAN[: case.channels], std=STD[: case.channels])
        stored = torch.from_numpy(self.pixels).permute(0, 3, 1, 2).contiguous().to(device)
        self.data = TrainingImages(stored, torch.arange(count), views, device, seed=0)
        generator = torch.Generator().manual_seed(0)

        def spread(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        self.verdict = Verdict(spread(count).sigmoid(), spread(count, case.classes).softmax(1), np.ones(count, dtype=bool))
        self.verdict.guess = spread(count, case.classes).softmax(1)
        self.verdict.features = F.normalize(spread(count, 128), dim=1)
        self.queue_rows = (
            F.normalize(spread(case.queue, 128), dim=1),
            torch.randint(case.classes, (case.queue,), generator=generator).to(device),
            (torch.rand(case.queue, generator=generator) < 0.5).to(device),
        )

    def networks(self, count: int) -> list[nn.Module]:
        image_options = ImageConfig(backbone=self.case.backbone, channels=self.case.channels)
        return build_networks(self.accelerator, self.job, image_options, self.case.classes, 128, count)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The step's rows of P and of U."""
        first = 2 * self.case.batch * (step % (STORED // 2))
        x, u = np.arange(first, first + 2 * self.case.batch).reshape(2, -1)
        return x, u

    def training(self, preset: str) -> Training:
        """What `train_coreg.py` trains with, after the gate has opened and with a full queue."""
        options = CoRegOptions(queue_size=self.case.queue, **PRESETS[preset])
        prototypes, nets = Prototypes(self.case.classes, 128), self.networks(2)
        learners = [CoRegLearner(net, prototypes, options) for net in nets]
        for learner, peer in zip(learners, reversed(nets)):
            learner.set_peer(peer)
        learners = [placed(learner, self.accelerator, self.job) for learner in learners]
        for learner in learners:
            learner.queue.enqueue(*self.queue_rows)
        optimizers = [build_optimizer(net, self.job) for net in nets]
        compiled = self.case.batch if self.job.compile else None
        return Training(self.accelerator, learners, optimizers, compiled=compiled)

    def made(self, preset: str, step: int) -> CoRegBatch:
        x, u = self.rows(step)
        own = self.verdict if preset == "fast" else None
        batch = co_train_batch(self.data, x, u, self.verdict, (0, 0, step), 4.0, own=own)
        batch.gate = batch.fill_queue = True
        return batch

    def ours(self, preset: str) -> Callable[[int], None]:
        training = self.training(preset)
        return lambda step: training.learn(self.made(preset, step), self.job.lr)

    def plain_learner(self) -> PlainCoReg:
        case, device = self.case, self.accelerator.device
        net, peer = (net.to(device, memory_format=torch.contiguous_format) for net in self.networks(2))
        side = PlainCoReg(net, peer, case.classes, 128, case.queue)
        keys, labels, marks = self.queue_rows
        side.queue, side.queue_marks, side.filled = keys.clone(), marks.clone(), case.queue
        side.queue_targets = F.one_hot(labels, case.classes).float()
        return side

    def plain(self) -> Callable[[int], None]:
        side, job = self.plain_learner(), self.job
        optimizer = torch.optim.SGD(side.net.parameters(), job.lr, job.momentum, weight_decay=job.weight_decay)

        def step(number: int) -> None:
            x, u = self.rows(number)
            p, w = self.verdict.targets[x], self.verdict.weight[x]
            side.step(optimizer, self.pixels[x], self.pixels[u], p, w, 1.0, self.rng)

        return step

    def passes(
        self,
        predicted: bool = True,
        queries: Literal["trained", "made", "none"] = "trained",
        keys: bool = True,
        layout: torch.memory_format = torch.channels_last,
    ) -> Callable[[int], None]:
        """The bare passes of a step.

        Args:
            predicted: whether weak views are predicted in the step.
            queries: whether those of the contrastive loss are trained, only made, or left out.
            keys: whether the momentum encoder makes keys.
            layout: of weights and images in memory.
        """
        case, device = self.case, self.accelerator.device
        net, peer, key_net = (net.to(device, memory_format=layout) for net in self.networks(3))
        peer.eval()
        if self.job.compile:
            for module in (net, peer, key_net):
                compile_network(module, device)

        def images(count: int) -> Tensor:
            made = torch.randn(count * case.batch, case.channels, case.size, case.size, device=device)
            return made.contiguous(memory_format=layout)

        one, two, four = (images(count) for count in (1, 2, 4))

        def step(number: int) -> None:
            if self.job.compile:
                torch.compiler.cudagraph_mark_step_begin()
            with self.accelerator.autocast():
                with torch.no_grad():
                    if predicted:
                        peer(two)
                        for _ in range(4):  # own weak views: in train mode every view is a batch of its own
                            net(one)
                    if keys:
                        key_net(two)
                outputs = [*net(four)]
                query = [] if queries == "none" else [net(two)[1]]
            if queries == "trained":
                outputs += query
            sum(output.float().mean() for output in outputs).backward()
            for parameter in net.parameters():
                parameter.grad = None

        return step

    def sides(self) -> dict[str, Callable[[], Callable[[int], None]]]:
        return {
            "plain": self.plain,
            "ours": partial(self.ours, "reference"),
            "passes": self.passes,
            "ours, fast": partial(self.ours, "fast"),
            "passes, fast": partial(self.passes, predicted=False),
        }

    def clock(self) -> float:
        """Seconds: of the processor where all runs on one thread, so that other programs do not count."""
        alone = self.accelerator.device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()

    def wait(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
