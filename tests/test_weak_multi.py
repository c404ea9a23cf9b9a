"""Observed labels of images with several labels: drawn as public code does, keyed, by share, by a person, and none."""

from pathlib import Path

import numpy as np
import pytest

from coreg.errors import UserError
from coreg.weak.multi import (
    ObservedLabels,
    keyed_draw,
    published_draw,
    published_split,
    share_draw,
    suggestions,
)
from coreg.weak.tag_evidence import softmax

PUBLIC = np.load(Path(__file__).parent / "reference" / "spml_draw_split.npz")


def random_truth(n=400, labels=12, share=0.3, seed=0):
    """With an image that has none of the labels, one that has all, and one of which half is unknown."""
    truth = np.where(np.random.default_rng(seed).random((n, labels)) < share, 1, -1).astype(np.int8)
    truth[0], truth[1], truth[2, :6] = -1, 1, 0
    return truth


# ---- as published ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "observed", "counts"),
    [
        ("labels", "observed", (1, 0)),
        ("labels", "observed_2pos_1neg", (2, 1)),
        ("labels", "observed_allpos", (-1, 0)),
        ("labels_200", "observed_200", (1, 0)),
    ],
)
def test_the_published_draw_is_that_of_the_public_code(labels, observed, counts):
    drawn = published_draw((2 * PUBLIC[labels] - 1).astype(np.int8), *counts)
    assert drawn.dtype == np.int8
    np.testing.assert_array_equal(drawn, PUBLIC[observed])


@pytest.mark.parametrize(("n", "name"), [(24, "24"), (200, "200"), (5717, "5717")])
def test_the_published_split_is_that_of_the_public_code(n, name):
    prefix = "voc_" if n == 5717 else ""
    train, validation = published_split(n)
    np.testing.assert_array_equal(train, PUBLIC[f"{prefix}train_{name}"])
    np.testing.assert_array_equal(validation, PUBLIC[f"{prefix}val_{name}"])


def test_a_split_without_validation_keeps_every_image():
    train, validation = published_split(7, share=0.0)
    assert train.tolist() == list(range(7)) and len(validation) == 0


def test_published_labels_are_drawn_before_the_split():
    """The other order gives other labels: the stream of random numbers goes on from image to image."""
    truth, rows = random_truth(50), np.arange(100, 150)
    train, _ = published_split(50)
    observed = ObservedLabels.from_truth(truth, rows, "published", 1, 0, seed=3).at(train)
    np.testing.assert_array_equal(observed.table, published_draw(truth)[train])
    assert (published_draw(truth[train]) != observed.table).any()
    np.testing.assert_array_equal(observed.samples, 100 + train)
    np.testing.assert_array_equal(observed.truth, truth[train])
    assert observed.source == {"generator": "published", "positives": 1, "negatives": 0, "seed": 1200}


# ---- keyed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positives", "negatives"), [(1, 0), (2, 3), (-1, 1), (0, 0), (-1, -1), (99, 0)])
def test_images_keep_as_many_true_labels_as_asked_for(positives, negatives):
    truth = random_truth()
    observed = keyed_draw(truth, positives, negatives, seed=3)
    assert observed.dtype == np.int8
    for row, labels in zip(observed, truth):
        assert all(kept in (0, true) for kept, true in zip(row, labels))
        for state, count in ((1, positives), (-1, negatives)):
            there = (labels == state).sum()
            assert (row == state).sum() == (there if count < 0 else min(count, there))


def test_an_image_keeps_the_same_labels_in_any_company_and_more_of_them_add_up():
    truth = random_truth()
    all_of_them = keyed_draw(truth, 1, 2, seed=3)
    some = np.array([7, 0, 300, 1])
    np.testing.assert_array_equal(keyed_draw(truth[some], 1, 2, seed=3, rows=some), all_of_them[some])
    assert ((keyed_draw(truth, 3, 2, seed=3) == all_of_them) | (all_of_them == 0)).all()
    assert (keyed_draw(truth, 1, 2, seed=4) != all_of_them).any()


def test_every_present_label_is_kept_equally_often():
    truth = np.ones((3000, 5), dtype=np.int8)
    counts = (keyed_draw(truth, 1, 0, seed=0) == 1).sum(axis=0)
    assert counts.sum() == 3000
    assert (abs(counts - 600) < 5 * (3000 * 0.2 * 0.8) ** 0.5).all()


def test_shares_of_present_and_absent_labels_are_kept():
    truth = random_truth(3000)
    observed = share_draw(truth, 0.5, 0.1, seed=1)
    assert (observed * truth >= 0).all() and (observed[truth == 0] == 0).all()
    for state, share in ((1, 0.5), (-1, 0.1)):
        n = (truth == state).sum()
        assert abs((observed == state).sum() - share * n) < 5 * (n * share * (1 - share)) ** 0.5
    more = share_draw(truth, 0.7, 0.1, seed=1)
    assert ((more == observed) | (observed == 0)).all()
    np.testing.assert_array_equal(share_draw(truth, 1, 1, seed=1), truth)
    assert not share_draw(truth, 0, 0, seed=1).any()
    with pytest.raises(UserError, match=r"--negatives is 1\.5; give a share from 0 to 1"):
        share_draw(truth, 0.5, 1.5, seed=1)


def test_observed_labels_name_what_they_come_from():
    truth, rows = random_truth(20), np.arange(40, 60)
    drawn = ObservedLabels.from_truth(truth, rows, "numbers", 1.0, 0.0, seed=5)
    np.testing.assert_array_equal(drawn.table, keyed_draw(truth, 1, 0, 5, rows))
    assert drawn.source == {"generator": "numbers", "positives": 1.0, "negatives": 0.0, "seed": 5}
    np.testing.assert_array_equal(drawn.revealed().table, truth)
    shares = ObservedLabels.from_truth(truth, rows, "shares", 0.5, 0.1, seed=5)
    np.testing.assert_array_equal(shares.table, share_draw(truth, 0.5, 0.1, 5, rows))
    assert not ObservedLabels.from_truth(truth, rows, "numbers", 0, 0, seed=5).table.any()
    with pytest.raises(UserError, match="write --observed shares"):
        ObservedLabels.from_truth(truth, rows, "numbers", 0.5, 0, seed=5)


# ---- suggestions of an annotator ------------------------------------------------------------------------------------

# an image that is of two labels, one that is of one, one that says nothing
SIMILARITY = np.array([[0.26, 0.25, 0.10, 0.05], [0.30, 0.10, 0.12, 0.05], [0.2, 0.2, 0.2, 0.2]])


def suggested(similarity, temperature, threshold, absent_share=0.0):
    """A loop by hand."""
    table = np.zeros(similarity.shape, dtype=np.int8)
    for row, values in enumerate(similarity):
        odds = [np.exp(value / temperature) for value in values]
        share = [one / sum(odds) for one in odds]
        for label in np.argsort(values, kind="stable")[: int(absent_share * len(values))]:
            table[row, label] = -1
        for label, one in enumerate(share):
            if one > threshold:
                table[row, label] = 1
    return table


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.3])
@pytest.mark.parametrize(("threshold", "absent_share"), [(0.3, 0), (0.1, 0.5), (0.01, 0.25), (0.3, 1.0)])
def test_suggestions_are_a_softmax_above_a_threshold(temperature, threshold, absent_share):
    table = suggestions(softmax(SIMILARITY / temperature), threshold, absent_share)
    np.testing.assert_array_equal(table, suggested(SIMILARITY, temperature, threshold, absent_share))
    assert table.dtype == np.int8 and ((table == 1).sum(axis=1) < 1 / threshold).all()


def test_the_temperature_of_the_data_set_decides_what_is_suggested():
    """Published: 0.3 is the threshold of VOC (temperature 0.03) and of COCO (0.01)."""
    present = {
        tau: (suggestions(softmax(SIMILARITY / tau), 0.3) == 1).sum(axis=1).tolist() for tau in (1e-6, 0.01, 0.03, 0.3)
    }
    assert present == {1e-6: [1, 1, 0], 0.01: [1, 1, 0], 0.03: [2, 1, 0], 0.3: [2, 1, 0]}


def test_a_share_of_labels_is_counted_as_it_is_written():
    assert (suggestions(softmax(np.arange(100.0)[None]), 0.3, 0.29) == -1).sum() == 29
