"""Metrics of several labels an image, against public code, scikit-learn and loops by hand."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, precision_score, recall_score

from coreg.report.multi_metrics import (
    at_top,
    average_precisions,
    best_threshold,
    measure_labels,
    of_predictions,
    threshold_of_count,
    thresholds,
    thresholds_of_truth,
)

PUBLIC = np.load(Path(__file__).parent / "reference" / "spml_map.npz")
TRUTH = (2 * PUBLIC["labels"] - 1).astype(np.int8)


def drawn(seed=0, n=60, labels=7):
    """Scores with ties, and truth with an image without labels."""
    generator = np.random.default_rng(seed)
    truth = np.where(generator.random((n, labels)) < 0.3, 1, -1).astype(np.int8)
    truth[0] = -1
    return np.round(generator.random((n, labels)) * 0.6 + 0.2 * (truth > 0), 1), truth


# ---- ranking --------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_public_code():
    """A label without images counts 0 and stays in the mean; one column has ties."""
    average = average_precisions(PUBLIC["scores"], TRUTH)
    np.testing.assert_allclose(average, PUBLIC["average_precision"], atol=1e-12)
    result = measure_labels(PUBLIC["scores"], TRUTH, 0.5)
    assert 100 * result["mAP"] == pytest.approx(float(PUBLIC["map"]), abs=1e-12)
    for k in (1, 3, 5):
        for ours, theirs in (("precision", "prec_at"), ("recall", "rec_at"), ("hit", "top")):
            assert result[f"{ours}_at_{k}"] == pytest.approx(float(PUBLIC[f"{theirs}_{k}"]), abs=1e-12)


def test_a_label_without_images_is_visible():
    result = measure_labels(PUBLIC["scores"], TRUTH, 0.5)
    assert result["labels_without_images"] == 1 and result["average_precision"][8] is None
    assert result["mAP_of_the_others"] == pytest.approx(result["mAP"] * 9 / 8)
    assert "mAP_of_the_others" not in measure_labels(PUBLIC["scores"][:, :8], TRUTH[:, :8], 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_that_of_scikit_learn(seed):
    scores, truth = drawn(seed)
    expected = [average_precision_score(truth[:, label] > 0, scores[:, label]) for label in range(truth.shape[1])]
    np.testing.assert_allclose(average_precisions(scores, truth), expected, atol=1e-12)


def test_unknown_cells_do_not_count():
    scores, truth = drawn()
    hidden = np.random.default_rng(9).random(truth.shape) < 0.3
    partly = np.where(hidden, 0, truth)
    for label, value in enumerate(average_precisions(scores, partly)):
        rows = ~hidden[:, label]
        assert value == pytest.approx(average_precision_score(truth[rows, label] > 0, scores[rows, label]), abs=1e-12)
    predicted = scores >= 0.5
    values = of_predictions(predicted, partly)
    assert values["OP"] == pytest.approx(precision_score(truth[~hidden] > 0, predicted[~hidden]))
    assert values["OR"] == pytest.approx(recall_score(truth[~hidden] > 0, predicted[~hidden]))
    whole = (partly != 0).all(axis=1)
    assert at_top(scores, partly, 3) == at_top(scores[whole], truth[whole], 3)


def test_saturated_probabilities_are_to_be_float64():
    """What the docstring warns of: in float32 these two are equal, and the order is lost."""
    logits = np.array([[20.0], [21.0]])
    truth = np.array([[-1], [1]], dtype=np.int8)
    assert average_precisions(1 / (1 + np.exp(-logits)), truth)[0] == 1
    assert average_precisions((1 / (1 + np.exp(-logits))).astype(np.float32), truth)[0] == 0.5


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_top_labels_of_an_image_by_hand(k):
    truth = drawn(4)[1]
    scores = np.random.default_rng(4).random(truth.shape)
    hits, recalls = [], []
    for score, labels in zip(scores, truth):
        top = sorted(range(len(score)), key=lambda label: score[label])[-k:]
        hits.append(sum(labels[label] > 0 for label in top))
        if (labels > 0).any():
            recalls.append(hits[-1] / (labels > 0).sum())
    result = at_top(scores, truth, k)
    assert result["precision"] == pytest.approx(np.mean(hits) / k)
    assert result["recall"] == pytest.approx(np.mean(recalls))
    assert result["hit"] == pytest.approx(np.mean(np.array(hits) > 0))


def test_degenerate_truth():
    scores = np.array([[0.3, 0.7], [0.6, 0.1]])
    nothing = measure_labels(scores, np.full((2, 2), -1, dtype=np.int8), 0.5)
    assert nothing["mAP"] == 0 and nothing["labels_without_images"] == 2 and "recall_at_1" not in nothing
    unknown = measure_labels(scores, np.zeros((2, 2), dtype=np.int8), 0.5)
    assert unknown["mAP"] == 0 and unknown["OF1"] == 0 and "precision_at_1" not in unknown
    everything = measure_labels(scores, np.ones((2, 2), dtype=np.int8), 0.0)
    assert everything["mAP"] == everything["OF1"] == everything["CF1"] == everything["example_F1"] == 1
    # one image, one label; the public code would ask for three labels of one
    assert measure_labels(scores[:1, :1], np.ones((1, 1), dtype=np.int8), 0.5).keys().isdisjoint({"precision_at_3"})


# ---- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_precision_recall_and_f1_are_those_of_scikit_learn(seed):
    scores, truth = drawn(seed)
    predicted, present = scores >= 0.6, truth > 0
    predicted[:, 2] = False
    values = of_predictions(predicted, truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for letter, average in (("C", "macro"), ("O", "micro")):
            precision = precision_score(present, predicted, average=average, zero_division=0)
            recall = recall_score(present, predicted, average=average, zero_division=0)
            assert values[f"{letter}P"] == pytest.approx(precision)
            assert values[f"{letter}R"] == pytest.approx(recall)
            assert values[f"{letter}F1"] == pytest.approx(2 * precision * recall / (precision + recall))
        assert values["OF1"] == pytest.approx(f1_score(present, predicted, average="micro"))
        assert values["example_F1"] == pytest.approx(f1_score(present, predicted, average="samples", zero_division=1))


# ---- thresholds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_has_a_larger_f1_than_that_of_validation_labels(seed):
    scores, truth = drawn(seed)
    each = thresholds(scores, truth)
    for label, threshold in enumerate(each):
        present = truth[:, label] > 0
        best = max(f1_score(present, scores[:, label] >= at) for at in np.unique(scores[:, label]))
        assert f1_score(present, scores[:, label] >= threshold) == pytest.approx(best)
    together = thresholds(scores, truth, per_label=False)
    assert len(set(together)) == 1
    best = max(of_predictions(scores >= at, truth)["OF1"] for at in np.unique(scores))
    assert of_predictions(scores >= together, truth)["OF1"] == pytest.approx(best)


def test_without_labels_the_expected_f1_decides():
    """Over all sets of the k most probable labels, drawn from the probabilities themselves."""
    probabilities = np.array([0.9, 0.1, 0.6, 0.35, 0.2, 0.05])
    ordered = np.sort(probabilities)[::-1]
    values = [2 * ordered[:k].sum() / (k + ordered.sum()) for k in range(1, 7)]
    k = int(np.argmax(values)) + 1
    threshold = best_threshold(probabilities, probabilities)
    assert (probabilities >= threshold).sum() == k == 2
    assert threshold == pytest.approx((0.6 + 0.35) / 2)
    # calibrated and rare: a threshold of 0.5 would predict nothing, the best one is half of the best F1
    rare = np.linspace(0.0, 0.4, 1001)
    at = best_threshold(rare, rare)
    assert at == pytest.approx(rare[rare >= at].sum() / ((rare >= at).sum() + rare.sum()), abs=1e-3)


def test_a_label_that_no_known_image_has_keeps_another_threshold():
    scores, truth = drawn()
    truth[:, 2] = np.where(truth[:, 2] > 0, 0, truth[:, 2])  # absent or unknown
    at = thresholds_of_truth(scores, truth, np.full(7, 0.123))
    assert at[2] == 0.123
    others = [0, 1, 3, 4, 5, 6]
    np.testing.assert_array_equal(at[others], thresholds(scores, truth)[others])
    # a label that is present wherever it is known says nothing of what it costs to name it
    truth[:, 3] = np.where(truth[:, 3] > 0, 1, 0)
    assert thresholds_of_truth(scores, truth, np.full(7, 0.123))[3] == 0.123


def test_one_threshold_gives_as_many_labels_as_expected():
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.3, 0.2]])
    # 1.5 labels an image are three cells: 0.9, 0.8 and 0.5, and the next is 0.3
    assert threshold_of_count(scores, 1.5) == pytest.approx(0.4)
    assert threshold_of_count(scores, 1.9) == pytest.approx(0.25)  # 3.8 of them are nearest to four
    # the order alone counts: another scale, the same cells
    np.testing.assert_array_equal(scores**9 >= threshold_of_count(scores**9, 1.5), scores >= 0.4)
    assert (scores >= threshold_of_count(scores, 3)).all() and (scores >= threshold_of_count(scores, 99)).all()
    assert not (scores >= threshold_of_count(scores, 0)).any() and not (scores >= threshold_of_count(scores, 0.2)).any()
    # equal scores are never parted: two or none of these are nearest to one
    tied = np.array([[0.7, 0.7], [0.2, 0.1]])
    assert (tied >= threshold_of_count(tied, 0.75)).sum() == 2 and not (tied >= threshold_of_count(tied, 0.4)).any()
    assert np.isfinite(threshold_of_count(np.zeros((0, 3)), 1.0))


def test_thresholds_in_degenerate_cases():
    scores = np.array([0.2, 0.7, 0.7, 0.4])
    assert not (scores >= best_threshold(scores, np.zeros(4))).any()
    assert (scores >= best_threshold(scores, np.ones(4))).all()
    # equal scores are never parted
    assert (scores >= best_threshold(scores, np.array([0, 1, 0, 0]))).tolist() == [False, True, True, False]
    assert np.isfinite(best_threshold(np.zeros(0), np.zeros(0)))
    # between neighbouring numbers there is nothing to stand half-way
    close = np.array([0.5, np.nextafter(0.5, 1)])
    assert (close >= best_threshold(close, np.array([0, 1]))).tolist() == [False, True]
    unknown = np.array([[1], [0], [-1], [-1]], dtype=np.int8)
    assert thresholds(np.array([[0.9], [0.99], [0.1], [0.2]]), unknown)[0] == pytest.approx(0.55)
