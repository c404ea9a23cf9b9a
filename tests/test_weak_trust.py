"""Whom to trust without labels: against the rule written out by hand, and on worlds whose truth is known."""

import math

import numpy as np
import pytest

from coreg.weak.mixture import Setting, fit_mixture, fit_projection
from coreg.weak.refine import foretold
from coreg.weak.trust import (
    agreements,
    beyond_chance,
    doubted,
    most_trusted,
    own_fit,
    referees_in_turn,
    referees_of_others,
    surest,
    verdict,
    view_fit,
)

HALF = Setting(0.5, "uniform")


def world(n=450, classes=4, width=6, spread=0.5, right=0.6, seed=0):
    """Clusters, and evidence that is right for a share of the images and otherwise names any class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    features = 2 * np.eye(classes, width)[labels] + spread * rng.normal(size=(n, width))
    named = np.where(rng.random(n) < right, labels, rng.integers(0, classes, n))
    return features, 0.8 * np.eye(classes)[named] + 0.2 / classes, labels


def noisy(labels, right, classes, seed):
    """A classifier that is right independently of all others."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(labels)) < right, labels, (labels + rng.integers(1, classes, len(labels))) % classes)


def by_hand(referees, annotator, student, classes, refined):
    """The rule of docs/method.md, image by image."""
    n = len(annotator)
    a = [sum(r[i] == annotator[i] for r in referees) / 2 for i in range(n)]
    s = [sum(r[i] == student[i] for r in referees) / 2 for i in range(n)]
    r = [float(referees[0][i] == referees[1][i]) for i in range(n)]
    a, s, r = ([(classes * x - 1) / (classes - 1) for x in part] for part in (a, s, r))
    mean = {name: sum(part) / n for name, part in (("a", a), ("s", s), ("r", r))}
    if mean["r"] < 0.5:
        return "annotator"

    if mean["s"] > mean["r"]:
        s, mean["s"] = r, mean["r"]

    def clear(value, parts):
        middle = sum(parts) / n
        return value > 2 * math.sqrt(sum((p - middle) ** 2 for p in parts) / n / n)

    # accuracy s or r against a / r, multiplied by r; the error by the product rule
    student_ahead = clear(mean["s"] * mean["r"] - mean["a"], [s[i] * mean["r"] + mean["s"] * r[i] - a[i] for i in range(n)])
    view_ahead = clear(mean["r"] ** 2 - mean["a"], [2 * r[i] * mean["r"] - a[i] for i in range(n)])
    if student_ahead and view_ahead:
        if not clear(mean["r"] - mean["s"], [r[i] - s[i] for i in range(n)]):
            return "student"
        of_student = sum(referee[i] != student[i] for referee in referees for i in range(n))
        of_each_other = 2 * sum(referees[0][i] != referees[1][i] for i in range(n))
        return "student" if refined and of_student <= 2 * of_each_other else "view"
    return "student" if student_ahead else "view" if view_ahead else "annotator"


@pytest.mark.parametrize("refined", [False, True])
def test_the_rule_is_what_is_written_down(refined):
    met = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        classes = int(rng.integers(2, 6))
        labels = rng.integers(0, classes, 150)
        right = rng.uniform([0.6, 0.6, 0.2, 0.6], 1)
        first, second, annotator, student = (noisy(labels, p, classes, 10 * seed + k) for k, p in enumerate(right))
        both = np.where(rng.random(150) < 0.5, first, second), np.where(rng.random(150) < 0.5, first, second)
        answer = most_trusted(np.stack(both), annotator, student, classes, refined)
        assert answer == by_hand(both, annotator, student, classes, refined)
        met.add(answer)
    assert met == {"annotator", "student", "view"}


def test_agreement_of_independent_classifiers_is_the_product_of_their_accuracies():
    classes, n = 5, 200_000
    labels = np.random.default_rng(0).integers(0, classes, n)
    one, two = noisy(labels, 0.8, classes, 1), noisy(labels, 0.6, classes, 2)
    p, q = (beyond_chance(accuracy, classes) for accuracy in (0.8, 0.6))
    assert beyond_chance(np.mean(one == two), classes) == pytest.approx(p * q, abs=0.01)
    assert beyond_chance(1 / classes, classes) == pytest.approx(0) and beyond_chance(1.0, classes) == 1


def test_agreements_are_counted():
    referees = np.array([[0, 1, 2, 0], [0, 1, 1, 1]])
    shares = agreements(referees, np.array([0, 1, 0, 1]), np.array([0, 0, 2, 0]))
    assert shares == {"annotator": (2 / 4 + 3 / 4) / 2, "student": (3 / 4 + 1 / 4) / 2, "view": 2 / 4}
    assert "student" not in agreements(referees, referees[0])


def test_known_truth_is_found():
    """An annotator that is right in 60 % and clusters that are apart: the view, or a student as good as it."""
    features, probs, labels = world(spread=0.9)
    train, test = np.arange(300), np.arange(300, 450)
    of = {"train": features[train], "test": features[test]}, {"train": probs[train], "test": probs[test]}
    judged = {right: verdict(*of, train, noisy(labels[test], right, 4, 5), refined=True) for right in (0.99, 0.85, 0.3)}
    assert [one["most"] for one in judged.values()] == ["student", "view", "view"]
    agreement = judged[0.99]["agreement"]
    # an annotator that is right in 0.6 + 0.4 / 4, and referees in about nine tenths
    assert agreement["view"] > 0.85 and agreement["annotator"] == pytest.approx(0.64, abs=0.08)
    assert judged[0.99]["images"] == 150 and not judged[0.99]["fit"]["hopeless"]
    # without test images the training images are judged by referees that have not seen them
    own = verdict({"train": features}, {"train": probs}, np.arange(450), noisy(labels, 0.99, 4, 5), refined=True)
    assert own["most"] == "student" and own["images"] == 450
    assert own["agreement"]["annotator"] == pytest.approx(0.64, abs=0.08)


@pytest.mark.parametrize("right", [0.98, 0.5])
def test_a_view_that_knows_nothing_leaves_the_annotator(right):
    features, probs, labels = world(right=right)
    features = np.random.default_rng(3).normal(size=features.shape)
    fit = verdict({"train": features}, {"train": probs}, np.arange(450), labels, refined=True)
    assert fit["fit"]["hopeless"] and fit["most"] == "annotator"


def test_an_annotator_that_is_better_than_what_features_can_show():
    features, probs, labels = world(n=450, width=20, spread=1.5, right=0.97)
    train, test = np.arange(300), np.arange(300, 450)
    of = {"train": features[train], "test": features[test]}, {"train": probs[train], "test": probs[test]}
    student = fit_mixture(features[train], probs[train], HALF).of_view(features[test]).argmax(axis=1)
    assert 0.4 < np.mean(student == labels[test]) < 0.75
    answer = verdict(*of, train, student, refined=False)
    # the student reads the features that its referees read, and agrees with them more than the annotator does
    assert answer["agreement"]["student"] > answer["agreement"]["annotator"] + 0.1
    assert not answer["fit"]["hopeless"] and answer["most"] == "annotator"


def test_the_surest_are_a_quarter_and_their_equals():
    probs = np.array([[0.6, 0.4], [0.1, 0.9], [0.5, 0.5], [0.7, 0.3], [0.2, 0.8], [0.3, 0.7], [0.35, 0.65], [0.45, 0.55]])
    assert surest(probs).nonzero()[0].tolist() == [1, 4]
    probs[3] = [0.8, 0.2]
    assert surest(probs).nonzero()[0].tolist() == [1, 3, 4]
    assert surest(np.full((5, 3), 1 / 3)).all() and surest(probs[:1]).all()


def test_referees_that_contradict_an_annotator_where_it_is_surest_are_doubted():
    named = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    sure = np.arange(8) < 4
    referees = np.stack([named, named])
    referees[:, 4:] = 0  # elsewhere they may contradict it
    assert not doubted(referees, named, sure, 3)
    referees[:, 0] = 1  # of four, three: (3 x 0.75 - 1) / 2 = 0.625 of 1
    assert doubted(referees, named, sure, 3)
    # as often as it is right by referees that agree with each other no more often
    assert not doubted(np.stack([referees[0], [0, 1, 2, 1, 0, 0, 0, 0]]), named, sure, 3)
    assert not doubted(referees, named, np.ones(8, dtype=bool), 3)  # it is as sure of all


@pytest.mark.parametrize("right", [0.3, 0.6])
def test_features_that_confuse_classes_are_not_taken_for_better_than_a_fair_annotator(right):
    """Two clusters of three classes each: both halves of the evidence give the same wrong classes to an image."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 6, 1200)
    features = 4 * np.eye(2, 5)[labels // 3] + 0.2 * np.eye(5)[2 + labels % 3] + 0.3 * rng.normal(size=(1200, 5))
    certain = rng.random(1200)
    named = np.where(rng.random(1200) < right + (1 - right) * certain, labels, rng.integers(0, 6, 1200))
    probs = np.eye(6)[named] * (0.3 + 0.6 * certain)[:, None] + (0.7 - 0.6 * certain)[:, None] / 6
    train, test = np.arange(800), np.arange(800, 1200)
    of = {"train": features[train], "test": features[test]}, {"train": probs[train], "test": probs[test]}
    project = fit_projection(features[train], 6)
    z = project(features[train])
    referees = referees_of_others(z, probs[train], HALF, train, project(features[test]))
    truth = [np.mean(classes == labels[test]) for classes in (named[test], *referees)]
    assert truth[0] > max(truth[1:]) + 0.02
    answer = verdict(*of, train, referees[0], refined=False)
    assert answer["doubted"] and answer["most"] == "annotator"
    # they agree with each other so often that the annotator would not be
    assert most_trusted(referees, named[test], referees[0], 6, refined=False) == "student"
    fit = view_fit(z, probs[train], HALF, train)
    assert not fit["mends"] and fit["itself"] > fit["annotator"] + 0.1


def test_shuffled_evidence_is_the_measure():
    features, probs, _ = world(n=400)
    ids = np.arange(400) + 7
    z = fit_projection(features, 4)(features)
    fit = own_fit(z, probs, HALF, ids)
    assert fit.score - fit.shuffled > 10 * fit.error and not fit.hopeless
    # the score is that by which settings are chosen, over other folds of the same size
    assert fit.score == pytest.approx(foretold(z, probs, HALF, ids % 5), abs=0.02)
    anew = probs[np.random.default_rng(0).permutation(400)]
    assert fit.shuffled == pytest.approx(foretold(z, anew, HALF, ids % 5), abs=0.05)
    # noise and a view come out differently, whatever the annotator is like
    hopeless = [own_fit(np.random.default_rng(s).normal(size=z.shape), probs, HALF, ids).hopeless for s in range(8)]
    assert np.mean(hopeless) >= 0.75
    few = own_fit(np.random.default_rng(0).normal(size=(30, 3)), probs[:30], HALF, ids[:30])
    assert not few.enough and not few.hopeless


def test_a_referee_has_not_had_the_evidence_that_it_judges():
    """Evidence by which every image is a class of its own cannot be repeated by who has not had it."""
    rng = np.random.default_rng(0)
    z, ids = rng.normal(size=(90, 60)), np.arange(90)
    named = np.arange(90) % 3
    probs = np.eye(3)[named]
    setting = Setting(1.0, "estimated")
    fitted = fit_mixture(z, probs, setting).of_view(z).argmax(axis=1)
    assert np.mean(fitted == named) > 0.7  # learned by heart
    turn = referees_in_turn(z, probs, setting, ids)
    assert turn.shape == (2, 90) and np.mean(turn == named) < 0.5
    # of each image's evidence neither referee knows anything: changing it changes nothing they say of it
    for row in (0, 41):
        other = probs.copy()
        other[row] = np.roll(other[row], 1)
        np.testing.assert_array_equal(referees_in_turn(z, other, setting, ids)[:, row], turn[:, row])
    # two referees of other images are fitted to images of which no one is the other's
    first, second = referees_of_others(z, probs, setting, ids, z)
    right = [first == named, second == named]
    assert (right[0] & right[1]).mean() < 0.75 and (right[0] | right[1]).mean() > 0.85


@pytest.mark.parametrize("n", [3, 4, 7])
def test_few_images(n):
    features, probs, labels = world(n=n, classes=2, width=3)
    answer = verdict({"train": features}, {"train": probs}, np.arange(n), labels, refined=False)
    assert answer["most"] in ("annotator", "student", "view") and np.isfinite(list(answer["agreement"].values())).all()
    assert view_fit(features, probs, HALF, np.arange(n))["hopeless"] is False
    assert view_fit(features[:2], probs[:2], HALF, np.arange(2)) is None


def test_images_do_not_depend_on_their_order():
    features, probs, _ = world(n=200)
    ids, order = np.arange(200) * 3, np.random.default_rng(1).permutation(200)
    z = fit_projection(features, 4)(features)
    np.testing.assert_array_equal(
        referees_in_turn(z, probs, HALF, ids)[:, order], referees_in_turn(z[order], probs[order], HALF, ids[order])
    )
    one, two = own_fit(z, probs, HALF, ids), own_fit(z[order], probs[order], HALF, ids[order])
    assert (one.score, one.shuffled, one.error) == pytest.approx((two.score, two.shuffled, two.error), abs=1e-9)
