"""Alignment and division against loops and scikit-learn, and every way in which a mixture can go wrong."""

import numpy as np
import pytest
from sklearn.mixture import GaussianMixture

from coreg.learn import division
from coreg.learn.division import LARGEST_LOSS, align, divide, division_loss, representatives


def log_rows(n, c, seed=0):
    logits = np.random.default_rng(seed).normal(size=(n, c)) * 2
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_align_divides_by_the_mean_prediction_and_renormalises():
    log_p, prior = log_rows(7, 3), np.array([0.2, 0.3, 0.5])
    mean = [sum(np.exp(log_p[i, c]) for i in range(7)) / 7 for c in range(3)]
    for i, row in enumerate(align(log_p, prior, np.array(mean))):
        scaled = [np.exp(log_p[i, c]) * prior[c] / mean[c] for c in range(3)]
        assert np.exp(row) == pytest.approx(np.array(scaled) / sum(scaled))


def test_align_survives_a_class_that_is_never_predicted():
    log_p = np.log(np.array([[1.0 - 1e-300, 1e-300], [1.0 - 1e-300, 1e-300]]))
    aligned = align(log_p, np.array([0.5, 0.5]), np.exp(log_p).mean(axis=0))
    assert np.isfinite(aligned).all()
    assert np.exp(aligned).sum(axis=1) == pytest.approx(1.0)


def test_division_loss_takes_the_best_candidate_and_is_capped():
    log_p = np.log(np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]]))
    candidates = np.array([[True, True, False], [False, True, True]])
    assert division_loss(log_p, candidates) == pytest.approx([-np.log(0.7), -np.log(0.2)])
    assert division_loss(np.array([[0.0, -np.inf]]), np.array([[False, True]])).tolist() == [LARGEST_LOSS]


def two_bells(n=400, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(0.3, 0.08, n), rng.normal(3.0, 0.4, n)]).clip(0.0), np.arange(2 * n) < n


def test_divide_is_the_small_mean_posterior_of_the_normalised_loss():
    losses, easy = two_bells()
    split = divide(losses[None], np.ones(800, dtype=bool), seed=3)
    normalised = (losses - losses.min()) / (losses.max() - losses.min())
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=3).fit(normalised[:, None])
    expected = mixture.predict_proba(normalised[:, None])[:, mixture.means_[:, 0].argmin()]
    assert split.weight == pytest.approx(expected)
    assert (split.trusted == easy).mean() > 0.99
    assert split.means[0] < split.means[1]


def test_divide_averages_each_epochs_normalised_losses():
    losses, _ = two_bells()
    history = np.stack([losses, 10 * losses + 2, losses])  # the same after min-max
    alone = divide(losses[None], np.ones(800, dtype=bool), seed=0)
    assert divide(history, np.ones(800, dtype=bool), seed=0).weight == pytest.approx(alone.weight)


def test_divide_does_not_depend_on_the_order_of_images():
    losses, _ = two_bells()
    order = np.random.default_rng(1).permutation(800)
    usable = np.ones(800, dtype=bool)
    there, back = divide(losses[None], usable, seed=0).trusted, divide(losses[None, order], usable, seed=0).trusted
    assert (there[order] == back).all()


def test_equal_losses_are_all_trusted():
    split = divide(np.full((2, 50), 1.7), np.ones(50, dtype=bool), seed=0)
    assert split.trusted.all() and (split.weight == 1).all()


def test_infinite_losses_are_capped_before_they_come_here_and_leave_finite_weights():
    log_p = np.log(np.clip(np.random.default_rng(0).random((60, 4)), 1e-9, 1))
    log_p[:3] = -np.inf
    losses = division_loss(log_p, np.ones((60, 4), dtype=bool))
    assert np.isfinite(divide(losses[None], np.ones(60, dtype=bool), seed=0).weight).all()


def test_images_without_any_vote_are_left_out_of_the_fit_and_distrusted():
    losses, _ = two_bells()
    usable = np.ones(900, dtype=bool)
    usable[800:] = False
    padded = np.concatenate([losses, np.zeros(100)])
    split = divide(padded[None], usable, seed=0)
    assert not split.trusted[800:].any() and (split.weight[800:] == 0).all()
    assert split.weight[:800] == pytest.approx(divide(losses[None], np.ones(800, dtype=bool), seed=0).weight)
    assert not divide(padded[None], np.zeros(900, dtype=bool), seed=0).trusted.any()


def test_too_small_a_trusted_set_is_filled_with_the_smallest_losses():
    losses = np.concatenate([np.linspace(0, 0.01, 3), np.linspace(4, 5, 97)])
    split = divide(losses[None], np.ones(100, dtype=bool), seed=0, smallest=20)
    assert split.trusted.sum() == 20 and split.trusted[np.argsort(losses)[:20]].all()


def test_monotone_does_not_punish_the_easiest_images():
    """A narrow component at .15 and a broad one at .5: the plain posterior distrusts the very smallest losses."""
    rng = np.random.default_rng(0)
    losses = np.concatenate([[0.0], rng.normal(0.15, 0.015, 600), rng.normal(0.5, 0.2, 400).clip(0.01, 1), [1.0]])
    usable = np.ones(len(losses), dtype=bool)
    plain, monotone = divide(losses[None], usable, seed=0), divide(losses[None], usable, seed=0, monotone=True)
    assert plain.weight[0] < 0.5 < monotone.weight[0]
    order = np.argsort(losses)
    below = order[: (losses < 0.15).sum()]
    assert (np.diff(monotone.weight[below]) <= 1e-12).all()


def test_few_losses_stand_for_themselves_and_many_for_equally_many_others(monkeypatch):
    losses = np.random.default_rng(0).beta(0.5, 2, 1000)
    assert representatives(losses) is losses
    monkeypatch.setattr(division, "LARGE", 64)
    few = representatives(losses)
    assert len(few) == 64 and (np.diff(few) >= 0).all() and np.isin(few, losses).all()
    for at in np.concatenate([losses, few, few - 1e-12]):
        assert abs((few <= at).mean() - (losses <= at).mean()) <= 1 / 64
    assert abs(few.mean() - losses.mean()) <= 1 / 64
    assert representatives(losses[:64]) is not None and len(representatives(losses[:65])) == 64


def test_a_division_by_a_histogram_is_that_by_all_losses(monkeypatch):
    """Bars a thousandth of the losses move the posteriors by less than a hundredth, and hardly an image changes sides."""
    rng = np.random.default_rng(0)
    history = [np.where(rng.random(50_000) < 0.6, rng.gamma(2.0, 0.4, 50_000), rng.normal(2.5, 0.5, 50_000))] * 2
    usable = rng.random(50_000) < 0.9
    whole = divide(history, usable, seed=0)
    monkeypatch.setattr(division, "LARGE", 1000)
    few = divide(history, usable, seed=0)
    assert not (few.weight[~usable]).any() and (few.weight != whole.weight).any()
    assert np.abs(few.weight - whole.weight).max() < 0.01 and (few.trusted != whole.trusted).mean() < 0.001
    monkeypatch.setattr(division, "LARGE", 49_999)  # the fit is the same, posteriors are computed in parts
    monkeypatch.setattr(division, "representatives", lambda losses: losses)
    assert np.array_equal(divide(history, usable, seed=0).weight, whole.weight)
