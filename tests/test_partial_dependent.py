"""ABLE and IDGP against loops over images and classes, in float64; degenerate batches."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coreg.learn.partial import METHODS
from coreg.learn.partial.method import Outputs
from coreg.learn.partial_options import OPTIONS
from coreg.learn.schedules import Step

N, C, D = 7, 4, 3
INDEX = torch.tensor([5, 0, 3, 2])
SETS = torch.tensor([[str(j) in members for j in range(C)] for members in "01 1 0123 23 03 023 12".split()])


def made(name, dtype=torch.float64, **options):
    method = METHODS[name](nn.Linear(1, 1), SETS, OPTIONS[name](**options), dtype=dtype)
    noise = torch.rand(N, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * SETS
    method.confidence.copy_(noise / noise.sum(1, keepdim=True))
    return method


def random(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def same_with_gradients(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("index", [INDEX, INDEX[:1]])
def test_able(index):
    method, n = made("able", contrast_weight=0.6, contrast_temperature=0.2), len(index)
    assert method.passes(Step(0, 9)).views == ("weak", "strong")
    logits, raw = random(n, C), [random(n, D, seed=seed) for seed in (1, 2)]
    views = [row / row.norm() for view in raw for row in view]
    stands_for = [max((z.softmax(0)[j].item(), j) for j in range(C) if SETS[i, j])[1] for i, z in zip(index, logits)]
    by_hand = 0.0
    for row, i in enumerate(index.tolist()):
        by_hand = by_hand - (method.confidence[i] * logits[row].log_softmax(0)).sum() / n
        for anchor in (row, n + row):
            exponentials = [(views[anchor] @ views[b] / 0.2).exp() if b != anchor else 0 for b in range(2 * n)]
            for b in range(2 * n):
                k = stands_for[b % n]
                weight = method.confidence[i, k] / stands_for.count(k)
                if b != anchor:
                    by_hand = by_hand - 0.6 * 0.2 / 0.07 * weight * (exponentials[b] / sum(exponentials)).log() / (2 * n)
    outputs = Outputs((logits, logits), tuple(F.normalize(view, dim=1) for view in raw))
    parts = method.loss(outputs, index, Step(0, 9))
    same_with_gradients(parts["loss"], by_hand, (logits, *raw))


@pytest.mark.parametrize(("at", "weight"), [((0, 2), None), ((0, 3), 3 / 12), ((4, 2), 1.0)])
def test_idgp(at, weight):
    """Six epochs of five steps: apart up to the third step, divergences growing over twelve."""
    method, when = made("idgp", joint_start=2 / 30, divergence_ramp=0.4), Step(at[0], 6, at[1], 5)
    method.flips.copy_(torch.rand(N, C, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * SETS)
    f_logits, g_logits, n = random(4, C), random(4, C, seed=1), len(INDEX)
    by_hand = 0.0
    for row, i in enumerate(INDEX.tolist()):
        f, g, rest = f_logits[row].softmax(0), g_logits[row].sigmoid(), [j for j in range(C) if SETS[i, j]]
        d, b = method.confidence[i].tolist(), method.flips[i].tolist()
        each = [-d[j] * f[j].log() - b[j] * g[j].log() - (1 - b[j]) * (1 - g[j]).log() for j in range(C)]
        if weight is not None:
            v = {j: 1 - g[j].item() if d[j] == max(d) else g[j].item() for j in rest}
            u = {j: (1 - v[j]) / v[j] * math.prod(v.values()) for j in rest}
            inside = sum(f[j].item() for j in rest)
            for j in range(C):
                each.append(-(g[j].log() if SETS[i, j] else (1 - g[j]).log()))
                each.append(weight * d[j] * (math.log(d[j]) - f[j].log()) if d[j] else 0)
                each.append(weight * b[j] * (math.log(b[j]) - g[j].log()) if b[j] else 0)
            for j in rest:
                each.append(-u[j] / sum(u.values()) * f[j].log() - f[j].item() / inside * (1 - g[j]).log())
        by_hand = by_hand + sum(each) / n
    outputs = Outputs((torch.cat([f_logits, g_logits], dim=1),), ())
    loss = method.loss(outputs, INDEX, when)["loss"]
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)  # 1e-7 above 1 within a logarithm
    leaves = (f_logits, g_logits)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(by_hand, leaves)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    before = method.confidence.clone()
    with torch.no_grad():
        method.update(outputs, INDEX, when)
    for row, i in enumerate(INDEX.tolist()):
        p = f_logits[row].softmax(0) * SETS[i]
        torch.testing.assert_close(method.confidence[i], (p / p.sum()).detach())
        torch.testing.assert_close(method.flips[i], (g_logits[row].sigmoid() * SETS[i]).detach())
    assert torch.equal(method.confidence[[1, 4, 6]], before[[1, 4, 6]])


def test_the_second_network_of_idgp_starts_as_the_first_and_is_trained_on_its_own():
    method = made("idgp")
    assert torch.equal(method.generator.weight, method.net.weight) and method.generator is not method.net
    assert [id(p) for p in method.trained().parameters()] == [
        id(p) for net in (method.net, method.generator) for p in net.parameters()
    ]
    assert method.judged() is method.net


@pytest.mark.parametrize("name", ["able", "idgp"])
@pytest.mark.parametrize("index", [[2], [1], [2, 1], [1, 1]], ids=str)
def test_full_and_single_sets_and_small_batches_give_finite_losses(name, index):
    method, n = made(name, torch.float32), len(index)
    for scale in (0.0, 300.0):
        width = 2 * C if name == "idgp" else C
        logits = random(n, width, seed=5, scale=scale).float().detach().requires_grad_()
        features = F.normalize(torch.ones(n, D), dim=1).requires_grad_()
        outputs = Outputs((logits, logits), (features, features))
        loss = method.loss(outputs, torch.tensor(index), Step(5, 9))["loss"]
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
        with torch.no_grad():
            method.update(outputs, torch.tensor(index), Step(5, 9))
        torch.testing.assert_close(method.confidence.sum(1), torch.ones(N))
