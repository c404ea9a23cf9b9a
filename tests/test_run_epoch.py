"""What happens around the steps of an epoch: learning rates, batch statistics counted anew."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from coreg.nets.model import CoRegNet, create_backbone
from coreg.run.batches import TrainingImages
from coreg.run.epoch import count_statistics, train_epoch
from coreg.run.training import Training
from coreg.views.augment import Augmentation
from coreg.views.order import ShuffledRows


@pytest.mark.parametrize("n", [21, 5])
def test_batch_statistics_are_means_over_one_weak_view_of_every_whole_batch(n):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 1, 16, 16), np.uint8))
    views = Augmentation(size=16, padding=2, flip=False, mean=(0.3,), std=(0.4,))
    data = TrainingImages(pixels, torch.arange(n), views, torch.device("cpu"), seed=3, dtype=torch.float64)
    task = SimpleNamespace(job=SimpleNamespace(batch_size=4, seed=3), data=data)
    torch.manual_seed(0)
    nets = [CoRegNet(create_backbone("preact_resnet_tiny", 3, 1, {}, False), 8).double() for _ in range(2)]
    before = [net.state_dict()["backbone.conv1.weight"].clone() for net in nets]
    count_statistics(task, Training(nets, [], [], [], epoch=7))
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
    """The schedule goes from 0.1 to 0.03 to 0.05; a group that began with a fifth of the peak stays at a fifth."""
    whole, fifth = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    groups = [{"params": [whole]}, {"params": [fifth], "lr": 0.02}]
    task = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, is_main_process=False),
        job=SimpleNamespace(gradient_accumulation_steps=1, lr=0.1, epochs=3),
        data=None,
        test=None,
    )
    training = Training([], [], [], [torch.optim.SGD(groups, lr=0.1)])
    for rate in (0.1, 0.03, 0.05):
        curves = train_epoch(task, training, rate, None, None, None)
        rates = [group["lr"] for group in training.optimizers[0].param_groups]
        assert curves["lr"] == rates[0] == rate and rates[1] == pytest.approx(rate / 5, rel=1e-12)
