"""Metrics against scikit-learn, closed forms and hand-worked cases."""

import math

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import gmean, hmean
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score

from coreg.learn.division import Division, Predicted
from coreg.report.estimate import estimate, estimate_lines
from coreg.report.metrics import (
    accuracy,
    approximated_accuracy,
    calibration_metrics,
    class_metrics,
    collapse_warnings,
    consensus,
    covering_rate,
    division_health,
    entropy,
    label_free_scores,
    mean_confidence,
    per_class_accuracy,
    pick,
    prototype_health,
    wilson_interval,
)
from coreg.report.report import known_labels_lines, metrics


def test_accuracy_counts_known_labels_alone():
    predictions, labels = np.array([0, 1, 2, 2]), np.array([0, 2, 2, -1])
    assert accuracy(predictions, labels) == pytest.approx(accuracy_score(labels[:3], predictions[:3]))
    assert accuracy(predictions, np.full(4, -1)) is None


def test_per_class_accuracy_is_recall():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, 100), rng.integers(0, 4, 100)
    assert per_class_accuracy(predictions, labels, 5)[:4] == pytest.approx(recall_score(labels, predictions, average=None))
    assert per_class_accuracy(predictions, labels, 5)[4] is None


@pytest.mark.parametrize("classes", [3, 8])
def test_metrics_over_classes_are_those_of_scikit_learn_and_scipy(classes):
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 200)
    predictions = np.where(rng.random(200) < 0.5, labels, rng.integers(0, classes, 200))
    ours = class_metrics(np.append(predictions, 1), np.append(labels, -1), classes)  # no label, no mistake
    recall = recall_score(labels, predictions, average=None)
    assert ours == pytest.approx(
        {
            "macro_f1": f1_score(labels, predictions, average="macro"),
            "worst_class": min(recall),
            "harmonic_mean": hmean(recall),
            "geometric_mean": gmean(recall),
        }
    )


def test_a_class_that_is_never_right_makes_no_mean_zero():
    ours = class_metrics(np.array([0, 0, 0, 0]), np.array([0, 0, 1, 1]), 2)
    # F1: 2 x 2 / (2 + 4) and 0; recalls 1 and 0, of which the second counts as 0.00001
    assert ours == pytest.approx(
        {
            "macro_f1": (2 / 3) / 2,
            "worst_class": 0,
            "harmonic_mean": 2 / (1 + 1e5),
            "geometric_mean": math.sqrt(1e-5),
        }
    )


def test_classes_without_images_and_a_single_class():
    # of four classes 0 and 2 have labelled images, 3 is named without being true, 1 is nowhere
    labels, predictions = np.array([0, 0, 2, 2]), np.array([0, 3, 2, 2])
    ours = class_metrics(predictions, labels, 4)
    assert ours["macro_f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert ours["macro_f1"] == pytest.approx((2 / 3 + 1) / 3)
    assert ours["worst_class"] == 0.5 and ours["harmonic_mean"] == pytest.approx(2 / 3)
    alone = class_metrics(np.array([0, 0, -1]), np.zeros(3, dtype=int), 1, np.array([500]))
    # no prediction is a mistake, and one group of classes says nothing that the accuracy does not
    assert alone == pytest.approx(
        {"macro_f1": 2 * 2 / (3 + 2), "worst_class": 2 / 3, "harmonic_mean": 2 / 3, "geometric_mean": 2 / 3}
    )
    assert class_metrics(predictions, np.full(4, -1), 4) == calibration_metrics(np.zeros((4, 4)), np.full(4, -1)) == {}


def test_classes_by_the_number_of_their_training_images():
    counts = np.array([101, 100, 20, 19, 0])
    labels = np.array([0, 0, 1, 1, 2, 2, 3, 4])
    predictions = np.array([0, 1, 1, 1, 0, 2, 3, 0])
    ours = class_metrics(predictions, labels, 5, counts)
    assert [ours[name] for name in ("many", "medium", "few")] == [0.5, (1 + 0.5) / 2, (1 + 0) / 2]
    # no test image of a class with few
    ours = class_metrics(predictions[:6], labels[:6], 5, counts)
    assert "few" not in ours and ours["medium"] == 0.75
    # a report leaves them out where some training image may belong to any class
    truth = {"train": np.repeat(np.arange(5), counts), "test": labels}
    assert "few" in metrics(predictions, truth, "test", 5, None)
    assert "few" not in metrics(predictions, truth | {"train": np.append(truth["train"], -1)}, "test", 5, None)


def test_calibration_is_that_of_scikit_learn_and_of_a_loop(monkeypatch):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.normal(size=(300, 4)), rng.integers(0, 4, 300)
    labels[::7] = -1
    known, probs = labels >= 0, softmax(logits, axis=1)
    bins = {}
    for row in np.flatnonzero(known):
        confidence = probs[row].max()
        bins.setdefault(math.ceil(confidence * 15), []).append((confidence, probs[row].argmax() == labels[row]))
    gaps = [abs(np.mean([c for c, _ in of]) - np.mean([r for _, r in of])) * len(of) for of in bins.values()]
    for rows in (1 << 14, 50):
        monkeypatch.setattr("coreg.report.metrics._ROWS", rows)
        ours = calibration_metrics(logits, labels)
        assert ours["nll"] == pytest.approx(log_loss(labels[known], probs[known], labels=range(4)))
        assert ours["ece"] == pytest.approx(sum(gaps) / known.sum())


def test_certain_predictions_have_finite_metrics():
    with np.errstate(divide="ignore"):
        log_p = np.log(np.array([[1.0, 0.0], [1.0, 0.0]], dtype=np.float16))
    ours = calibration_metrics(log_p, np.array([0, 1]))
    assert ours["ece"] == 0.5  # certain, and right half the time
    assert ours["nll"] == pytest.approx(log_loss([0, 1], [[1.0, 0.0], [1.0, 0.0]]))


def test_wilson_interval():
    # hand-worked: 8 of 10 at 95 %
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(1.0, 5)[1] == 1.0 and wilson_interval(0.0, 5)[0] == 0.0
    assert wilson_interval(0.3, 0) == (0.0, 1.0)


def test_entropy_of_a_mean_prediction_is_one_for_balance_and_zero_for_collapse():
    assert entropy(np.full(4, 0.25)) == pytest.approx(1.0)
    assert entropy(np.array([1.0 - 1e-12, 1e-12])) == pytest.approx(0.0, abs=1e-9)


def test_division_health_by_hand():
    log_p = np.log(np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.7, 0.3]]))
    other = log_p[:, ::-1][[0, 1, 2, 3]]
    other[1] = log_p[1]  # the networks agree on row 1 alone
    candidates = np.array([[True, False], [True, True], [False, True], [True, False]])
    first = Division(np.array([1.0, 0.9, 0.2, 0.1]), np.array([True, True, False, False]), [0.1, 0.8], [0.5, 0.5])
    second = Division(np.ones(4), np.ones(4, dtype=bool))
    labels = np.array([0, 1, 1, -1])
    health = division_health(
        [first, second], [Predicted.of(log_p), Predicted.of(other)], candidates, np.zeros(4, int), labels, ["a/b", "c"]
    )
    assert health["division/trusted"] == pytest.approx((0.5 + 1.0) / 2)
    assert health["division/agreement_of_nets"] == pytest.approx(0.25)
    assert health["division/agreement_with_annotator"] == pytest.approx((3 / 4 + 0) / 2)
    assert health["division/rarest_pseudo_label"] == 0
    # net1 names the classes 3 times and once, net2 never and 4 times
    assert health["pseudo_labels/a/b"] == 1.5 and health["pseudo_labels/c"] == 2.5
    # P: rows 0, 1 of net1 (2 of 2 right), rows 0, 1, 2 of net2 (rows 1, 2 right); U: row 2 of net1 (wrong)
    assert health["truth/accuracy_in_P"] == pytest.approx((1 + 2 / 3) / 2)
    assert health["truth/accuracy_in_U"] == 0
    assert health["truth/candidate_coverage_in_P"] == pytest.approx(1.0)
    assert health["gmm/net1_mean_small"] == 0.1 and "gmm/net2_mean_small" not in health
    assert all(math.isfinite(value) for value in health.values())


def test_prototype_health_by_hand():
    # cosines of three pairs: 1/2 (60 degrees), 0 and 0; a class that was never seen does not count
    apart = np.array([[1, 0, 0], [0.5, math.sqrt(0.75), 0], [0, 0, 1], [0, 0, 0]])
    health = prototype_health(apart)
    assert health["prototypes/mean_cosine"] == pytest.approx(0.5 / 3)
    # eigenvalues of the matrix of cosines: 3/2, 1/2 and 1, as shares 1/2, 1/6 and 1/3
    shares = (1 / 2, 1 / 6, 1 / 3)
    assert health["prototypes/effective_rank"] == pytest.approx(math.exp(-sum(x * math.log(x) for x in shares)))
    collapsed = prototype_health(np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (4, 1)))
    assert collapsed == pytest.approx({"prototypes/mean_cosine": 1, "prototypes/effective_rank": 1}, abs=1e-5)
    assert prototype_health(np.eye(3)) == pytest.approx({"prototypes/mean_cosine": 0, "prototypes/effective_rank": 3})
    assert prototype_health(np.zeros((3, 2))) == prototype_health(np.array([[0.0, 1.0], [0.0, 0.0]])) == {}


def test_division_health_without_labels_says_nothing_about_truth():
    network = Predicted.of(np.log(np.full((2, 2), 0.5)))
    division = Division(np.ones(2), np.ones(2, dtype=bool))
    everything = np.ones((2, 2), dtype=bool)
    health = division_health([division] * 2, [network] * 2, everything, np.zeros(2, int), np.full(2, -1), ["a", "b"])
    assert not any(name.startswith("truth") for name in health)


def test_consensus_is_agreement_times_balance():
    sure = np.log(np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]]))
    of = lambda *tables: consensus([Predicted.of(log_p) for log_p in tables])  # noqa: E731
    assert of(sure, sure) == pytest.approx(1.0)  # all agree, both classes as often
    assert of(sure, sure[::-1]) == pytest.approx(0.0)
    other = sure.copy()
    other[0] = sure[1]
    balance = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7)) / math.log(2)  # mean of other: (0.3, 0.7)
    assert of(sure, other) == pytest.approx(0.75 * (1 + balance) / 2)
    collapsed = np.log(np.array([[1 - 1e-9, 1e-9]] * 4))
    assert of(collapsed, collapsed) < 1e-6  # they agree on everything, and it is worth nothing


def by_hand(probs, predictions, candidates):
    """Covering rate and approximated accuracy, image by image and class by class."""
    covered, mass = 0, 0.0
    for p, named, among in zip(probs, predictions, candidates):
        inside = sum(p[k] for k in range(len(p)) if among[k])
        covered += named >= 0 and bool(among[named])
        mass += sum(p[k] / inside for k in range(len(p)) if among[k] and k != named) if inside else 1.0
    return covered / len(probs), 1 - mass / len(probs)


def test_covering_rate_and_approximated_accuracy_against_loops():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(5), 200)
    candidates = rng.random((200, 5)) < 0.4
    candidates[np.arange(200), rng.integers(0, 5, 200)] = True
    for predictions in (probs.argmax(axis=1), rng.integers(0, 5, 200), rng.integers(-1, 5, 200)):
        rate, approximated = by_hand(probs, predictions, candidates)
        assert covering_rate(predictions, candidates) == pytest.approx(rate)
        shifted = np.log(probs) + rng.normal(size=(200, 1))  # logits are log probabilities up to a number a row
        assert approximated_accuracy(shifted, predictions, candidates) == pytest.approx(approximated)
        assert approximated <= rate
    assert 0.2 < rate < 0.9


def test_covering_where_there_is_nothing_to_judge():
    probs = np.array([[0.7, 0.3], [0.2, 0.8]])
    named, everything = probs.argmax(axis=1), np.ones((2, 2), dtype=bool)
    # full sets are covered by whatever one names
    assert covering_rate(named, everything) == 1.0
    assert approximated_accuracy(np.log(probs), named, everything) == pytest.approx(0.75)
    # one candidate each: the probability within the set is 1, or the prediction lies outside
    single = np.array([[True, False], [True, False]])
    assert covering_rate(named, single) == approximated_accuracy(np.log(probs), named, single) == 0.5
    nothing = np.full(2, -1)
    assert covering_rate(nothing, everything) == approximated_accuracy(np.log(probs), nothing, everything) == 0.0
    # probabilities that underflow: the prediction lies outside and counts nothing, and nothing is divided by 0
    sure = np.array([[0.0, -1e4], [0.0, -1e4]], dtype=np.float32)
    assert approximated_accuracy(sure, np.zeros(2, int), ~single) == 0.0
    assert approximated_accuracy(sure, np.zeros(2, int), everything) == 1.0


def test_scores_without_labels_leave_out_what_cannot_be_had():
    sets = {"train": np.eye(2, dtype=bool), "test": np.zeros((0, 2), dtype=bool)}
    named = {"train": np.array([0, 0]), "test": np.zeros(0, dtype=int)}
    assert label_free_scores(sets, named) == {"covering_rate": {"train": 0.5}}
    log_p = np.log(np.array([[0.9, 0.1], [0.4, 0.6]]))
    given = label_free_scores(sets, named, {"train": log_p, "test": np.zeros((0, 2))}, [log_p, log_p])
    assert given["approximated_accuracy"] == {"train": pytest.approx(0.5)}
    assert given["consensus"] == consensus([Predicted.of(log_p)] * 2)
    assert "consensus" not in label_free_scores(sets, named, networks=[log_p])


def test_collapse_is_put_into_words():
    names = ["ant", "bee", "cat", "dog"]
    assert collapse_warnings(np.arange(40) % 4, names) == []
    warnings = collapse_warnings(np.array([0] * 39 + [1]), names)
    # bee: 1 of 40 is a tenth of a share
    assert "3 of 4 classes are hardly ever predicted (bee, cat, dog)" not in warnings[0]
    assert warnings[0].startswith("2 of 4 classes") and "cat, dog" in warnings[0] and "called ant" in warnings[1]


def test_a_run_says_how_many_labels_are_known_and_which_folders_are_no_class():
    report = {"images": {"train": 80, "test": 20}, "labelled": {"train": 60, "test": 20}}
    assert known_labels_lines(report) == ["Labels are known for 60 of 80 train images and 20 of 20 test images."]
    report |= {"labelled": {"train": 0, "test": 0}, "unmatched_folders": ["'cats' (3 images, did you mean 'cat'?)"]}
    assert known_labels_lines(report) == ["Called like no class: 'cats' (3 images, did you mean 'cat'?)."]
    assert known_labels_lines({"images": {"train": 80}}) == []  # of an earlier version


def test_mean_confidence_is_of_what_is_predicted():
    logits = np.log([[0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.1, 0.1, 0.8]])
    assert mean_confidence(logits, np.array([0, 1, 2])) == pytest.approx((0.7 + 0.5 + 0.8) / 3)
    assert mean_confidence(logits + 9, np.array([1, -1, 2])) == pytest.approx((0.2 + 0.8) / 3)


def test_an_estimate_reaches_beyond_all_of_its_scores():
    made = estimate({"confidence": 0.6, "consensus": 0.95, "approximated_accuracy": 0.7})
    assert made["accuracy"] == 0.7 and made["interval"] == [pytest.approx(0.5), 1.0]
    assert estimate({"confidence": 0.04, "consensus": 0.02})["interval"] == [0.0, pytest.approx(0.14)]
    assert estimate({"confidence": 0.6}) is None
    assert estimate_lines({}) == []


@pytest.mark.parametrize(
    "covering, agreement, picked",
    [
        ([0.5], [0.0], 0),
        ([0.8, 0.59, 0.61], [0.5, 0.99, 0.7], 2),  # the second covers less than three quarters of 0.8
        ([0.8, 0.6], [0.5, 0.7], 1),  # three quarters are enough
        ([0.9, 0.9, 0.7], [0.8, 0.8, 0.8], 0),  # the first of several
        ([0.0, 0.0], [0.1, 0.2], 1),
    ],
)
def test_the_largest_consensus_is_picked_of_the_runs_that_cover_enough(covering, agreement, picked):
    assert pick(covering, agreement) == picked
