"""The neighbours' vote against loops, and on sets that are odd."""

import math

import numpy as np
import pytest
import torch

from coreg.weak.neighbours import directions, vote


def by_hand(features, probs, k):
    """One image and one neighbour at a time."""
    n, d = len(features), len(features[0])
    mean = [sum(row[t] for row in features) / n for t in range(d)]
    unit = []
    for row in features:
        row = [x - m for x, m in zip(row, mean)]
        length = math.sqrt(sum(x * x for x in row))
        unit.append([x / length if length else 0.0 for x in row])
    means = []
    for i in range(n):
        cosine = {j: sum(a * b for a, b in zip(unit[i], unit[j])) for j in range(n) if j != i}
        near = sorted(cosine, key=lambda j: -cosine[j])[:k]
        weight = {j: max(cosine[j], 0.0) for j in near}
        total = sum(weight.values())
        means.append(
            [sum(weight[j] * probs[j][c] for j in near) / total if total else probs[i][c] for c in range(len(probs[0]))]
        )
    return means


@pytest.mark.parametrize(("n", "k", "classes"), [(30, 5, 3), (7, 20, 3), (2, 5, 2), (1, 5, 4), (12, 5, 1), (9, 4, 1000)])
def test_the_vote_is_the_weighted_mean_written_out(n, k, classes):
    rng = np.random.default_rng(0)
    features, probs = rng.normal(size=(n, 4)) + 3, rng.dirichlet(np.ones(classes), n)
    means = vote(torch.from_numpy(features), torch.from_numpy(probs), k)
    np.testing.assert_allclose(means, by_hand(features.tolist(), probs.tolist(), k), atol=1e-9)
    np.testing.assert_allclose(means.sum(dim=1), 1, atol=1e-9)


def test_a_class_that_is_named_by_mistake_alone_goes():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    features = np.eye(3, 5)[labels] + 0.2 * rng.normal(size=(300, 5))
    named = np.where(rng.random(300) < 0.3, rng.integers(0, 6, 300), labels)  # three names do not occur
    voted = vote(torch.from_numpy(features).float(), torch.from_numpy(np.eye(6)[named]).half()).argmax(dim=1).numpy()
    assert (named > 2).mean() > 0.1 and (voted > 2).mean() == 0 and (voted == labels).mean() > 0.97


def test_features_that_do_not_differ_say_nothing():
    probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    assert directions(torch.ones(3, 4)).abs().max() == 0
    torch.testing.assert_close(vote(torch.ones(3, 4), probs), probs)
