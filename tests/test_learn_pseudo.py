"""Targets against written-out formulas, degenerate rows included."""

import numpy as np
import pytest
import torch
from scipy import stats

from coreg.learn.pseudo import draw_mixup, fuse_trusted, mix, rescale, sharpen


def test_rescale_keeps_the_candidates_and_sums_to_one():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64)
    candidates = torch.tensor([[True, False, True], [False, True, False]])
    expected = torch.tensor([[5 / 7, 0, 2 / 7], [0, 1, 0]], dtype=torch.float64)
    torch.testing.assert_close(rescale(p, candidates), expected)


def test_rescale_without_any_mass_is_uniform_over_the_candidates():
    p, candidates = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[False, True, True]])
    assert rescale(p, candidates).tolist() == [[0.0, 0.5, 0.5]]


def test_sharpen_is_a_renormalised_power():
    p = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64)
    power = p**2
    torch.testing.assert_close(sharpen(p, 0.5), power / power.sum())
    torch.testing.assert_close(sharpen(p, 1.0), p)


def test_sharpen_survives_probabilities_whose_square_underflows():
    p = torch.tensor([[1e-30, 3e-30, 0.0]])
    assert sharpen(p, 0.5)[0].tolist() == pytest.approx([0.1, 0.9, 0.0], rel=1e-4)


def test_fuse_trusted_weighs_each_row():
    peer, own = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    fused = fuse_trusted(peer, own, torch.tensor([0.75, 0.0]))
    assert fused.tolist() == [[0.75, 0.25], [0.5, 0.5]]


def test_mix_with_everything_kept_changes_nothing():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(mix(x, y, 1.0), x)
    torch.testing.assert_close(mix(x, y, 0.6), 0.6 * x + 0.4 * y)


def test_mixup_is_drawn_by_key_and_keeps_the_larger_part():
    kept, order = zip(*(draw_mixup(0.75, 5, ("mixup", number)) for number in range(2000)))
    assert min(kept) >= 0.5 and all(sorted(one) == list(range(5)) for one in order)
    # the larger part of Beta(a, a) has the law of |B - 1/2| + 1/2
    assert stats.kstest(kept, lambda t: 1 - 2 * stats.beta(0.75, 0.75).cdf(1 - np.asarray(t))).pvalue > 1e-4
    assert stats.chisquare(np.bincount([one[0] for one in order], minlength=5)).pvalue > 1e-4
    again = draw_mixup(0.75, 5, ("mixup", 7))
    assert again[0] == kept[7] and (again[1] == order[7]).all()


def test_without_mixup_every_row_is_its_own_partner():
    kept, order = draw_mixup(0, 4, ("mixup",))
    assert kept == 1 and order.tolist() == [0, 1, 2, 3]
    assert draw_mixup(4.0, 0, ("mixup",))[1].shape == (0,)
