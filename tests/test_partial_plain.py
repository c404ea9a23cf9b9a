"""CC, RC, PRODEN, LWS, LWC and CR-DPLL against loops over images and classes, in float64."""

import dataclasses
import math
import typing

import pytest
import torch
from torch.nn import Identity

from coreg.learn.partial import METHODS
from coreg.learn.partial.method import Outputs, PartialMethod, within
from coreg.learn.partial_options import OFFICIAL, OPTIONS, Name, View
from coreg.learn.schedules import Step
from coreg.settings import JobConfig
from coreg.views.augment import VIEWS

N, C = 7, 4
INDEX = torch.tensor([5, 0, 3])  # a batch of three of seven images
SETS = torch.tensor(
    [[1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 1], [1, 0, 1, 1], [0, 1, 1, 0]]
).bool()
STEP = Step(3, 30)


def logits(seed=0, views=1, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        (scale * torch.randn(len(INDEX), C, generator=generator, dtype=torch.float64)).requires_grad_()
        for _ in range(views)
    )


def made(name, **options):
    method = METHODS[name](Identity(), SETS, OPTIONS[name](**options), dtype=torch.float64)
    return method


def outputs_of(z):
    return Outputs(z, ())


def fill(table, seed=3):
    """Random rows that sum to 1 on the candidate sets."""
    table.copy_(within(torch.randn(N, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), SETS))


def gradient_is_right(method, z):
    method.loss(outputs_of(z), INDEX, STEP)["loss"].backward()
    for view in z:
        for place in ((0, 0), (2, 3)):
            moved = []
            for h in (1e-6, -1e-6):
                shifted = [v.detach().clone() for v in z]
                shifted[[v is view for v in z].index(True)][place] += h
                moved.append(method.loss(outputs_of(tuple(shifted)), INDEX, STEP)["loss"].item())
            assert view.grad[place].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5, abs=1e-8)


def test_every_method_has_a_name_and_official_settings():
    assert set(METHODS) == set(typing.get_args(Name)) == set(OFFICIAL)
    shared = {field.name for group in (JobConfig, OPTIONS["cc"]) for field in dataclasses.fields(group)}
    for name, values in OFFICIAL.items():
        own = {field.name for field in dataclasses.fields(OPTIONS[name])}
        assert all(set(chosen) <= shared | own for chosen in values.values()), name
    assert all(issubclass(method, PartialMethod) for method in METHODS.values())
    assert set(typing.get_args(View)) <= set(VIEWS)


def test_cc_is_minus_the_logarithm_of_the_mass_on_the_candidates():
    method, z = made("cc"), logits()
    by_hand = 0.0
    for row, i in enumerate(INDEX.tolist()):
        p = [math.exp(v) / sum(math.exp(w) for w in z[0][row].tolist()) for v in z[0][row].tolist()]
        by_hand -= math.log(sum(p[j] for j in range(C) if SETS[i, j])) / 3
    assert method.loss(outputs_of(z), INDEX, STEP)["loss"].item() == pytest.approx(by_hand, rel=1e-12)
    gradient_is_right(method, z)
    before = method.state_dict()
    method.update(outputs_of(z), INDEX, STEP)
    assert before == {} == method.state_dict()  # nothing to remember


def test_on_true_labels_cc_is_the_supervised_cross_entropy():
    z, labels = logits(), torch.tensor([0, 1, 2, 3, 0, 1, 2])
    sets = torch.nn.functional.one_hot(labels, C).bool()
    method = METHODS["supervised"](Identity(), sets, OPTIONS["supervised"](), dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(z[0], labels[INDEX])
    torch.testing.assert_close(method.loss(outputs_of(z), INDEX, STEP)["loss"], expected)


@pytest.mark.parametrize("name", ["rc", "proden"])
def test_rc_and_proden_follow_the_network_within_the_candidate_set(name):
    method, z = made(name), logits()
    for i in range(N):
        for j in range(C):
            assert method.confidence[i, j] == (1 / SETS[i].sum().item() if SETS[i, j] else 0)
    fill(method.confidence)
    before = method.confidence.clone()
    by_hand = -sum(before[i, j] * z[0][r].log_softmax(0)[j] for r, i in enumerate(INDEX.tolist()) for j in range(C)) / 3
    torch.testing.assert_close(method.loss(outputs_of(z), INDEX, STEP)["loss"], by_hand)
    gradient_is_right(method, z)
    method.update(outputs_of(tuple(v.detach() for v in z)), INDEX, STEP)
    for row, i in enumerate(INDEX.tolist()):
        p = z[0][row].detach().softmax(0) * SETS[i]
        torch.testing.assert_close(method.confidence[i], p / p.sum())
    others = [i for i in range(N) if i not in INDEX.tolist()]
    assert torch.equal(method.confidence[others], before[others])
    assert METHODS[name].reads_again == (name == "rc")


@pytest.mark.parametrize("name", ["lws", "lwc"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_leveraged_losses(name, beta):
    method, z = made(name, leverage=beta), logits()
    assert (method.weights == 1 / C).all() and method.reads_again
    method.weights.copy_(torch.rand(N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    by_hand = 0.0
    for row, i in enumerate(INDEX.tolist()):
        v, f = z[0][row].tolist(), z[0][row].softmax(0).tolist()
        for j in range(C):
            u = method.weights[i, j].item()
            if name == "lws":
                by_hand += u / (1 + math.exp(v[j])) if SETS[i, j] else beta * u / (1 + math.exp(-v[j]))
            else:
                by_hand -= u * math.log(f[j]) if SETS[i, j] else beta * u * math.log(1 - f[j] + 1e-8)
    assert method.loss(outputs_of(z), INDEX, STEP)["loss"].item() == pytest.approx(by_hand / 3, rel=1e-10)
    gradient_is_right(method, z)
    method.update(outputs_of(tuple(v.detach() for v in z)), INDEX, STEP)
    for row, i in enumerate(INDEX.tolist()):
        f = z[0][row].detach().softmax(0)
        for members in (SETS[i], ~SETS[i]):
            if members.any():
                torch.testing.assert_close(method.weights[i][members], f[members] / f[members].sum())


def test_leveraged_weights_of_a_full_set_are_zero_outside_of_nothing():
    method, index = made("lwc"), torch.tensor([2])
    method.update(Outputs((torch.zeros(1, C, dtype=torch.float64),), ()), index, STEP)
    torch.testing.assert_close(method.weights[2], torch.full((C,), 0.25, dtype=torch.float64))


def test_lwc_stays_finite_where_the_network_is_sure_of_a_wrong_class():
    method = METHODS["lwc"](Identity(), SETS, OPTIONS["lwc"]())
    z = torch.tensor([[0.0, 0.0, 200.0, 0.0]], requires_grad=True)  # image 0 has {0, 1}
    method.loss(Outputs((z,), ()), torch.tensor([0]), STEP)["loss"].backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(("epoch", "ramp"), [(0, 0.0), (3, 0.2), (15, 1.0), (29, 1.0)])
def test_cr_dpll(epoch, ramp):
    method, z, step = made("cr_dpll", consistency_weight=0.7), logits(views=3), Step(epoch, 30)
    assert method.passes(step).views == ("weak", "strong", "strong")
    fill(method.confidence)
    by_hand = 0.0
    for row, i in enumerate(INDEX.tolist()):
        for view in z:
            f = view[row].softmax(0).tolist()
            for t, p in zip(method.confidence[i].tolist(), f):
                by_hand += ramp * 0.7 * t * (math.log(t) - math.log(p)) if t else 0
        for j, p in enumerate(z[0][row].softmax(0).tolist()):
            by_hand -= 0 if SETS[i, j] else math.log(1 + 1e-7 - p)
    assert method.loss(outputs_of(z), INDEX, step)["loss"].item() == pytest.approx(by_hand / 3, rel=1e-10)
    gradient_is_right(method, z)
    method.update(outputs_of(tuple(v.detach() for v in z)), INDEX, step)
    for row, i in enumerate(INDEX.tolist()):
        product = torch.stack([v[row].detach().softmax(0) for v in z]).prod(0) ** (1 / 3) * SETS[i]
        torch.testing.assert_close(method.confidence[i], product / product.sum())


@pytest.mark.parametrize("name", ["proden", "rc", "lws", "lwc", "cr_dpll"])
def test_candidates_whose_probabilities_underflow_still_share_one_unit(name):
    method = METHODS[name](Identity(), SETS, OPTIONS[name]())
    # all mass on class 3, which image 0 with {0, 1} does not have: e^-400 is zero in float32
    z = torch.tensor([[-400.0, -401.0, 0.0, 400.0]])
    method.update(Outputs((z, z, z), ()), torch.tensor([0]), STEP)
    table = method.weights if name.startswith("lw") else method.confidence
    expected = torch.tensor([1.0, math.exp(-1)]) / (1 + math.exp(-1))
    torch.testing.assert_close(table[0, :2], expected)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].__module__.endswith(("plain", "average"))])
def test_full_and_single_candidate_sets_and_a_batch_of_nobody_give_finite_losses(name):
    method = METHODS[name](Identity(), SETS, OPTIONS[name]())
    for index in (torch.tensor([2]), torch.tensor([1])):
        z = tuple(torch.full((1, C), 50.0 * k).index_fill_(1, torch.tensor([0]), -90.0).requires_grad_() for k in range(3))
        loss = method.loss(Outputs(z, ()), index, Step(20, 30))["loss"]
        loss.backward()
        assert loss.isfinite() and all(v.grad is None or v.grad.isfinite().all() for v in z)
        method.update(Outputs(tuple(v.detach() for v in z), ()), index, STEP)
    assert all(value.isfinite().all() for value in method.state_dict().values())
