"""Every loss against a loop that follows the equation symbol by symbol, in float64, with gradients."""

import math

import pytest
import torch

from coreg.learn import losses

torch.set_default_dtype(torch.float32)


def random_logits(n, c, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, c, generator=generator, dtype=torch.float64) * scale).requires_grad_()


def random_targets(n, c, seed=1):
    return torch.softmax(random_logits(n, c, seed).detach(), dim=1)


def same_value_and_gradient(ours, by_hand, leaf):
    """Compare two scalars and their gradients with respect to `leaf`."""
    torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-12)
    (first,) = torch.autograd.grad(ours, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(by_hand, leaf)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


def test_partial_cross_entropy_is_minus_log_of_the_candidate_mass():
    logits = random_logits(6, 5)
    candidates = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]
    ).bool()
    p = logits.softmax(1)
    by_hand = sum(-torch.log(sum(p[i, j] for j in range(5) if candidates[i, j])) for i in range(6))
    same_value_and_gradient(losses.partial_cross_entropy(logits, candidates).sum(), by_hand, logits)


def test_partial_cross_entropy_of_a_full_candidate_set_is_zero_without_gradient():
    logits = random_logits(2, 4)
    loss = losses.partial_cross_entropy(logits, torch.ones(2, 4, dtype=torch.bool))
    assert loss.tolist() == [0.0, 0.0]
    assert torch.autograd.grad(loss.sum(), logits)[0].abs().sum() == 0


def test_partial_cross_entropy_survives_underflow():
    logits = torch.tensor([[0.0, 500.0]], requires_grad=True)
    loss = losses.partial_cross_entropy(logits, torch.tensor([[True, False]]))
    assert loss.item() == pytest.approx(500.0)
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


def test_negative_entropy():
    logits = random_logits(4, 3)
    p = logits.softmax(1)
    by_hand = sum(p[i, j] * torch.log(p[i, j]) for i in range(4) for j in range(3))
    same_value_and_gradient(losses.negative_entropy(logits).sum(), by_hand, logits)
    assert losses.negative_entropy(torch.zeros(1, 8)).item() == pytest.approx(-math.log(8), rel=1e-6)
    assert losses.negative_entropy(torch.tensor([[1e4, 0.0]])).item() == 0  # 0 log 0


def test_soft_cross_entropy():
    logits, targets = random_logits(4, 3), random_targets(4, 3)
    p = logits.softmax(1)
    by_hand = sum(-targets[i, j] * torch.log(p[i, j]) for i in range(4) for j in range(3))
    same_value_and_gradient(losses.soft_cross_entropy(logits, targets).sum(), by_hand, logits)


@pytest.mark.parametrize("over", ["mean", "sum"])
def test_squared_error(over):
    logits, targets = random_logits(4, 3), random_targets(4, 3)
    p = logits.softmax(1)
    by_hand = sum((p[i, j] - targets[i, j]) ** 2 for i in range(4) for j in range(3)) / (3 if over == "mean" else 1)
    same_value_and_gradient(losses.squared_error(logits.softmax(1), targets, over).sum(), by_hand, logits)


def test_divergence_with_zero_targets():
    logits = random_logits(2, 3)
    targets = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0]], dtype=torch.float64)
    p = logits.softmax(1)
    by_hand = sum(
        targets[i, j] * torch.log(targets[i, j] / p[i, j]) for i in range(2) for j in range(3) if targets[i, j] > 0
    )
    same_value_and_gradient(losses.divergence(targets, losses.log_probabilities(logits)).sum(), by_hand, logits)


def test_mixing_targets_and_mixing_losses_have_the_same_gradient():
    """lambda KL(Y || s) + (1 - lambda) KL(Y' || s), as the reference writes it, against KL of the mixed target."""
    logits, first, second, share = random_logits(5, 4), random_targets(5, 4), random_targets(5, 4, seed=2), 0.7
    log_s = losses.log_probabilities(logits)
    apart = share * losses.divergence(first, log_s) + (1 - share) * losses.divergence(second, log_s)
    mixed = losses.divergence(share * first + (1 - share) * second, log_s)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (apart, mixed)]
    torch.testing.assert_close(*gradients)


def test_prototype_log_probabilities():
    features = torch.nn.functional.normalize(random_logits(3, 4).detach(), dim=1)
    prototypes = torch.nn.functional.normalize(random_logits(2, 4, seed=3).detach(), dim=1)
    ours = losses.prototype_log_probabilities(features, prototypes, 0.3)
    for i in range(3):
        e = [math.exp(float(features[i] @ prototypes[c]) / 0.3) for c in range(2)]
        assert ours[i].exp().tolist() == pytest.approx([x / sum(e) for x in e], rel=1e-12)


def contrast_by_hand(q, a, c, m, c_all, m_all, self_at, key_at, tau, mode, n_batch):
    """The table of `contrastive_loss`, read row by row with Python sets."""
    total = []
    for i in range(len(q)):
        others = [j for j in range(len(a)) if j != self_at[i]]
        key = int(key_at[i])
        same = {j for j in others if c_all[j] == c[i]}
        both = {j for j in same if m[i] and m_all[j]}
        removed = set()
        if mode == "noise_tolerant":
            positives, removed = both, same - both
        elif mode == "supervised":
            positives = same
        elif mode == "hcp":
            positives = both
        elif mode == "hcpn":
            positives, removed = both, {j for j in others if m[i] and not m_all[j]}
        else:
            positives, removed = set(), {j for j in others if j < n_batch}
        positives = positives | {key}
        kept = [j for j in others if j not in removed or j == key]
        scores = {j: (q[i] * a[j]).sum() / tau for j in others}
        denominator = torch.log(sum(torch.exp(scores[j]) for j in kept))
        loss = -sum(scores[j] - denominator for j in positives) / len(positives)
        total.append(loss * (1.0 if mode != "hcpn" or m[i] else 0.0))
    return torch.stack(total)


@pytest.mark.parametrize("mode", ["noise_tolerant", "supervised", "hcp", "hcpn", "unsupervised"])
@pytest.mark.parametrize("queue_rows", [0, 7])
def test_contrastive_loss(mode, queue_rows):
    if mode == "unsupervised" and not queue_rows:
        pytest.skip("without a queue the own key is all there is: tested below")
    generator = torch.Generator().manual_seed(5)
    b, d = 6, 4
    leaf = torch.randn(b, d, generator=generator, dtype=torch.float64, requires_grad=True)
    q = torch.nn.functional.normalize(leaf, dim=1)
    rest = torch.nn.functional.normalize(torch.randn(b + queue_rows, d, generator=generator, dtype=torch.float64), dim=1)
    others = torch.cat([q, rest])
    labels = torch.tensor([0, 0, 1, 1, 0, 2])
    confident = torch.tensor([True, True, True, False, False, False])
    queue_labels = torch.randint(0, 3, (queue_rows,), generator=generator)
    queue_confident = torch.rand(queue_rows, generator=generator) < 0.5
    arguments = (
        labels, confident, torch.cat([labels, labels, queue_labels]), torch.cat([confident, confident, queue_confident]),
        torch.arange(b), b + torch.arange(b), 0.07, mode, 2 * b,
    )  # fmt: skip
    ours = losses.contrastive_loss(q, others, *arguments)
    by_hand = contrast_by_hand(q, others, *arguments)
    torch.testing.assert_close(ours, by_hand, rtol=1e-9, atol=1e-12)
    weights = torch.arange(1, b + 1, dtype=torch.float64)
    same_value_and_gradient((ours * weights).sum(), (by_hand * weights).sum(), leaf)


def test_contrast_with_nothing_but_the_own_key_is_zero():
    q = torch.nn.functional.normalize(torch.randn(1, 4), dim=1)
    k = torch.nn.functional.normalize(torch.randn(1, 4), dim=1)
    label, mark = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.bool)
    loss = losses.contrastive_loss(
        q, torch.cat([q, k]), label[:1], mark[:1], label, mark, torch.tensor([0]), torch.tensor([1])
    )
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_half_precision_inputs_are_reduced_in_float32():
    logits = torch.randn(3, 4).to(torch.bfloat16)
    assert losses.soft_cross_entropy(logits, torch.full((3, 4), 0.25)).dtype == torch.float32


def test_similarities_are_computed_in_float32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    features, prototypes = (torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1) for n in (5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        log_p = losses.prototype_log_probabilities(features, prototypes, 0.07)
        contrast = losses.contrastive_loss(
            features,
            features,
            *[torch.arange(5), torch.ones(5, dtype=torch.bool)] * 2,
            torch.arange(5),
            torch.arange(5).roll(1),
        )
    assert torch.equal(log_p, losses.prototype_log_probabilities(features, prototypes, 0.07))
    again = losses.contrastive_loss(
        features,
        features,
        *[torch.arange(5), torch.ones(5, dtype=torch.bool)] * 2,
        torch.arange(5),
        torch.arange(5).roll(1),
    )
    assert torch.equal(contrast, again)
