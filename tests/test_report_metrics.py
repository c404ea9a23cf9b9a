"""Metrics against scikit-learn, closed forms and hand-worked cases."""

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, recall_score

from coreg.learn.division import Division
from coreg.report.metrics import (
    accuracy,
    collapse_warnings,
    consensus,
    division_health,
    mean_prediction_entropy,
    per_class_accuracy,
    wilson_interval,
)
from coreg.report.report import known_labels_lines


def test_accuracy_counts_known_labels_alone():
    predictions, labels = np.array([0, 1, 2, 2]), np.array([0, 2, 2, -1])
    assert accuracy(predictions, labels) == pytest.approx(accuracy_score(labels[:3], predictions[:3]))
    assert accuracy(predictions, np.full(4, -1)) is None


def test_per_class_accuracy_is_recall():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, 100), rng.integers(0, 4, 100)
    assert per_class_accuracy(predictions, labels, 5)[:4] == pytest.approx(recall_score(labels, predictions, average=None))
    assert per_class_accuracy(predictions, labels, 5)[4] is None


def test_wilson_interval():
    # hand-worked: 8 of 10 at 95 %
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(1.0, 5)[1] == 1.0 and wilson_interval(0.0, 5)[0] == 0.0
    assert wilson_interval(0.3, 0) == (0.0, 1.0)


def test_mean_prediction_entropy_is_one_for_balance_and_zero_for_collapse():
    assert mean_prediction_entropy(np.log(np.full((3, 4), 0.25))) == pytest.approx(1.0)
    assert mean_prediction_entropy(np.log(np.array([[1.0 - 1e-12, 1e-12]] * 3))) == pytest.approx(0.0, abs=1e-9)


def test_division_health_by_hand():
    log_p = np.log(np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]]))
    other = log_p[:, ::-1][[0, 1, 2, 3]]
    other[1] = log_p[1]  # the networks agree on row 1 alone
    candidates = np.array([[True, False], [True, True], [False, True], [True, False]])
    first = Division(np.array([1.0, 0.9, 0.2, 0.1]), np.array([True, True, False, False]), [0.1, 0.8], [0.5, 0.5])
    second = Division(np.ones(4), np.ones(4, dtype=bool))
    labels = np.array([0, 1, 1, -1])
    found = division_health([first, second], [log_p, other], candidates, np.array([0, 0, 0, 0]), labels, ["a/b", "c"])
    assert found["division/trusted"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["division/agreement_of_nets"] == pytest.approx(0.25)
    assert found["division/agreement_with_annotator"] == pytest.approx((3 / 4 + 0) / 2)
    assert found["division/rarest_pseudo_label"] == 0
    # net1 names the classes 3 times and once, net2 never and 4 times
    assert found["pseudo_labels/a/b"] == 1.5 and found["pseudo_labels/c"] == 2.5
    # P: rows 0, 1 of net1 (2 of 2 right), rows 0, 1, 2 of net2 (rows 1, 2 right); U: row 2 of net1 (wrong)
    assert found["truth/accuracy_in_P"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["truth/accuracy_in_U"] == 0
    assert found["truth/candidate_coverage_in_P"] == pytest.approx(1.0)
    assert found["gmm/net1_mean_small"] == 0.1 and "gmm/net2_mean_small" not in found
    assert all(math.isfinite(value) for value in found.values())


def test_division_health_without_labels_says_nothing_about_truth():
    log_p = np.log(np.full((2, 2), 0.5))
    division = Division(np.ones(2), np.ones(2, dtype=bool))
    everything = np.ones((2, 2), dtype=bool)
    found = division_health([division] * 2, [log_p] * 2, everything, np.zeros(2, int), np.full(2, -1), ["a", "b"])
    assert not any(name.startswith("truth") for name in found)


def test_consensus_is_agreement_times_balance():
    sure = np.log(np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]))
    assert consensus([sure, sure]) == pytest.approx(1.0)  # all agree, both classes as often
    assert consensus([sure, sure[::-1]]) == pytest.approx(0.0)
    other = sure.copy()
    other[0] = sure[1]
    balance = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7)) / math.log(2)  # mean of other: (0.3, 0.7)
    assert consensus([sure, other]) == pytest.approx(0.75 * (1 + balance) / 2)
    collapsed = np.log(np.array([[1 - 1e-9, 1e-9]] * 4))
    assert consensus([collapsed, collapsed]) < 1e-6  # they agree on everything, and it is worth nothing


def test_collapse_is_put_into_words():
    names = ["ant", "bee", "cat", "dog"]
    assert collapse_warnings(np.arange(40) % 4, names) == []
    said = collapse_warnings(np.array([0] * 39 + [1]), names)
    assert "3 of 4 classes are hardly ever predicted (bee, cat, dog)" not in said[0]  # bee: 1 of 40 is a tenth of a share
    assert said[0].startswith("2 of 4 classes") and "cat, dog" in said[0] and "called ant" in said[1]


def test_a_run_says_how_many_labels_are_known_and_which_folders_are_no_class():
    report = {"images": {"train": 80, "test": 20}, "labelled": {"train": 60, "test": 20}}
    assert known_labels_lines(report) == ["Labels are known for 60 of 80 train images and 20 of 20 test images."]
    report |= {"labelled": {"train": 0, "test": 0}, "unmatched_folders": ["'cats' (3 images, did you mean 'cat'?)"]}
    assert known_labels_lines(report) == ["Called like no class: 'cats' (3 images, did you mean 'cat'?)."]
    assert known_labels_lines({"images": {"train": 80}}) == []  # of an earlier version
