"""What an annotator holds probable of several labels, by loops over images, parts and labels."""

import math

import numpy as np
import pytest

from coreg.weak.multi import suggestions
from coreg.weak.tag_evidence import (
    class_bias,
    debiased,
    fit_gaussians,
    image_or_part,
    softmax,
    with_consistent_parts,
)

N, M, L, D = 7, 5, 4, 6


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def features():
    """Of images, of their parts, and of texts, rows of length 1."""
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(N, D))), unit(rng.normal(size=(N, M, D))), unit(rng.normal(size=(L, D)))


def q(cosines, temperature):
    odds = [math.exp(c / temperature) for c in cosines]
    return [odd / sum(odds) for odd in odds]


def test_the_largest_of_image_and_parts(features):
    image, parts, text = features
    ours = image_or_part(image @ text.T, parts @ text.T, 0.3)
    for n in range(N):
        views = [q([v @ t for t in text], 0.3) for v in [image[n], *parts[n]]]
        np.testing.assert_allclose(ours[n], [max(view[label] for view in views) for label in range(L)], atol=1e-12)
    # several labels can exceed any threshold below 1, which one softmax does not allow
    assert suggestions(np.array([[0.9, 0.8, 0.2]]), 0.6).tolist() == [[1, 1, 0]]


def test_bias_and_consistent_parts(features):
    image, parts, text = features
    p = np.array([q([v @ t for t in text], 0.2) for v in image])
    largest = {label: [] for label in range(L)}
    for row in p:
        if -sum(x * math.log(x) for x in row) <= 2:
            largest[int(row.argmax())].append(max(row))
    bias = [sum(some) / len(some) if some else 1.0 for some in largest.values()]
    np.testing.assert_allclose(class_bias(p), bias, atol=1e-12)
    ours = with_consistent_parts(image @ text.T, parts @ text.T, 0.2, class_bias(p))
    for n in range(N):
        crops = [[min(x / b, 1) for x, b in zip(q([v @ t for t in text], 0.2), bias)] for v in parts[n]]
        for label in range(L):
            own = min(p[n, label] / bias[label], 1)
            assert ours[n, label] == pytest.approx(0.8 * own + 0.2 * max(crop[label] for crop in crops), abs=1e-12)
    assert debiased(np.array([[0.5, 0.25]]), np.array([0.5, 1.0])).tolist() == [[1.0, 0.25]]


def test_predictions_that_are_too_unsure_say_nothing_of_bias():
    flat, sure = np.full(16, 1 / 16), np.full(16, 0.1 / 15)  # entropies of 2.8 and 0.6 nats
    sure[3] = 0.9
    flat = flat + np.eye(16)[3] * 1e-3
    bias = class_bias(np.array([flat / flat.sum(), sure]))
    assert bias[3] == pytest.approx(0.9) and (np.delete(bias, 3) == 1).all()


def test_gaussians_by_hand(features):
    _, _, text = features
    rng = np.random.default_rng(1)
    parts = unit(rng.normal(size=(400, D)) + 1.5 * text[rng.integers(0, L - 1, 400)])
    model = fit_gaussians([parts[:150], parts[150:150], parts[150:]], text)
    p = [q([60 * (v @ t) for t in text], 1.0) for v in parts]
    means, around = [], []
    for label in range(L):
        won = [n for n in range(400) if max(p[n]) == p[n][label]]
        won.sort(key=lambda n: -sum(x * math.log(x) for x in p[n] if x > 0))
        some = won[: max(len(won) // 4, 1)]
        mean = sum(p[n][label] * parts[n] for n in some) / sum(p[n][label] for n in some)
        means.append(mean)
        around += [parts[n] - mean for n in some]
    around = np.array(around)
    n = len(around)
    centred = around - around.mean(axis=0)
    covariance = centred.T @ centred / (n - 1)
    inverse = D * np.linalg.inv((n - 1) * covariance + np.trace(covariance) * np.eye(D))
    for v in parts[:5]:
        logits = [mean @ inverse @ v - mean @ inverse @ mean / 2 for mean in means]
        np.testing.assert_allclose(model.posterior(v[None])[0], q(logits, 500), rtol=1e-7)
    # an image's score
    images, cosines = parts[:10].reshape(2, 5, D), np.array([[0.3, 0.1, 0.2, -0.1], [0.0, 0.1, 0.2, 0.3]])
    for n, score in enumerate(model.scores(images, cosines)):
        largest = [max(model.posterior(v[None])[0, label] for v in images[n]) for label in range(L)]
        local, whole = q([200 * x for x in largest], 1.0), q([80 * c for c in cosines[n]], 1.0)
        np.testing.assert_allclose(score, [0.9 * a + 0.1 * b for a, b in zip(local, whole)], rtol=1e-7)


def test_gaussians_do_not_depend_on_blocks(features):
    _, parts, text = features
    flat = parts.reshape(-1, D)
    whole = fit_gaussians([flat], text)
    one_by_one = fit_gaussians([part[None] for part in flat], text)
    np.testing.assert_allclose(one_by_one.weight, whole.weight, rtol=1e-9)


def test_gaussians_of_a_label_that_wins_nothing_and_of_one_part(features):
    _, _, text = features
    texts = np.array([text[0], text[1], text[1]])  # of equal labels the first wins
    parts = np.array([text[0], text[1]])
    model = fit_gaussians([parts], texts)
    assert np.isfinite(model.weight).all() and np.isfinite(model.posterior(parts)).all()
    only = fit_gaussians([text[:1]], text)
    assert np.isfinite(only.scores(text[None, :1], text[:1] @ text.T)).all()
    assert softmax(np.array([[1000.0, 0.0]])).tolist() == [[1.0, 0.0]]
