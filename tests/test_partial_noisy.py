"""ALIM and IRNet against steps written out image by image, in float64; their schedules and corrections."""

import math

import pytest
import torch
from test_partial_pico import HOT, INDEX, SETS, C, D, N, contrast_by_hand, detached, made, outputs, scores_by_hand, unit
from torch.nn import Identity
from torch.nn import functional as F

from coreg.learn.partial import METHODS
from coreg.learn.partial.method import Mixed, Outputs
from coreg.learn.partial_options import OPTIONS
from coreg.learn.schedules import Step

CERTAIN = torch.arange(N) == 3


def mixed():
    logits = torch.randn(len(INDEX), C, generator=torch.Generator().manual_seed(20), dtype=torch.float64)
    return Mixed(logits.requires_grad_(), partner=torch.tensor([2, 0, 7, 5]), share_kept=0.7)


@pytest.mark.parametrize("weight", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", ["alim_onehot", "alim_scale"])
def test_a_step_of_alim(name, weight):
    method, given, step = made(name), outputs(mixed=mixed()), Step(11, 30)
    method.certain.copy_(CERTAIN)
    method.weight.fill_(weight)
    assert method.passes(step).mixup == "epoch" and method.passes(step).key == "strong"
    batch = INDEX.tolist()
    trust = [SETS[i] + (0 if CERTAIN[i] else weight) * ~SETS[i] for i in batch]
    labels = [int((z.softmax(0) * t).argmax()) for z, t in zip(given.logits[0], trust)]
    phi, confidence = 0.95 - 0.15 * 11 / 30, []  # the twelfth epoch, with phi as it was set at the end of the eleventh
    for i, score, t in zip(batch, scores_by_hand(given, method, 0.07), trust):
        aim = score * t / (score * t).sum() if name == "alim_scale" else HOT[(score * t).argmax()]
        confidence.append(phi * method.confidence[i] + (1 - phi) * aim)
    everyone = labels * 2 + method.queue.labels[:6].tolist()
    by_hand = sum(-(s * z.log_softmax(0)).sum() for s, z in zip(confidence, given.logits[0])) / 4
    by_hand = by_hand + 0.5 * sum(contrast_by_hand(given, method, lambda i, j: everyone[i] == everyone[j])) / 4
    # partners 2, 7 and 5 are as they were, 0 is in the batch and has just moved
    table = method.confidence.clone()
    table[INDEX] = torch.stack(confidence)
    for s, p, z in zip(confidence, given.mixed.partner.tolist(), given.mixed.logits):
        by_hand = by_hand - ((0.7 * s + 0.3 * table[p]) * z.log_softmax(0)).sum() / 4
    parts, leaves = method.loss(given, INDEX, step), (given.logits[0], given.features[0], given.mixed.logits)
    torch.testing.assert_close(parts["loss"], by_hand)
    for a, b in zip(torch.autograd.grad(parts["loss"], leaves), torch.autograd.grad(by_hand, leaves)):
        torch.testing.assert_close(a, b)

    scores = scores_by_hand(given, method, 0.07)
    method.update(detached(given), INDEX, step)
    torch.testing.assert_close(method.confidence[INDEX], torch.stack(confidence))
    for i, score in zip(batch, scores):
        if not SETS[i].all():
            torch.testing.assert_close(method.log_margin[i].exp(), score[SETS[i]].max() / score[~SETS[i]].max())
    assert method.log_margin.isnan().sum() == N - len(batch)


def margins(method, values):
    method.log_margin.copy_(torch.tensor(values, dtype=torch.float64).log())


def test_the_weight_is_the_quantile_of_the_margins_of_all_images_seen():
    method = made("alim_scale", noise_rate=0.4, correction_start=0.2)
    values = [0.5, 3.0, math.nan, 2.0, 0.9, math.inf, 0.7, 1.5, 0.1]
    margins(method, values)
    assert method.finish_epoch(Step(4, 30)) == {"importance": 0.0}  # not before the sixth of thirty epochs is over
    assert method.log_margin.isnan().all()
    margins(method, values)
    # of .1 .5 .7 .9 1.5 2 3 inf the place floor(8 * .4) = 3
    assert method.finish_epoch(Step(5, 30))["importance"] == pytest.approx(0.9)
    method.certain.copy_(CERTAIN)  # without 2: floor(7 * .4) = 2 of .1 .5 .7
    margins(method, values)
    assert method.finish_epoch(Step(7, 30))["importance"] == pytest.approx(0.7)
    margins(method, [2.0] * N)
    assert method.finish_epoch(Step(8, 30))["importance"] == 1.0  # never more than a candidate


def test_margins_cover_every_image_once_however_often_it_is_seen():
    method = made("alim_onehot", noise_rate=0.5, correction_start=0.0)
    for index in (torch.arange(4), torch.arange(4, N), torch.arange(4)):
        n = len(index)
        given = Outputs((torch.zeros(n, C, dtype=torch.float64),), (unit(n, D, seed=n),), keys=unit(n, D))
        expected = method._log_score(given.features[0]).exp()
        before = method.log_margin.clone()
        method.update(given, index, Step(3, 30))
        for row, i in enumerate(index.tolist()):
            if not SETS[i].all():
                by_hand = expected[row][SETS[i]].max() / expected[row][~SETS[i]].max()
                torch.testing.assert_close(method.log_margin[i].exp(), by_hand)
        rest = [i for i in range(N) if i not in index.tolist()]
        assert torch.equal(method.log_margin[rest].nan_to_num(9), before[rest].nan_to_num(9))
    assert not method.log_margin.isnan().any()
    values = method.log_margin.sort().values.exp()
    assert method.finish_epoch(Step(3, 30))["importance"] == pytest.approx(min(values[4].item(), 1.0))  # floor(9 / 2)


@pytest.mark.parametrize(("noise_rate", "weight"), [(-1.0, 0.35), (0.0, 0.0)])
def test_without_a_noise_rate_the_weight_is_fixed_and_without_noise_zero(noise_rate, weight):
    method = made("alim_onehot", noise_rate=noise_rate, importance=0.35, correction_start=0.0)
    margins(method, [0.5] * N)
    assert method.finish_epoch(Step(0, 30))["importance"] == pytest.approx(weight)


def test_an_epoch_that_saw_nobody_leaves_no_weight_behind():
    method = made("alim_onehot", noise_rate=0.5, correction_start=0.0)
    assert method.finish_epoch(Step(0, 30)) == {"importance": 0.0}


def test_scores_that_underflow_still_give_margins_and_targets():
    method = METHODS["alim_scale"](
        Identity(), torch.tensor([[True, False, False]]), OPTIONS["alim_scale"](projection_dim=2, queue_size=4)
    )
    # similarities +1 and -1 at temperature .07 over float32: the candidate's score is e^-29
    method.prototypes.value.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    given = Outputs((torch.zeros(1, 3),), (torch.tensor([[1.0, 0.0]]),), keys=torch.tensor([[1.0, 0.0]]))
    method.update(given, torch.tensor([0]), Step(5, 30))
    assert method.log_margin[0] == pytest.approx(-2 / 0.07, rel=1e-5)
    torch.testing.assert_close(method.confidence, torch.tensor([[1.0, 0.0, 0.0]]))


def irnet(**options):
    method = made("irnet", correction_start=0.2, correction_margin=0.4, **options)  # 0.1 of a score with four classes
    method.prototypes.value.copy_(F.normalize(torch.eye(C, D, dtype=torch.float64), dim=1))
    return method


def toward(*classes):
    """Features that lie at the prototypes of these classes."""
    return torch.eye(D, dtype=torch.float64)[list(classes)]


def test_irnet_adds_the_class_that_both_views_agree_on():
    method, step = irnet(), Step(10, 30)
    assert method.passes(Step(5, 30)).glance is None and method.passes(Step(6, 30)).glance == "weak"
    # image:    6 {1,2}   0 {0,1}   3 {2,3}   8 {2}
    first, second = toward(3, 3, 2, 0), toward(3, 2, 2, 0)
    method.certain[8] = True
    given = Outputs((torch.zeros(4, C, dtype=torch.float64),), (first,), keys=unit(4, D), glance=second)
    phi, score = 0.95 - 0.15 * 10 / 30, torch.softmax(first @ method.prototypes.value.T, 1)
    after = [phi * method.confidence[i] + (1 - phi) * HOT[(s * SETS[i]).argmax()] for i, s in zip(INDEX.tolist(), score)]
    method.update(given, INDEX, step)
    grown = SETS.clone()
    grown[6, 3] = True  # 0: the views disagree; 3: the best class is a candidate; 8: a person said so
    assert torch.equal(method.candidates, grown)
    after[0][3] = score[0, 3]
    after[0] /= after[0].sum()
    torch.testing.assert_close(method.confidence[INDEX], torch.stack(after))
    assert method.finish_epoch(step)["candidates"] == pytest.approx(float(grown.sum(1).double().mean()))
    # for good, and through checkpoints
    method.update(given, INDEX, step)
    assert torch.equal(method.candidates, grown)
    restored = irnet()
    restored.load_state_dict(method.state_dict())
    assert torch.equal(restored.candidates, grown)


def test_irnet_wants_a_margin():
    method = irnet()
    scores = torch.softmax(toward(3) @ method.prototypes.value.T, 1)
    lead = float(scores[0, 3] - scores[0, 1])
    for share, added in ((0.99, True), (1.01, False)):
        method = irnet()
        method.margin = lead * share
        given = Outputs((torch.zeros(1, C, dtype=torch.float64),), (toward(3),), keys=unit(1, D), glance=toward(3))
        method.update(given, torch.tensor([6]), Step(10, 30))
        assert bool(method.candidates[6, 3]) == added


def test_irnet_never_doubts_full_sets_and_a_glance_is_needed():
    method = irnet()
    given = Outputs((torch.zeros(1, C, dtype=torch.float64),), (toward(3),), keys=unit(1, D), glance=toward(3))
    method.update(given, torch.tensor([2]), Step(10, 30))
    given.glance = None
    method.update(given, torch.tensor([6]), Step(3, 30))
    assert torch.equal(method.candidates, SETS)


def test_the_second_view_of_irnet_meets_the_prototypes_that_the_first_has_moved():
    """One image of class 3 in both views, far away; its candidates 1 and 2 are as near as each other."""
    for momentum, added in ((0.0, False), (0.999999, True)):
        method = irnet(prototype_momentum=momentum)
        q = F.normalize(torch.tensor([[0.0, 0.1, 0.1, 1.0, 0.0]], dtype=torch.float64), dim=1)
        given = Outputs((torch.zeros(1, C, dtype=torch.float64),), (q,), keys=unit(1, D), glance=q)
        # label 1, the first candidate: without momentum its prototype is moved onto q, and beats class 3 in the second view
        method.update(given, torch.tensor([6]), Step(10, 30))
        assert bool(method.candidates[6, 3]) == added


@pytest.mark.parametrize("name", ["irnet", "alim_onehot", "alim_scale"])
def test_the_first_epoch_of_irnet_and_alim(name):
    """Their authors begin with epoch 1: prototypes move the confidence at once, by a hundredth; contrast knows labels."""
    method, given, step = made(name), outputs(mixed=mixed()), Step(0, 30)
    batch, scores = INDEX.tolist(), scores_by_hand(given, method, method.score_temperature)
    confidence = []
    for i, score in zip(batch, scores):
        inside = score * SETS[i]
        aim = inside / inside.sum() if name == "alim_scale" else HOT[inside.argmax()]
        confidence.append(0.99 * method.confidence[i] + 0.01 * aim)
    everyone = [int((z.softmax(0) * SETS[i]).argmax()) for i, z in zip(batch, given.logits[0])] * 2
    everyone += method.queue.labels[:6].tolist()
    parts = method.loss(given, INDEX, step)
    contrast = sum(contrast_by_hand(given, method, lambda i, j: everyone[i] == everyone[j])) / 4
    torch.testing.assert_close(parts["contrast"], contrast)
    classification = sum(-(s * z.log_softmax(0)).sum() for s, z in zip(confidence, given.logits[0])) / 4
    torch.testing.assert_close(parts["classification"], classification)
    method.update(detached(given), INDEX, step)
    torch.testing.assert_close(method.confidence[INDEX], torch.stack(confidence))
    # and in the second epoch phi has fallen once
    given, before = outputs(seed=60), method.confidence.clone()
    scores = scores_by_hand(given, method, method.score_temperature)
    method.update(detached(given), INDEX, Step(1, 30))
    phi = 0.95 - 0.15 / 30
    for i, score in zip(batch, scores):
        inside = score * SETS[i]
        aim = inside / inside.sum() if name == "alim_scale" else HOT[inside.argmax()]
        torch.testing.assert_close(method.confidence[i], phi * before[i] + (1 - phi) * aim)


def test_contrast_of_irnet_knows_labels_long_before_its_prototypes_count():
    method, given = made("irnet", prototype_start=9), outputs()
    before = method.confidence.clone()
    everyone = [int((z.softmax(0) * SETS[i]).argmax()) for i, z in zip(INDEX.tolist(), given.logits[0])] * 2
    everyone += method.queue.labels[:6].tolist()
    contrast = sum(contrast_by_hand(given, method, lambda i, j: everyone[i] == everyone[j])) / 4
    torch.testing.assert_close(method.loss(given, INDEX, Step(7, 30))["contrast"], contrast)
    method.update(detached(given), INDEX, Step(7, 30))
    assert torch.equal(method.confidence, before)
    method.update(detached(given), INDEX, Step(8, 30))  # the ninth epoch
    assert not torch.equal(method.confidence, before)


def test_symmetric_cross_entropy_of_irnet():
    """alpha CE + beta RCE; both see targets of at least 1e-4 and predictions of at least 1e-7."""
    plain, method, given, step = made("irnet"), made("irnet", symmetric=True), outputs(), Step(9, 30)
    given.logits[0].data[0, 3] = -40.0  # a prediction of about 1e-18
    parts, ours = plain.loss(given, INDEX, step), method.loss(given, INDEX, step)
    phi, cross, reverse = 0.95 - 0.15 * 9 / 30, 0.0, 0.0
    for i, z, score in zip(INDEX.tolist(), given.logits[0], scores_by_hand(given, method)):
        s = phi * method.confidence[i] + (1 - phi) * HOT[(score * SETS[i]).argmax()]
        for p, t in zip(z.softmax(0), s.tolist()):
            p, t = max(p, torch.tensor(1e-7, dtype=torch.float64)), max(t, 1e-4)
            cross = cross - t * p.log() / 4
            reverse = reverse - p * math.log(t) / 4
    expected = 6 * cross + reverse + 0.5 * parts["contrast"]
    torch.testing.assert_close(ours["loss"], expected)
    leaves = (given.logits[0], given.features[0])
    for a, b in zip(torch.autograd.grad(ours["loss"], leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(a, b)
