"""What happens around the steps of an epoch: learning rates, batch statistics counted anew."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from coreg.nets.model import Model, create_backbone
from coreg.run.epoch import count_statistics
from coreg.run.training import Training
from coreg.views.augment import Augmentation
from coreg.views.order import ShuffledRows
from coreg.views.resident import TrainingImages


@pytest.mark.parametrize("n", [21, 5])
def test_batch_statistics_are_means_over_one_weak_view_of_every_whole_batch(n):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 1, 16, 16), np.uint8))
    views = Augmentation(size=16, padding=2, flip=False, mean=(0.3,), std=(0.4,))
    data = TrainingImages(pixels, torch.arange(n), views, torch.device("cpu"), seed=3, dtype=torch.float64)
    task = SimpleNamespace(job=SimpleNamespace(batch_size=4, seed=3, compile=False), data=data)
    torch.manual_seed(0)
    nets = [Model(create_backbone("preact_resnet_tiny", 3, 1, {}, False), 8).double() for _ in range(2)]
    before = [net.state_dict()["backbone.conv1.weight"].clone() for net in nets]
    count_statistics(task, nets, epoch=7)
    for number, net in enumerate(nets):
        order = ShuffledRows(np.arange(n), 8, (3, "statistics", 7, number))
        whole = [order.batch(step) for step in range(max(n // 8, 1))]
        seen = [net.backbone.conv1(data.view("weak", rows, ("statistics", 7, number))) for rows in whole]
        mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen]).mean(dim=0)
        var = torch.stack([x.transpose(0, 1).flatten(1).var(dim=1) for x in seen]).mean(dim=0)
        torch.testing.assert_close(net.backbone.norm1.running_mean, mean)
        torch.testing.assert_close(net.backbone.norm1.running_var, var)
        assert torch.equal(net.backbone.conv1.weight, before[number]) and net.backbone.norm1.momentum == 0.1


def test_weights_with_a_learning_rate_of_their_own_keep_their_share_of_it():
    """The schedule goes from 0.1 to 0.03 to 0.05; a group that began with a fifth of the peak moves a fifth as far."""

    class Sum(torch.nn.Module):
        """The gradient of both weights is one, whatever the batch."""

        def __init__(self):
            super().__init__()
            self.whole, self.fifth = (torch.nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))

        def forward(self, batch):
            return {"loss": self.whole + self.fifth}

    learner = Sum()
    groups = [{"params": [learner.whole]}, {"params": [learner.fifth], "lr": 0.02}]
    training = Training(Accelerator(cpu=True), [learner], [torch.optim.SGD(groups, lr=0.1)])
    moved = 0.0
    for rate in (0.1, 0.03, 0.05):
        training.learn(SimpleNamespace(size=1), rate)
        moved -= rate
        assert learner.whole.item() == pytest.approx(moved, rel=1e-12)
        assert learner.fifth.item() == pytest.approx(moved / 5, rel=1e-12)


def test_only_batches_of_the_usual_sizes_run_compiled_code():
    """Global batches of B and 2 B are compiled for, what is left over of an epoch is not, and what only predicts is not."""
    compiled, ran = [], []

    def backend(graph, inputs):
        compiled.append(len(inputs[-1]))
        return lambda *arguments: ran.append(len(arguments[-1])) or graph(*arguments)

    class Net(torch.nn.Module):
        def forward(self, images):
            return images * 2

    class Learner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.weight = Net(), torch.nn.Parameter(torch.ones(()))
            self.net.compile(backend=backend, dynamic=False)

        def forward(self, batch):
            return {"loss": self.weight * self.net(torch.ones(batch.size)).sum()}

    learner = Learner()
    training = Training(Accelerator(cpu=True), [learner], [torch.optim.SGD(learner.parameters(), lr=0.1)], compiled=4)
    for size in (8, 8, 3, 4, 5, 8):
        training.learn(SimpleNamespace(size=size), 0.0)
    assert float(training.sums["loss"]) == 2 * (8 + 8 + 3 + 4 + 5 + 8)
    assert compiled == [8, 4] and ran == [8, 8, 4, 8]
    assert learner.net.forward(torch.ones(7)).sum() == 14 and compiled == [8, 4]
