"""A whole co-training step against the method written out in plain steps, and the schedules against hand-worked values."""

import copy
import math

import pytest
import torch
from torch import nn

from coreg.learn.coreg import CoRegBatch, CoRegLearner, WarmUpBatch
from coreg.learn.memory import Prototypes
from coreg.learn.options import CoRegOptions
from coreg.learn.schedules import cosine_lr, ramp
from coreg.nets.model import Model
from coreg.nets.preact import PreActResNet

C, D = 4, 6


def small_net(seed):
    torch.manual_seed(seed)
    return Model(PreActResNet(C, 1, widths=(4, 8), depths=(1, 1), norm="none"), D).double()


def learner(options, seed=0):
    made = CoRegLearner(small_net(seed), Prototypes(C, D).double(), options).double()
    made.set_peer(small_net(seed + 1).eval())
    torch.nn.init.normal_(made.prototypes.value)
    made.prototypes.value.copy_(nn.functional.normalize(made.prototypes.value, dim=1))
    return made.train()


def batch(n_x=5, n_u=3, gate=True, seed=7):
    generator = torch.Generator().manual_seed(seed)

    def images(n):
        return torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64)

    n = 2 * n_x + 2 * n_u
    strong, order = images(n), torch.randperm(n, generator=generator)
    return CoRegBatch(
        x_weak=(images(n_x), images(n_x)),
        u_weak=(images(n_u), images(n_u)),
        strong=strong,
        partners=strong[order],
        position=torch.arange(n),
        partner_position=order,
        x_targets=torch.softmax(torch.randn(n_x, C, generator=generator, dtype=torch.float64), 1),
        x_weight=torch.rand(n_x, generator=generator, dtype=torch.float64),
        n_x=n_x,
        n_u=n_u,
        share_kept=0.8,
        ramp=0.5,
        gate=gate,
        fill_queue=True,
    )


def step_by_hand(made, b, o):
    """AAAI eq. 5-11, image by image where that is possible; `made` is a copy whose state is changed as a side effect."""
    net, peer, key = made.net, made._peer[0], made.key_net

    def p(network, image):
        return network(image[None])[0][0].softmax(0).detach()

    x_t, u_t = [], []
    for i in range(b.n_x):
        own = (p(net, b.x_weak[0][i]) + p(net, b.x_weak[1][i])) / 2
        fused = b.x_weight[i] * b.x_targets[i] + (1 - b.x_weight[i]) * own
        x_t.append(fused ** (1 / o.temperature) / (fused ** (1 / o.temperature)).sum())
    for i in range(b.n_u):
        four = sum(p(network, view[i]) for network in (net, peer) for view in b.u_weak) / 4
        u_t.append(four ** (1 / o.temperature) / (four ** (1 / o.temperature)).sum())
    targets = x_t + x_t + u_t + u_t

    # prototypes, one image after another, then normalised
    prototypes = made.prototypes.value.clone()
    for i in range(b.n_x):
        c = int(x_t[i].argmax())
        q = net(b.x_weak[0][i][None])[1][0].detach()
        prototypes[c] = o.prototype_momentum * prototypes[c] + (1 - o.prototype_momentum) * q
    prototypes = prototypes / prototypes.norm(dim=1, keepdim=True)

    trusted = distrusted = prot_x = prot_u = 0.0
    for r in range(2 * b.n_x + 2 * b.n_u):
        partner, lam = int(b.partner_position[r]), b.share_kept
        image = lam * b.strong[r] + (1 - lam) * b.strong[partner]
        y = lam * targets[r] + (1 - lam) * targets[partner]
        logits, q = (out[0] for out in net(image[None]))
        f, s = logits.softmax(0), (prototypes @ q / o.prototype_temperature).softmax(0)
        if r < 2 * b.n_x:
            trusted = trusted - (y * f.log()).sum() / (2 * b.n_x)
            prot_x = prot_x + (y * (y / s).log()).sum() / (2 * b.n_x)
        else:
            distrusted = distrusted + ((f - y) ** 2).sum() / C / (2 * b.n_u)
            prot_u = prot_u + ((s - y) ** 2).sum() / C / (2 * b.n_u)
    loss = trusted + o.lambda_u * b.ramp * distrusted + o.prototype_weight * (prot_x + o.lambda_u * prot_u)

    # contrast: momentum encoder first, then every anchor against queries, keys and queue
    with torch.no_grad():
        for k, q in zip(key.parameters(), net.parameters()):
            k.mul_(o.key_momentum).add_((1 - o.key_momentum) * q)
    x1, x2, u1, u2 = b.strong.split([b.n_x, b.n_x, b.n_u, b.n_u])
    queries = net(torch.cat([x1, u1]))[1]
    keys = key(torch.cat([x2, u2]))[1].detach()
    old_keys, old_labels, old_marks = made.queue.rows()
    rows = torch.cat([queries, keys, old_keys])
    label = [int(t.argmax()) for t in x_t + u_t]
    mark = [True] * b.n_x + [False] * b.n_u
    all_labels, all_marks = label * 2 + old_labels.tolist(), mark * 2 + old_marks.tolist()
    n = b.n_x + b.n_u
    for i in range(n):
        scores = {j: queries[i] @ rows[j] / o.contrast_temperature for j in range(len(rows)) if j != i}
        same = {j for j in scores if all_labels[j] == label[i]}
        good = {j for j in same if mark[i] and all_marks[j]} | {n + i}
        kept = [j for j in scores if j in good or j not in same]
        log_sum = torch.logsumexp(torch.stack([scores[j] for j in kept]), 0)
        loss = loss - o.contrast_weight * sum(scores[j] - log_sum for j in good) / len(good) / n
    return loss, prototypes, keys, label, mark


OPTIONS = CoRegOptions(
    queue_size=32, projection_dim=D, key_momentum=0.9, prototype_momentum=0.8, prototype_weight=0.3, contrast_weight=0.2
)


@pytest.mark.parametrize(("n_x", "n_u"), [(5, 3), (1, 4), (4, 0)])
def test_a_step_is_the_method_written_out(n_x, n_u):
    made = learner(OPTIONS)
    made(batch(6, 2, seed=1))  # so that the queue holds something
    twin = copy.deepcopy(made)
    b = batch(n_x, n_u)
    parts = made(b)
    loss, prototypes, keys, labels, marks = step_by_hand(twin, b, OPTIONS)
    torch.testing.assert_close(parts["loss"], loss, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(made.prototypes.value, prototypes, rtol=1e-9, atol=1e-11)
    queued = made.queue.rows()
    torch.testing.assert_close(queued[0][-len(keys) :], keys, rtol=1e-9, atol=1e-11)
    assert queued[1][-len(keys) :].tolist() == labels and queued[2][-len(keys) :].tolist() == marks

    parts["loss"].backward()
    loss.backward()
    for (name, ours), theirs in zip(made.net.named_parameters(), twin.net.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-10, msg=name)
    assert all(p.grad is None for p in made.key_net.parameters())
    assert all(p.grad is None for p in made._peer[0].parameters())


def test_before_the_gate_only_the_pseudo_label_loss_has_a_gradient():
    made = learner(OPTIONS)
    parts = made(batch(gate=False))
    parts["loss"].backward()
    assert all(p.grad is None for p in made.net.projector.parameters())
    assert len(made.queue.rows()[0]) == 8  # keys are made all the same


def test_the_peer_is_no_part_of_the_learner():
    made = learner(OPTIONS)
    names = {name.split(".")[0] for name, _ in made.named_parameters()}
    assert names == {"net", "key_net"}


def test_reset_keys_copies_the_network():
    made = learner(OPTIONS)
    with torch.no_grad():
        for p in made.net.parameters():
            p.add_(1.0)
    made.reset_keys()
    assert all(torch.equal(k, q) for k, q in zip(made.key_net.parameters(), made.net.parameters()))


def test_warm_up_is_partial_cross_entropy_over_informative_rows_plus_negative_entropy():
    made = learner(OPTIONS)
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    candidates = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]]).bool()
    parts = made(WarmUpBatch(images, candidates, size=3, n_informative=2))
    p = made.net(images)[0].softmax(1)
    partial = -(torch.log(p[0, 0] + p[0, 1]) + torch.log(p[2, 2])) / 2
    entropy = (p * p.log()).sum() / 3
    torch.testing.assert_close(parts["loss"], partial + entropy)


def test_warm_up_without_any_informative_row_is_the_entropy_alone():
    made = learner(OPTIONS)
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    parts = made(WarmUpBatch(images, torch.ones(2, C, dtype=torch.bool), size=2, n_informative=0))
    assert parts["partial"].item() == 0 and math.isfinite(parts["loss"].item())


def test_schedules():
    assert cosine_lr(0, 0.01, 1e-5, 800) == pytest.approx(0.01)
    # hand-worked values of the reference's schedule, whose horizon is always 800
    assert cosine_lr(100, 0.01, 1e-5, 800) == pytest.approx(0.00962, abs=5e-6)
    assert cosine_lr(400, 0.01, 1e-5, 800) == pytest.approx(0.0050, abs=1e-5)
    assert cosine_lr(800, 0.01, 1e-5, 800) == pytest.approx(1e-5)
    assert [ramp(progress, 16) for progress in (0, 4, 16, 40)] == [0, 0.25, 1, 1]
    assert ramp(0, 0) == 1
