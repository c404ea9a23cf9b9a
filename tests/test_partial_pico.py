"""PiCO and PiCO+ against a step written out image by image, in float64; degenerate batches."""

import math

import pytest
import torch
from torch.nn import Identity
from torch.nn import functional as F

from coreg.learn.partial import METHODS
from coreg.learn.partial.method import Mixed, Outputs
from coreg.learn.partial.pico import nearest_contrast
from coreg.learn.partial_options import OPTIONS
from coreg.learn.schedules import Step

N, C, D = 9, 4, 5
INDEX = torch.tensor([6, 0, 3, 8])
SETS = torch.tensor([[str(j) in members for j in range(C)] for members in "01 1 0123 23 03 023 12 013 2".split()])
HOT = torch.eye(C, dtype=torch.float64)


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def made(name="pico", in_queue=6, **options):
    """A method with prototypes, confidences and a queue that are not as in the beginning."""
    method = METHODS[name](
        Identity(),
        SETS,
        OPTIONS[name](**{"queue_size": 7, "projection_dim": D, "prototype_start": 1} | options),
        dtype=torch.float64,
    )
    method.prototypes.value.copy_(unit(C, D, seed=1))
    noise = torch.rand(N, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * SETS
    method.confidence.copy_(noise / noise.sum(1, keepdim=True))
    labels = torch.arange(in_queue) % C
    method.queue.enqueue(unit(in_queue, D, seed=3), labels, labels != 2)
    return method


def outputs(seed=10, mixed=None):
    n = len(INDEX)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, C, generator=generator, dtype=torch.float64).requires_grad_()
    features = unit(n, D, seed=seed + 1).requires_grad_()
    return Outputs((logits,), (features,), keys=unit(n, D, seed=seed + 2), mixed=mixed)


def detached(given):
    return Outputs((given.logits[0].detach(),), (given.features[0].detach(),), given.keys, given.glance, given.mixed)


def contrast_by_hand(given, method, positive, kept=lambda i, j: True, temperature=0.07):
    """Mean over anchors of -mean over positives of log(e^a / sum e^a); `positive(i, j)` over the rows of [q; k; queue]."""
    n = len(given.keys)
    rows = [*given.features[0], *given.keys, *method.queue.keys[: int(method.queue.taken)]]
    losses = []
    for i in range(n):
        others = [j for j in range(len(rows)) if j != i and (kept(i, j) or j == n + i)]
        total = sum(torch.exp(rows[i] @ rows[j] / temperature) for j in others)
        chosen = [j for j in range(len(rows)) if j != i and (positive(i, j) or j == n + i)]
        losses.append(-sum(rows[i] @ rows[j] / temperature - total.log() for j in chosen) / len(chosen))
    return losses


def labels_by_hand(given, sets):
    return [int((given.logits[0][r].softmax(0) * sets[i]).argmax()) for r, i in enumerate(INDEX.tolist())]


def scores_by_hand(given, method, temperature=1.0):
    return [torch.softmax(q @ method.prototypes.value.T / temperature, 0).detach() for q in given.features[0]]


@pytest.mark.parametrize(("epoch", "phi"), [(1, 0.95), (21, 0.85)])
def test_a_step_of_pico(epoch, phi):
    method, given, step = made(), outputs(), Step(epoch, 30)
    assert method.passes(step).key == "strong" and method.passes(step).mixup == "none"
    # judged with the prototypes before the step
    confidence = [
        phi * method.confidence[i] + (1 - phi) * HOT[(score * SETS[i]).argmax()]
        for i, score in zip(INDEX.tolist(), scores_by_hand(given, method))
    ]
    labels = labels_by_hand(given, SETS)
    everyone = labels * 2 + method.queue.labels[:6].tolist()
    classification = sum(-(s * z.log_softmax(0)).sum() for s, z in zip(confidence, given.logits[0])) / 4
    contrast = sum(contrast_by_hand(given, method, lambda i, j: everyone[i] == everyone[j])) / 4
    parts = method.loss(given, INDEX, step)
    torch.testing.assert_close(parts["loss"], classification + 0.5 * contrast)

    expected = torch.autograd.grad(classification + 0.5 * contrast, (given.logits[0], given.features[0]))
    actual = torch.autograd.grad(parts["loss"], (given.logits[0], given.features[0]))
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)

    before, prototypes = method.confidence.clone(), method.prototypes.value.clone()
    for c, q in zip(labels, given.features[0].detach()):
        prototypes[c] = 0.99 * prototypes[c] + 0.01 * q
    method.update(detached(given), INDEX, step)
    torch.testing.assert_close(method.prototypes.value, F.normalize(prototypes, dim=1))
    torch.testing.assert_close(method.confidence[INDEX], torch.stack(confidence))
    torch.testing.assert_close(method.confidence.sum(1), torch.ones(N, dtype=torch.float64))
    others = [i for i in range(N) if i not in INDEX.tolist()]
    assert torch.equal(method.confidence[others], before[others])
    assert int(method.queue.taken) == 10
    places = torch.arange(6, 10) % 7
    assert torch.equal(method.queue.keys[places], given.keys) and method.queue.labels[places].tolist() == labels


def test_before_prototypes_count_contrast_is_that_of_moco_and_confidences_rest():
    method, given, step = made(prototype_start=2), outputs(), Step(1, 30)
    before = method.confidence.clone()
    contrast = sum(contrast_by_hand(given, method, lambda i, j: False, kept=lambda i, j: j >= 8)) / 4
    classification = -(before[INDEX] * given.logits[0].log_softmax(1)).sum() / 4
    torch.testing.assert_close(method.loss(given, INDEX, step)["loss"], classification + 0.5 * contrast)
    method.update(detached(given), INDEX, step)
    assert torch.equal(method.confidence, before)


def test_the_first_step_of_all_has_an_empty_queue_and_prototypes_of_nothing():
    method = METHODS["pico"](Identity(), SETS, OPTIONS["pico"](projection_dim=D), dtype=torch.float64)
    given = outputs()
    parts = method.loss(given, INDEX, Step(0, 30))
    assert parts["contrast"].item() == pytest.approx(0)  # nothing but the own key
    parts["loss"].backward()
    assert given.logits[0].grad.isfinite().all() and given.features[0].grad.isfinite().all()
    method.update(detached(given), INDEX, Step(0, 30))
    assert (method.prototypes.value.norm(dim=1) - 1).abs().lt(1e-12).sum() == len(set(labels_by_hand(given, SETS)))


def nearest_by_hand(rows, i, key, k, temperature):
    """The k nearest rows of all, the anchor itself among them, which is then no positive."""
    order = sorted(range(len(rows)), key=lambda j: -(rows[i] @ rows[j]).item())
    assert order[0] == i
    chosen = (set(order[:k]) | {key}) - {i}
    total = sum(torch.exp(rows[i] @ rows[j] / temperature) for j in order[1:])
    return -sum(rows[i] @ rows[j] / temperature - total.log() for j in chosen) / len(chosen)


@pytest.mark.parametrize("k", [1, 3, 100])
def test_contrast_with_the_nearest(k):
    rows = unit(11, D, seed=4).requires_grad_()
    place, key = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    actual = nearest_contrast(rows[:3], rows, place, key, k, 0.2)
    expected = torch.stack([nearest_by_hand(rows, i, i + 3, k, 0.2) for i in range(3)])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), rows, retain_graph=True)[0] for x in (actual, expected)))


def mixed(seed=20):
    logits = torch.randn(len(INDEX), C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Mixed(logits.requires_grad_(), partner=torch.tensor([2, 3, 0, 1]), share_kept=0.7)


@pytest.mark.parametrize(("neighbours_on", "weight"), [(False, 0.5), (True, 0.5), (False, 0.2), (True, 0.2)])
@pytest.mark.parametrize("reliable", [[0, 3, 5], [0, 3, 6, 8], [5]])  # some of the batch, all of it, none of it
def test_a_step_of_pico_plus(reliable, neighbours_on, weight):
    """`contrast_weight` is what a reliable anchor counts once neighbours do; the contrastive loss itself counts fully."""
    step = Step(5, 30)
    method = made("pico_plus", neighbour_start=0.1 if neighbours_on else 0.5, neighbours=3, contrast_weight=weight)
    method.reliable.zero_()[reliable] = True
    given = outputs(mixed=mixed())
    assert method.passes(step).mixup == "batch" and method.passes(Step(0, 30)).mixup == "none"
    batch = INDEX.tolist()
    sure = [i in reliable for i in batch]
    labels_within = labels_by_hand(given, SETS)
    labels = [c if s else int(z.argmax()) for c, s, z in zip(labels_within, sure, given.logits[0])]
    phi = 0.95 - 0.15 * 4 / 30
    confidence, targets = [], []
    for i, s, score in zip(batch, sure, scores_by_hand(given, method)):
        confidence.append(phi * method.confidence[i] + (1 - phi) * HOT[(score * SETS[i]).argmax()])
        guess = score ** (1 / 0.07)
        targets.append(confidence[-1] if s else guess / guess.sum())
    ce = [-(t * z.log_softmax(0)).sum() for t, z in zip(targets, given.logits[0])]
    both = [0.7 * targets[r] + 0.3 * targets[p] for r, p in enumerate(given.mixed.partner.tolist())]
    mixup = sum(-(t * z.log_softmax(0)).sum() for t, z in zip(both, given.mixed.logits)) / 4
    right = [x for x, s in zip(ce, sure) if s]
    wrong = [x for x, s in zip(ce, sure) if not s]
    classification = mixup + 2 * sum(right) / max(len(right), 1) + 0.1 * sum(wrong) / max(len(wrong), 1)

    c, r = labels * 2 + method.queue.labels[:6].tolist(), sure * 2 + method.queue.confident[:6].tolist()
    plain = contrast_by_hand(given, method, lambda i, j: c[i] == c[j])
    believed = contrast_by_hand(given, method, lambda i, j: c[i] == c[j] and r[i] and r[j])
    if neighbours_on:
        rows = [*given.features[0], *given.keys, *method.queue.keys[:6]]
        near = [nearest_by_hand(rows, i, 4 + i, 3, 0.07) for i in range(4)]
        believed = [weight * x if s else 0.1 * y for x, y, s in zip(believed, near, sure)]
    by_hand = classification + sum(believed) / 4 + 0.1 * sum(plain) / 4
    parts = method.loss(given, INDEX, step)
    torch.testing.assert_close(parts["loss"], by_hand)
    leaves = (given.logits[0], given.features[0], given.mixed.logits)
    for a, b in zip(torch.autograd.grad(parts["loss"], leaves), torch.autograd.grad(by_hand, leaves)):
        torch.testing.assert_close(a, b)

    distance = [-(q @ method.prototypes.value[k]).item() for q, k in zip(given.features[0], labels_within)]
    prototypes = method.prototypes.value.clone()
    for k, q, s in zip(labels_within, given.features[0].detach(), sure):
        if s:
            prototypes[k] = 0.99 * prototypes[k] + 0.01 * q
    method.update(detached(given), INDEX, step)
    torch.testing.assert_close(method.distance[INDEX], torch.tensor(distance, dtype=torch.float64))
    torch.testing.assert_close(method.prototypes.value, F.normalize(prototypes, dim=1))
    torch.testing.assert_close(method.confidence[INDEX], torch.stack(confidence))
    assert method.queue.confident[torch.arange(6, 10) % 7].tolist() == sure


def test_one_neighbour_is_the_anchor_itself():
    rows, place, key = unit(8, D, seed=4), torch.tensor([0, 1]), torch.tensor([2, 3])
    actual = nearest_contrast(rows[:2], rows, place, key, 1, 0.2)
    similarity = rows[:2] @ rows.T / 0.2
    own_key_alone = [similarity[i, [j for j in range(8) if j != i]].logsumexp(0) - similarity[i, 2 + i] for i in range(2)]
    torch.testing.assert_close(actual, torch.stack(own_key_alone))


def test_confidences_that_move_in_the_first_epoch_move_by_a_hundredth():
    """The authors set phi when an epoch ends, and begin with 0.99."""
    method, given = made(prototype_start=0), outputs()
    expected = [
        0.99 * method.confidence[i] + 0.01 * HOT[(score * SETS[i]).argmax()]
        for i, score in zip(INDEX.tolist(), scores_by_hand(given, method))
    ]
    method.update(detached(given), INDEX, Step(0, 30))
    torch.testing.assert_close(method.confidence[INDEX], torch.stack(expected))


def test_before_its_start_pico_plus_is_pico_and_believes_everybody():
    plus, pico, given = made("pico_plus", prototype_start=3), made(prototype_start=3), outputs()
    for a, b in zip(plus.loss(given, INDEX, Step(2, 30)).values(), pico.loss(given, INDEX, Step(2, 30)).values()):
        assert torch.equal(a, b)
    plus.distance.copy_(torch.arange(9.0))
    assert plus.finish_epoch(Step(1, 30)) == {"reliable": 1.0} and plus.reliable.all()
    plus.finish_epoch(Step(2, 30))  # what the next epoch, the first of its kind, believes
    assert plus.reliable.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_the_reliable_are_the_nearest_share_of_those_seen_and_what_a_person_labelled():
    options, certain = OPTIONS["pico_plus"](projection_dim=D, pure_ratio=0.5), torch.arange(N) == 7
    method = METHODS["pico_plus"](Identity(), SETS, options, certain, torch.float64)
    method.distance[:] = torch.tensor([0.3, -0.9, math.inf, 0.1, 0.1, -0.2, math.inf, 0.8, 0.5])
    method.finish_epoch(Step(5, 30))
    # three of the seven that were seen; of the tied rows 3 and 4 the first
    assert method.reliable.nonzero().flatten().tolist() == [1, 3, 5, 7]


def test_guesses_from_a_hundred_classes_do_not_underflow():
    classes = 100
    method = METHODS["pico_plus"](
        Identity(), torch.ones(2, classes, dtype=torch.bool), OPTIONS["pico_plus"](projection_dim=D, queue_size=4)
    )
    method.prototypes.value.copy_(-unit(1, D).float().expand(classes, D))  # scores near 1/100: to the power 14 they vanish
    method.reliable.zero_()
    given = Outputs(
        (torch.zeros(2, classes, requires_grad=True),),
        (unit(2, D, seed=5).float().requires_grad_(),),
        keys=unit(2, D, seed=6).float(),
        mixed=Mixed(torch.zeros(2, classes), torch.tensor([1, 0]), 0.6),
    )
    parts = method.loss(given, torch.tensor([0, 1]), Step(9, 30))
    assert parts["guessed"].item() == pytest.approx(math.log(classes), rel=1e-5)
    assert parts["reliable"] == 0 and parts["loss"].isfinite()


def test_the_state_goes_through_a_checkpoint():
    first, second = (
        made("pico_plus"),
        METHODS["pico_plus"](Identity(), SETS, OPTIONS["pico_plus"](queue_size=7, projection_dim=D), dtype=torch.float64),
    )
    first.update(detached(outputs()), INDEX, Step(4, 30))
    first.finish_epoch(Step(4, 30))
    second.load_state_dict(first.state_dict())
    given = outputs(seed=40, mixed=mixed())
    assert all(torch.equal(a, b) for a, b in zip(*(m.loss(given, INDEX, Step(5, 30)).values() for m in (first, second))))
