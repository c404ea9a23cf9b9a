"""A co-training step on a GPU: the numbers of the CPU, and no waiting for the device."""

import numpy as np
import pytest
import torch

from benchmarks.augment import MEAN, STD, waves
from coreg.learn.coreg import CoRegLearner
from coreg.learn.memory import Prototypes
from coreg.learn.options import CoRegOptions
from coreg.learn.two_nets import Verdict, co_train_batch
from coreg.nets.model import Model
from coreg.nets.preact import PreActResNet
from coreg.views.augment import Augmentation
from coreg.views.resident import TrainingImages

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
C, D, N, B = 5, 16, 40, 8


class Side:
    """Two learners with the same weights wherever they are, and the batches of their steps."""

    def __init__(self, device):
        device = torch.device(device)
        pixels = torch.from_numpy(waves(N, 16, 3, np.random.default_rng(0))).permute(0, 3, 1, 2).contiguous().to(device)
        views = Augmentation(16, 2, True, mean=MEAN, std=STD)
        self.data = TrainingImages(pixels, torch.arange(N), views, device, seed=0)
        torch.manual_seed(0)
        nets = [Model(PreActResNet(C, 3, widths=(16, 32), depths=(1, 1)), D) for _ in range(2)]
        prototypes, options = Prototypes(C, D), CoRegOptions(queue_size=50, projection_dim=D)
        self.learner = CoRegLearner(nets[0], prototypes, options).to(device, memory_format=torch.channels_last).train()
        self.learner.set_peer(nets[1].to(device).eval())
        targets, weight = torch.rand(N, C).softmax(1).to(device), torch.rand(N).to(device)
        self.verdict = Verdict(weight, targets, np.ones(N, dtype=bool))
        self.optimizer = torch.optim.SGD(self.learner.net.parameters(), lr=0.1, momentum=0.9)

    def step(self, number):
        rows = np.random.default_rng(number).permutation(N)
        x, u = rows[:B], rows[B : 2 * B - 3]
        batch = co_train_batch(self.data, x, u, self.verdict, (0, 0, number), 4.0)
        batch.ramp, batch.gate, batch.fill_queue, batch.n_labelled = 0.5, True, True, 4
        batch.labelled = self.data.view("weak", rows[-4:], ("labelled", number)), self.data.places(rows[-4:] % C)
        self.optimizer.zero_grad(set_to_none=True)
        parts = self.learner(batch)
        parts["loss"].backward()
        self.optimizer.step()
        return parts


def test_a_side_is_a_function_of_its_seed():
    (first, second), parts = (Side("cpu"), Side("cpu")), []
    for number in range(3):
        parts = [side.step(number) for side in (first, second)]
    assert set(parts[0]) == {"loss", "trusted", "distrusted", "supervised", "prototype", "contrast"}
    assert all(torch.equal(parts[0][name], parts[1][name]) for name in parts[0])


@pytest.mark.gpu
@needs_gpu
def test_steps_on_a_gpu_give_the_numbers_of_the_cpu():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    cpu, gpu = Side("cpu"), Side("cuda")
    for number in range(3):
        expected, actual = cpu.step(number), gpu.step(number)
        for name in expected:
            torch.testing.assert_close(actual[name].cpu(), expected[name], rtol=1e-3, atol=1e-5, msg=name)
    for (name, theirs), ours in zip(cpu.learner.named_parameters(), gpu.learner.parameters()):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.gpu
@needs_gpu
def test_no_step_waits_for_the_gpu():
    side = Side("cuda")
    side.step(0)  # libraries wait for the device when they are first called
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (1, 2):
            side.step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
