"""The training step around a method: what it looks at, in which order tables are written, gradients, the second reading."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from coreg.learn.partial import METHODS
from coreg.learn.partial.method import PartialBatch
from coreg.learn.partial_options import OPTIONS
from coreg.learn.schedules import Step
from coreg.nets.model import Model
from coreg.nets.preact import PreActResNet

N, C, D, n = 8, 3, 4, 4
INDEX = torch.tensor([4, 1, 7, 2])
STEP = Step(6, 10)


def learner(name, **options):
    torch.manual_seed(0)
    own = {"projection_dim": D, "queue_size": 10, "key_momentum": 0.9, "plan_queue": 5}
    options |= {field.name: own[field.name] for field in dataclasses.fields(OPTIONS[name]) if field.name in own}
    sets = torch.rand(N, C).argsort(1) < 2
    net = Model(PreActResNet(C, 1, widths=(4, 8), depths=(1, 1), norm="none"), D)
    made = METHODS[name](net, sets, OPTIONS[name](**options), dtype=torch.float64).double().train()
    for p in made.net.parameters():
        p.data += 0.05 * torch.randn_like(p)  # the momentum encoder lags behind
    return made


def tables(made):
    """What a method remembers, without its networks."""
    return {name: value for name, value in made.state_dict().items() if not name.startswith(("net.", "key_net."))}


def images(seed, rows=n):
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(made, **more):
    passes = made.passes(STEP)
    views = tuple(images(k) for k in range(len(passes.views)))
    if passes.mixup != "none":
        more |= {"mixed": images(7), "partner": torch.tensor([2, 3, 1, 0]), "share_kept": 0.8}
    return PartialBatch(
        INDEX,
        STEP,
        views,
        key=images(5) if passes.key else None,
        glance=images(6) if passes.glance else None,
        draws=("test",),
        **more,
    )


@pytest.mark.parametrize("name", list(METHODS))
def test_a_step_of_every_method_trains_and_remembers(name):
    made = learner(name)
    before = copy.deepcopy(tables(made))
    parts = made(batch(made))
    assert parts["loss"].requires_grad and not any(p.requires_grad for k, p in parts.items() if k != "loss")
    parts["loss"].backward()
    trained = list(made.net.backbone.parameters())
    assert all(p.grad.isfinite().all() for p in trained) and any(p.grad.abs().sum() > 0 for p in trained)
    contrasts = hasattr(made, "key_net")
    assert contrasts == (name in ("pico", "pico_plus", "irnet", "alim_onehot", "alim_scale"))
    assert (made.net.projector[0].weight.grad is not None) == (contrasts or name == "able")
    assert not contrasts or all(p.grad is None for p in made.key_net.parameters())
    changed = [k for k, v in tables(made).items() if not torch.equal(v.nan_to_num(), before[k].nan_to_num())]
    assert bool(changed) == (bool(before) and not made.reads_again)
    for table in ("confidence", "weights"):
        if table in changed:
            others = [i for i in range(N) if i not in INDEX.tolist()]
            assert torch.equal(tables(made)[table][others], before[table][others])


def test_proden_remembers_what_the_network_said_before_the_step_and_rc_what_it_says_after():
    for name in ("proden", "rc"):
        made = learner(name)
        one = batch(made)
        first = made.net(one.views[0])[0].detach()
        optimizer = torch.optim.SGD(made.net.parameters(), lr=0.5)
        made(one)["loss"].backward()
        optimizer.step()
        made.after_step(one)
        last = made.net(one.views[0])[0].detach()
        assert (first - last).abs().max() > 1e-3
        p = (first if name == "proden" else last).softmax(1) * made.candidates[INDEX]
        torch.testing.assert_close(made.confidence[INDEX], p / p.sum(1, keepdim=True))


def test_keys_come_from_the_moving_average_of_the_network():
    made = learner("pico")
    key_net, one = copy.deepcopy(made.key_net), batch(made)
    for key, query in zip(key_net.parameters(), made.net.parameters()):
        key.data.copy_(0.9 * key + 0.1 * query)
    made(one)
    torch.testing.assert_close(made.queue.rows()[0], key_net(one.key)[1])


def test_labelled_images_add_a_supervised_term():
    made = learner("cc")
    classes = torch.tensor([2, 0, 1])
    parts = made(batch(made, labelled=(images(9, 3), classes), n_labelled=3))
    supervised = nn.functional.cross_entropy(made.net(images(9, 3))[0], classes)
    torch.testing.assert_close(parts["supervised"], supervised.detach())
    torch.testing.assert_close(parts["loss"], made(batch(made))["loss"] + supervised)


def test_a_resumed_learner_takes_the_same_step():
    for name in ("rc", "pico_plus", "alim_scale", "irnet", "able", "idgp", "solar", "records", "htc"):
        first, second = learner(name), learner(name)
        first(batch(first))
        first.finish_epoch(STEP)
        second.load_state_dict(first.state_dict())
        assert torch.equal(first(batch(first))["loss"], second(batch(second))["loss"])
