"""SoLar, RECORDS and HTC against steps written out image by image, in float64; selection and MixUp; degenerate batches."""

import math

import numpy as np
import pytest
import torch

from coreg.learn.partial import METHODS
from coreg.learn.partial.method import PartialBatch
from coreg.learn.partial.mixing import draw_partners, mixed_view, smallest
from coreg.learn.partial.solar import transport_plan
from coreg.learn.partial_options import OPTIONS
from coreg.learn.schedules import Step
from coreg.nets.model import Model
from coreg.nets.preact import PreActResNet

N, C, WIDTH = 8, 4, 8
INDEX = torch.tensor([5, 0, 3, 2, 7])
SETS = torch.tensor([[str(j) in members for j in range(C)] for members in "01 1 0123 02 03 023 12 13".split()])


def made(name, dtype=torch.float64, sets=SETS, **options):
    """A method whose network is the identity: a view is its logits, and its features are a linear map of them."""
    torch.manual_seed(0)
    net = Model(PreActResNet(C, 1, widths=(8, WIDTH), depths=(1, 1), norm="none"), 4)
    method = METHODS[name](net, sets, OPTIONS[name](**options), dtype=dtype).to(dtype=dtype)
    method.outputs_on = lambda view: (view, view.repeat(1, 2)[:, :WIDTH])
    return method


def disturbed(method):
    """Confidences that are not as in the beginning, zeros within the sets among them."""
    noise = torch.rand(N, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * SETS
    noise[3, 0] = 0
    method.confidence.copy_(noise / noise.sum(1, keepdim=True))
    return method


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def batch(when, width=C, views=2, index=INDEX):
    views = tuple(random(len(index), width, seed=seed) for seed in range(views))
    return PartialBatch(index, when, views, draws=(1, "mixup", when.epoch, when.step))


def same_with_gradients(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
        torch.testing.assert_close(a, b)


def cross_entropy(logits, targets):
    return -(targets * logits.log_softmax(0)).sum()


# ---- what is selected and mixed -------------------------------------------------------------------------------------


def test_the_smallest_losses_of_every_class_up_to_its_quota():
    rng = np.random.default_rng(0)
    for _ in range(50):
        losses, classes, quota = rng.random(12), rng.integers(0, 5, 12), rng.random(5) * 4
        expected = np.zeros(12, bool)
        for j in range(5):
            rows = sorted((row for row in range(12) if classes[row] == j), key=lambda row: losses[row])
            expected[rows[: max(1, min(len(rows), math.ceil(quota[j])))]] = True
        ours = smallest(torch.from_numpy(losses), torch.from_numpy(classes), torch.from_numpy(quota))
        np.testing.assert_array_equal(ours, expected)
    assert smallest(torch.zeros(3), torch.tensor([2, 2, 2]), torch.tensor([0.0, 9, 0])).sum() == 1  # of equals one


def test_partners_are_drawn_among_those_selected_and_each_is_one_of_them():
    seen = []
    for step in range(200):
        selected = torch.tensor([True, False, True, True, False, True])
        drawn = batch(Step(0, 1, step, 200), index=torch.arange(6))
        kept, partner = draw_partners(drawn, 4.0, "plan", selected)
        assert 0.5 <= kept < 1
        assert sorted(partner[selected].tolist()) == [0, 2, 3, 5] and sorted(partner.tolist()) == list(range(6))
        assert draw_partners(drawn, 4.0, "plan", selected)[0] == kept != draw_partners(drawn, 4.0, "tail", selected)[0]
        seen.append(tuple(partner[selected].tolist()))
    assert len(set(seen)) == 24
    kept, partner = draw_partners(drawn, 0, "plan", selected)
    assert kept == 1 and torch.equal(partner, torch.arange(6))  # MixUp is off


def test_a_mixed_view():
    view = random(4, 3).detach()
    mixed = mixed_view(view, 4, torch.tensor([2, 1, 3, 0]), 0.75)
    for row, other in enumerate([2, 1, 3, 0]):
        torch.testing.assert_close(mixed[row], 0.75 * view[row] + 0.25 * view[other])


# ---- SoLar ----------------------------------------------------------------------------------------------------------


def test_a_transport_plan_keeps_both_marginals_and_the_scores_odds():
    scores, prior = torch.rand(40, C, dtype=torch.float64) + 0.05, torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    plan = transport_plan(scores, prior, iterations=500)
    torch.testing.assert_close(plan.sum(1), torch.ones(40).double())
    torch.testing.assert_close(plan.mean(0), prior)

    def odds(matrix):
        return matrix[0, 0] * matrix[1, 1] / (matrix[0, 1] * matrix[1, 0])

    torch.testing.assert_close(odds(plan), odds(scores**3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_transport_plan_of_nothing_or_too_little_stays_finite_and_within_the_scores(dtype):
    scores = torch.tensor([[1e-20, 0, 0], [0.5, 0, 0.5], [1, 0, 0]], dtype=dtype)  # nobody has class 1; 1e-60 underflows
    plan = transport_plan(scores, torch.full((3,), 1 / 3, dtype=dtype))
    assert plan.isfinite().all() and (plan >= 0).all() and (plan[scores == 0] == 0).all()


@pytest.mark.parametrize("full", [False, True])
def test_a_step_of_solar(full):
    """Twenty epochs, of which four estimate; the tenth, the seventh of its stage, of a ramp of eight."""
    method = disturbed(
        made("solar", estimation=0.2, selection_ramp=0.5, plan_queue=6, plan_weight=0.8, selected=[0.3, 0.7])
    )
    method.prior.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    if full:
        earlier = {"queue": random(6, C, seed=9).detach().sigmoid(), "queued": torch.tensor(6)}
        method.load_state_dict(method.state_dict() | earlier)  # as after a checkpoint
    given = batch(Step(10, 20))
    assert method.stage(Step(10, 20)) == Step(6, 16) and method.stage(Step(3, 20)) == Step(3, 16)
    weak, strong = given.views
    scores = torch.cat([*([method.queue] if full else []), weak.detach().softmax(1) * SETS[INDEX]])
    plan = transport_plan(scores, method.prior)[-5:]
    ramp, chosen = 6 / 8, set()
    for j in range(C):
        rows = [row for row in range(5) if plan[row].argmax() == j]
        rows.sort(key=lambda row: cross_entropy(weak[row], plan[row]).item())
        chosen |= set(rows[: max(1, math.ceil(5 * method.prior[j] * (0.3 + 0.4 * ramp)))])
    chosen |= {row for row in range(5) if (plan[row] * weak[row].softmax(0)).sum() > method.options.sure}
    selected = torch.tensor([row in chosen for row in range(5)])
    kept, partner = draw_partners(given, 4.0, "plan", selected)
    on_plan, others, d = 0.0, 0.0, method.confidence.clone()
    for row, i in enumerate(INDEX.tolist()):
        if row in chosen:
            other = partner[row]
            mixed = cross_entropy(kept * weak[row] + (1 - kept) * weak[other], kept * plan[row] + (1 - kept) * plan[other])
            on_plan = on_plan + (cross_entropy(weak[row], plan[row]) + cross_entropy(strong[row], plan[row]) + mixed)
        else:
            others = others + cross_entropy(weak[row], d[i]) / (5 - len(chosen))
    by_hand = 0.8 * ramp * on_plan / len(chosen) + (1 - 0.8 * ramp) * others
    before = method.queue.clone()
    same_with_gradients(method(given)["loss"], by_hand, given.views)
    for row, i in enumerate(INDEX.tolist()):
        p = weak[row].detach().softmax(0) * SETS[i]
        torch.testing.assert_close(method.queue[row], p)
        torch.testing.assert_close(method.confidence[i], p / p.sum())
    torch.testing.assert_close(method.queue[5:], before[:1])


def test_solar_counts_classes_after_every_epoch_and_begins_anew_after_its_first_stage():
    method = disturbed(made("solar", estimation=0.2, prior_rate=[0.5, 0.1]))
    logits = random(N, C, seed=4).detach()
    counts = torch.zeros(C).double()
    for i in range(N):
        counts[max((logits[i, j].item(), j) for j in range(C) if SETS[i, j])[1]] += 1 / N
    method.survey(logits, Step(3, 20))
    first = 0.5 * counts + 0.5 / C
    torch.testing.assert_close(method.prior, first)
    method.survey(logits, Step(4, 20))
    torch.testing.assert_close(method.prior, 0.1 * counts + 0.9 * first)
    assert method.finish_epoch(Step(4, 20))["largest_prior"] == pytest.approx(method.prior.max().item())
    method.queue.fill_(0.1)
    method.queued.fill_(7)
    prior = method.prior.clone()
    method.restart()
    assert torch.equal(method.confidence, SETS.double() / SETS.sum(1, keepdim=True))
    assert not method.queue.any() and not method.queued
    assert torch.equal(method.prior, prior)
    # one epoch leaves none for a first stage
    assert method.stage(Step(0, 1)) == Step(0, 1) and METHODS["proden"].stage(method, Step(4, 20)) == Step(4, 20)


# ---- RECORDS --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_step_of_records(epoch):
    method = disturbed(made("records", update_start=2, mixup_weight=0.7, feature_momentum=0.8))
    method.feature_mean.copy_(random(WIDTH, seed=6).detach())
    given, head = batch(Step(epoch, 20)), method.net.backbone.fc
    kept, partner = draw_partners(given, 4.0, "pair")

    def part(views, targets):
        total = 0.0
        for logits in views:
            p = logits.softmax(0)
            for j, t in enumerate(targets.tolist()):
                total = total + (t * (math.log(t) - p[j].log()) if t else -(1 - p[j] + 1e-9).log())
        return total

    by_hand, d = 0.0, method.confidence.clone()
    for row, i in enumerate(INDEX.tolist()):
        by_hand = by_hand + part([view[row] for view in given.views], d[i]) / 5
        if epoch == 2:
            mixed = [kept * view[row] + (1 - kept) * view[partner[row]] for view in given.views]
            by_hand = by_hand + 0.7 * part(mixed, kept * d[i] + (1 - kept) * d[INDEX[partner[row]]]) / 5
    mean = sum(view.detach().repeat(1, 2)[:, :WIDTH] for view in given.views).mean(0) / 2
    mean = 0.8 * method.feature_mean + 0.2 * mean
    beta = (head.weight @ mean + head.bias).softmax(0).detach()
    same_with_gradients(method(given)["loss"], by_hand, given.views)
    torch.testing.assert_close(method.feature_mean, mean)
    for row, i in enumerate(INDEX.tolist()):
        if epoch == 1:
            assert torch.equal(method.confidence[i], d[i])
        else:
            views = [(view[row].detach() - (beta + 1e-9).log()).softmax(0) for view in given.views]
            root = (views[0] * views[1] * SETS[i]).sqrt()
            torch.testing.assert_close(method.confidence[i], root / root.sum())
    # what it predicts by: the network itself stays
    images, bias = torch.randn(3, 1, 8, 8).double(), head.bias.clone()
    torch.testing.assert_close(method.judged()(images)[0], method.net(images)[0] - (beta + 1e-9).log())
    assert torch.equal(head.bias, bias)
    # and but for the bias it is no other one
    of_net, judged = dict(method.net.named_parameters()), dict(method.judged().named_parameters())
    assert {name for name, weight in judged.items() if weight is not of_net[name]} == {"backbone.fc.bias"}


# ---- HTC ------------------------------------------------------------------------------------------------------------


def test_a_step_of_htc():
    """The fourth of ten epochs, of a ramp of five."""
    method = disturbed(made("htc", selection_ramp=0.5, strong_weight=0.8, selected=[0.3, 0.7], logit_adjustment=1.5))
    when = Step(3, 10)
    method.finish_epoch(Step(2, 10))
    prior = method.confidence.sum(0) / method.confidence.sum()
    torch.testing.assert_close(method.prior, prior)
    given, gate, d = batch(when, width=2 * C), method.net.backbone.fc.gate, method.confidence.clone()
    weak, strong, ramp, by_hand = *given.views, 3 / 5, 0.0
    for k, name, priors in ((0, "head", prior), (1, "tail", torch.full((C,), 1 / C).double())):
        z, s = weak[:, k * C : (k + 1) * C], strong[:, k * C : (k + 1) * C]
        targets = d[INDEX] if k == 0 else (weak[:, :C].detach() - 1.5 * prior.log()).softmax(1)
        chosen = set()
        for j in range(C):
            rows = [row for row in range(5) if targets[row].argmax() == j]
            rows.sort(key=lambda row: cross_entropy(z[row], targets[row]).item())
            chosen |= set(rows[: max(1, math.ceil(5 * priors[j] * (0.3 + 0.4 * ramp)))])
        kept, partner = draw_partners(given, 4.0, name, torch.tensor([row in chosen for row in range(5)]))
        for row in range(5):
            by_hand = by_hand + cross_entropy(z[row], d[INDEX[row]]) / 5
            if row in chosen:
                other = partner[row]
                mixed = kept * targets[row] + (1 - kept) * targets[other]
                each = cross_entropy(s[row], targets[row])
                each = each + cross_entropy(kept * z[row] + (1 - kept) * z[other], mixed)
                by_hand = by_hand + 0.8 * ramp * each / len(chosen)
    for row in range(5):
        p = [(weak[row, :C].detach() - (prior + 1e-5).log()).softmax(0), weak[row, C:].detach().softmax(0)]
        a = gate.weight @ torch.cat(p) + gate.bias
        w = torch.where(a > 0, a, 0.01 * a).softmax(0)
        w = w / w.norm()
        by_hand = by_hand - 0.5 * 3 / 10 * (d[INDEX[row]] * ((w[0] * p[0] + w[1] * p[1]).softmax(0) + 1e-8).log()).sum() / 5
    same_with_gradients(method(given)["loss"], by_hand, (*given.views, gate.weight, gate.bias))
    for row, i in enumerate(INDEX.tolist()):
        tail = weak[row, C:].detach().softmax(0) * SETS[i]
        torch.testing.assert_close(method.confidence[i], 0.4 * d[i] + 0.6 * tail / tail.sum())


def test_htc_predicts_by_its_gate_and_the_prior_of_its_confidence_as_it_is():
    method = disturbed(made("htc"))
    del method.outputs_on  # its own network
    images = torch.randn(3, 1, 8, 8).double()
    head, tail = (logits.detach() for logits in method.outputs_on(images)[0].chunk(2, dim=1))
    prior, gate = method.confidence.sum(0) / method.confidence.sum(), method.net.backbone.fc.gate
    assert not torch.allclose(prior, method.prior)
    both = [(head - (prior + 1e-5).log()).softmax(1), tail.softmax(1)]
    w = torch.nn.functional.leaky_relu(gate(torch.cat(both, dim=1))).softmax(1)
    w = w / w.norm(dim=1, keepdim=True)
    torch.testing.assert_close(method.judged()(images)[0], w[:, :1] * both[0] + w[:, 1:] * both[1])
    torch.testing.assert_close(method.prior, torch.as_tensor((SETS / SETS.sum(1, keepdim=True)).mean(0)).double())


def test_labelled_images_of_htc_teach_both_classifiers():
    method, images, classes = made("htc"), random(3, 2 * C), torch.tensor([2, 0, 1])
    given = batch(Step(0, 9), width=2 * C, views=1)
    given.labelled, given.n_labelled = (images, classes), 3
    head, tail = (torch.nn.functional.cross_entropy(logits, classes) for logits in images.chunk(2, dim=1))
    torch.testing.assert_close(method(given)["supervised"], ((head + tail) / 2).detach())


# ---- all ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["solar", "records", "htc"])
@pytest.mark.parametrize("index", [[2], [1], [2, 1], [1, 1]], ids=str)
def test_full_and_single_sets_unused_classes_and_small_batches_stay_finite(name, index):
    sets = SETS & torch.tensor([True, True, True, False])  # nobody has class 3
    method = made(name, torch.float32, sets=sets, **({"plan_queue": 3} if name == "solar" else {}))
    width = 2 * C if name == "htc" else C
    for epoch, scale in ((0, 1.0), (5, 1.0), (6, 150.0), (7, 0.0)):
        passes = method.passes(Step(epoch, 9))
        given = batch(Step(epoch, 9), width, len(passes.views), torch.tensor(index))
        given.views = tuple((scale * view).float().detach().requires_grad_() for view in given.views)
        loss = method(given)["loss"]
        loss.backward()
        assert loss.isfinite() and all(view.grad.isfinite().all() for view in given.views)
        torch.testing.assert_close(method.confidence.sum(1), torch.ones(N))
        if method.surveys:
            method.survey(torch.zeros(N, C), Step(epoch, 9))
        method.finish_epoch(Step(epoch, 9))
    assert all(value.isfinite().all() for value in method.state_dict().values())
    if name == "htc":
        # without a class nobody has, 2 log 0 would be all of the tail's targets
        assert (method._outputs(given).targets[1][:, 3] == 0).all()
