"""Transductive judging against the same method written out in loops, and what its blocks promise."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from coreg.annotate.transductive import SMALLEST_SHARE, fit, log_likelihood, pull, transduce
from coreg.weak import neighbours
from coreg.weak.neighbours import nearest


def data(n=40, classes=3, dim=5, seed=0):
    """Three directions with noise, and text predictions that are right more often than not."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    features = np.eye(classes, dim)[labels] + 0.35 * rng.normal(size=(n, dim))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    logits = 1.2 * np.eye(classes)[labels] + rng.normal(size=(n, classes))
    text = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return torch.from_numpy(features), torch.from_numpy(text), labels


def by_hand(features, text, k, a, b, rounds, sweeps):
    """The method image by image and class by class; N, C and D small."""
    f, y = features.tolist(), text.tolist()
    n, c, d = len(f), len(y[0]), len(f[0])
    dot = [[sum(p * q for p, q in zip(u, v)) for v in f] for u in f]
    weight = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in sorted((j for j in range(n) if j != i), key=lambda j: -dot[i][j])[:k]:
            weight[i][j] += max(dot[i][j], 0.0) / (2 * k)
            weight[j][i] += max(dot[i][j], 0.0) / (2 * k)
    mean = []
    for m in range(c):
        sure = sorted(range(n), key=lambda i: -y[i][m])[:8]
        mean.append([sum(f[i][t] for i in sure) / len(sure) for t in range(d)])
    variance, z = [1 / d] * d, y
    for number in range(rounds + 1):
        for _ in range(sweeps):
            moved = []
            for i in range(n):
                score = []
                for m in range(c):
                    gauss = -0.5 * sum((f[i][t] - mean[m][t]) ** 2 / variance[t] for t in range(d))
                    friends = sum(weight[i][j] * z[j][m] for j in range(n))
                    score.append(y[i][m] ** a * math.exp(b * gauss + friends))
                moved.append([s / sum(score) for s in score])
            z = moved
        if number == rounds:
            return z
        mass = [sum(z[i][m] for i in range(n)) for m in range(c)]
        mean = [[sum(z[i][m] * f[i][t] for i in range(n)) / mass[m] for t in range(d)] for m in range(c)]
        variance = [sum(z[i][m] * (f[i][t] - mean[m][t]) ** 2 for i in range(n) for m in range(c)) / n for t in range(d)]


@pytest.mark.parametrize(("n", "k"), [(25, 3), (7, 4)])
def test_it_is_the_method_written_out(n, k):
    features, text, _ = data(n)
    assigned = transduce(features, text, neighbours=k, text_weight=0.7, likelihood_weight=0.3, rounds=3, sweeps=2)
    np.testing.assert_allclose(assigned, by_hand(features, text, k, 0.7, 0.3, 3, 2), rtol=1e-8, atol=1e-12)


def test_neighbours_are_those_of_scikit_learn_whatever_the_chunk(monkeypatch):
    features, _, _ = data(50)
    distances_and_rows = NearestNeighbors(n_neighbors=5, metric="cosine").fit(features).kneighbors(return_distance=True)
    for at_once in (1 << 24, 50 * 7, 1):
        monkeypatch.setattr(neighbours, "SIMILARITIES_AT_ONCE", at_once)
        rows, cosines = nearest(features, 5)
        assert torch.equal(rows, torch.from_numpy(distances_and_rows[1]))
        np.testing.assert_allclose(cosines, np.maximum(1 - distances_and_rows[0], 0), atol=1e-12)


def test_the_pull_is_the_product_with_the_symmetric_matrix():
    features, text, _ = data(30)
    rows, cosines = nearest(features, 4)
    a = torch.zeros(30, 30, dtype=torch.float64)
    a.scatter_(1, rows, cosines)
    torch.testing.assert_close(pull(text, rows, cosines), (a + a.T) / 8 @ text)


def test_likelihoods_are_those_of_torch_up_to_what_all_classes_share():
    features, _, _ = data(20)
    means, variance = torch.rand(3, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    normal = torch.distributions.Normal(means, variance.sqrt())
    expected = normal.log_prob(features[:, None]).sum(dim=2)
    ours = log_likelihood(features, means, variance)
    torch.testing.assert_close(ours - ours[:, :1], expected - expected[:, :1])


def test_gaussians_fit_best_where_they_are_said_to():
    features, text, _ = data(60)
    means, variance = fit(features, text, torch.zeros(3, 5, dtype=torch.float64))
    means.requires_grad_()
    variance.requires_grad_()
    normal = torch.distributions.Normal(means, variance.sqrt())
    (text * normal.log_prob(features[:, None]).sum(dim=2)).sum().backward()
    assert means.grad.abs().max() < 1e-9 and variance.grad.abs().max() < 1e-7


def test_every_sweep_lowers_the_objective_where_the_affinity_is_positive_semidefinite():
    features, text, _ = data(12)
    features = features.abs()  # so that their cosines are a Gram matrix as they are
    rows = torch.arange(12).repeat(12, 1)  # everybody is everybody's neighbour, itself included
    cosines = features @ features.T
    w = cosines / 12
    evidence = text.log() + 0.1 * log_likelihood(features, features[:3], torch.full((5,), 0.2, dtype=torch.float64))

    def objective(z):
        return (torch.xlogy(z, z) - z * evidence).sum() - (z @ z.T * w).sum() / 2

    z, values = text, [objective(text)]
    for _ in range(10):
        z = torch.softmax(evidence + pull(z, rows, cosines), dim=1)
        values.append(objective(z))
    assert all(after <= before + 1e-12 for before, after in zip(values, values[1:])) and values[-1] < values[0]


def test_judging_together_corrects_text_predictions():
    features, text, labels = data(300, seed=3)
    before = (text.argmax(1).numpy() == labels).mean()
    after = (transduce(features, text).argmax(1).numpy() == labels).mean()
    assert before < 0.75 and after > before + 0.1


def test_the_order_of_images_does_not_matter():
    features, text, _ = data(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transduce(features[order], text[order]), transduce(features, text)[order])


def test_odd_sets():
    features, text, _ = data(9)
    # one image, two images, copies of one image
    alone = transduce(features[:1], text[:1])
    assert alone.shape == (1, 3) and alone.isfinite().all()
    assert transduce(features[:2], text[:2]).isfinite().all()
    copies = transduce(features[:1].expand(9, 5), text)
    assert copies.isfinite().all()
    torch.testing.assert_close(copies.sum(1), torch.ones(9, dtype=torch.float64))
    # a share that float16 rounded to zero does not shut a class out, and a class that nobody names does no harm
    text = text.clone()
    text[:, 2] = 0
    assigned = transduce(features, text / text.sum(1, keepdim=True))
    assert assigned.isfinite().all() and (assigned[:, 2] > 0).all() and assigned[:, 2].max() < 100 * SMALLEST_SHARE
    # half precision, as stored
    assert transduce(features.half().float(), text.half()).isfinite().all()


def test_a_class_without_any_image_keeps_its_mean():
    features, text, _ = data(6)
    z = text.clone()
    z[:, 1] = 0
    before = torch.full((3, 5), 7.0, dtype=torch.float64)
    means, _ = fit(features, z, before)
    assert torch.equal(means[1], before[1]) and (means[[0, 2]] != 7).all()
