"""Annotators of the same images side by side: estimates without labels, the recommendation, weights of a merge."""

import numpy as np
import pytest
from PIL import Image
from runs import error_of, write_store

from coreg.annotate.compared import compare, recommendation
from coreg.annotate.tools import main
from coreg.data.sources import open_images
from coreg.store.store import AnnotationStore
from coreg.weak.annotators import estimated_accuracies, weights_of

NAMES, N = ["a", "b", "c", "d"], 400


def drawn(accuracies, seed=0, separable=3.0):
    """Labels, features that tell classes apart, and evidence of annotators that err independently."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, N)
    features = separable * np.eye(4, 16)[labels] + rng.normal(size=(N, 16))
    tables = []
    for accuracy in accuracies:
        wrong = rng.random(N) > accuracy
        named = np.where(wrong, (labels + rng.integers(1, 4, N)) % 4, labels)
        tables.append((0.1 + 0.6 * np.eye(4)[named]).astype(np.float32))
    return labels, features.astype(np.float32), tables


def test_accuracies_are_estimated_without_a_label():
    labels, features, tables = drawn([0.9, 0.6, 0.75])
    right = [float((table.argmax(axis=1) == labels).mean()) for table in tables]
    estimated = estimated_accuracies(features, tables, np.arange(N))
    assert np.abs(estimated - right).max() < 0.06
    assert list(np.argsort(estimated)) == list(np.argsort(right))


def test_features_that_tell_nothing_apart_estimate_nothing():
    _, features, tables = drawn([0.9, 0.6], separable=0.0)
    assert estimated_accuracies(features, tables, np.arange(N)) is None


def test_an_annotator_that_cannot_judge_is_judged_by_the_other():
    labels, features, tables = drawn([0.9, 0.25])  # the second one guesses: its referees agree on nothing
    estimated = estimated_accuracies(features, tables, np.arange(N))
    assert abs(estimated[1] - (tables[1].argmax(axis=1) == labels).mean()) < 0.08
    assert 0.8 < estimated[0] <= 1  # by its own referees alone


def test_weights_are_those_of_bayes_rule():
    # one of four classes: two annotators of accuracy a name c and d; log odds of c against d are log(3a / (1 - a)) each
    a = np.array([0.9, 0.6, 0.25, 0.1])
    weights = weights_of(a, 4)
    expected = np.array([np.log(27), np.log(4.5), 0, 0])
    assert np.allclose(weights, expected / expected.mean())
    assert weights_of(np.array([0.2, 0.25]), 4).tolist() == [1, 1]
    assert np.isfinite(weights_of(np.array([1.0, 0.5]), 4)).all()


# ---- stores ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three stores of the same images: one annotator of 0.9 with features, one of 0.6, and that of 0.9 again."""
    root = tmp_path_factory.mktemp("compared")
    labels, features, tables = drawn([0.9, 0.6])
    lines = ["path,label"]
    for number, label in enumerate(labels):
        Image.new("RGB", (2, 2)).save(root / f"{number:03d}.png")
        lines.append(f"{number:03d}.png,{NAMES[label]}")
    (root / "labels.csv").write_text("\n".join(lines))
    (root / "images.csv").write_text("\n".join(["path", *(line.partition(",")[0] for line in lines[1:])]))
    for spec, table, images in (
        ("good", 0, "labels"),
        ("poor", 1, "labels"),
        ("unlabelled", 0, "images"),
        ("other", 1, "images"),
    ):
        opened = open_images(str(root / f"{images}.csv"), NAMES)
        tensors = {
            "votes": tables[table].argmax(axis=1)[:, None].astype(np.int16),
            "probs": tables[table].astype(np.float16),
        }
        tensors |= {"features": features.astype(np.float16)} if spec in ("good", "unlabelled") else {}
        write_store(root / spec, opened, NAMES, [f"{spec} {{}}"], tensors, spec=spec)
    return root, labels, tables


def test_two_stores_are_compared_cell_by_cell(place):
    root, labels, tables = place
    made = compare([AnnotationStore.open(root / name) for name in ("good", "poor")])
    a, b = (table.argmax(axis=1) for table in tables)
    assert made.same.tolist() == [[1.0, (a == b).mean()], [(a == b).mean(), 1.0]]
    assert np.array_equal(made.covers, made.same)  # one template: the candidate is the class
    assert made.right == [(a == labels).sum(), (b == labels).sum()] and made.labelled == N
    assert made.candidates == [1.0, 1.0] and made.never == [[], []]
    assert recommendation(made).startswith(f"Take {root / 'good'}: it is right on") and "are apart" in recommendation(made)


def test_without_labels_the_estimate_decides_and_says_so(place, tmp_path, capsys):
    root, *_ = place
    words = ["compare", str(root / "unlabelled"), str(root / "other"), "--output", str(tmp_path / "page.html")]
    main(words)
    printed = capsys.readouterr().out
    assert f"Take {root / 'unlabelled'}, or merge with --weights agreement" in printed and "No label was used." in printed
    page = (tmp_path / "page.html").read_text()
    assert "<h1>Annotators compared</h1>" in page and str(root / "other") in page


def test_equal_annotators_are_merged(place):
    root, *_ = place
    made = compare([AnnotationStore.open(root / name) for name in ("unlabelled", "unlabelled")])
    assert recommendation(made).startswith("Merge them:")


def test_a_merge_by_agreement_weighs_probabilities_and_keeps_votes(place, tmp_path, capsys):
    root, _, tables = place
    words = ["merge", str(root / "unlabelled"), str(root / "other"), "--output_dir", str(tmp_path / "both")]
    main([*words, "--weights", "agreement"])
    made = compare([AnnotationStore.open(root / name) for name in ("unlabelled", "other")])
    w = weights_of(made.estimated, 4)
    both = AnnotationStore.open(tmp_path / "both")
    halves = [table.astype(np.float16).astype(np.float64) for table in tables]
    assert np.allclose(both.probs(), (w[0] * halves[0] + w[1] * halves[1]) / w.sum(), atol=1e-3)
    assert np.array_equal(both.votes(), np.stack([table.argmax(axis=1) for table in tables], axis=1))
    assert f"weighed {w[0]:.2f} : {w[1]:.2f}" in capsys.readouterr().out
    # where the two differ, the better one decides
    assert (both.probs().argmax(axis=1) == tables[0].argmax(axis=1)).all()


def test_stores_that_cannot_be_compared_are_one_line(place):
    root, *_ = place
    good = AnnotationStore.open(root / "good")
    assert "compare needs two stores" in error_of(compare, [good])
    images = open_images(str(root / "labels.csv"), [*NAMES, "e"])
    tensors = {"votes": good.votes(), "probs": np.full((N, 5), 0.2, dtype=np.float16)}
    more_classes = write_store(root / "five", images, [*NAMES, "e"], ["{}"], tensors)
    assert "has other images or class names" in error_of(compare, [good, more_classes])
