"""The pre-filter: against public code and loops, what becomes of samples without a candidate, and runs that use it."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import as_votes, refused, script

import train_coreg
from coreg.errors import UserError
from coreg.run.job import annotators_store
from coreg.store.store import AnnotationStore
from coreg.weak.__main__ import main as draw
from coreg.weak.labels import WeakLabels
from coreg.weak.prefilter import conformal_threshold, likely_classes, parse_prefilter

NUMBERS = Path(__file__).parent / "reference" / "prefilter.npz"
UNKNOWN = np.full(40, -1)


def weak_of(table, truth=None, certain=(), unusable=()):
    n = len(table)
    every = np.arange(n)
    truth = np.full(n, -1) if truth is None else truth
    return WeakLabels(table, 100 + every, np.isin(every, certain), ~np.isin(every, unusable), truth, {"generator": "x"})


def probabilities(n=40, classes=7, seed=0):
    logits = np.random.default_rng(seed).normal(size=(n, classes)) * 2
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def test_half_of_the_classes_is_what_public_code_keeps():
    numbers = np.load(NUMBERS)
    for spec in ("topk", "topk:3"):
        weak = weak_of(numbers["candidates"].astype(bool), numbers["labels"])
        rest = weak.keep_likely(numbers["zero_shot_logits"], spec)
        assert (rest.table == numbers["filtered"]).all()
        assert (rest.samples == 100 + numbers["kept_rows"]).all() and (rest.truth == numbers["kept_labels"]).all()
        covered = [
            np.mean([table[i, label] for i, label in enumerate(labels)])
            for table, labels in ((weak.table, weak.truth), (numbers["filtered"], numbers["kept_labels"]))
        ]
        assert rest.source == {
            "generator": "x",
            "prefilter": {
                "rule": spec,
                "images": 40,
                "dropped": 5,
                "mean_candidates": {"before": weak.table.sum() / 40, "after": numbers["filtered"].sum() / 35},
                "partial_accuracy": {"before": pytest.approx(covered[0]), "after": pytest.approx(covered[1])},
            },
        }


def test_the_largest_mass_by_a_loop():
    probs = probabilities()
    kept = likely_classes(probs, "mass:0.8", UNKNOWN)
    for row, chosen in zip(probs, kept):
        order, total = sorted(range(7), key=lambda c: -row[c]), 0.0
        wanted = []
        while total < 0.8:
            wanted.append(order[len(wanted)])
            total += row[wanted[-1]]
        assert np.flatnonzero(chosen).tolist() == sorted(wanted)
    assert likely_classes(probs, "mass:1", UNKNOWN).all()
    assert (likely_classes(probs, "mass:0.0001", UNKNOWN).sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    ("known", "alpha", "rank"), [(9, 0.1, 9), (9, 0.5, 5), (19, 0.1, 18), (9, 0.05, None), (1, 0.5, 1)]
)
def test_the_conformal_threshold_is_an_order_statistic(known, alpha, rank):
    probs, labels = probabilities(), np.random.default_rng(1).integers(0, 7, 40)
    labels[known:] = -1
    ranked = sorted((probs[i, labels[i]] for i in range(known)), reverse=True)
    assert conformal_threshold(probs, labels, alpha) == (0 if rank is None else ranked[rank - 1])
    kept = likely_classes(probs, f"conformal:{alpha}", labels)
    assert (kept == (probs >= (0 if rank is None else ranked[rank - 1]))).all()
    if rank is None:
        assert kept.all()


def test_conformal_sets_hold_the_truth_as_often_as_promised():
    rng, covered = np.random.default_rng(0), []
    for seed in range(100):
        probs = probabilities(100, 5, seed)
        labels = np.array([rng.choice(5, p=row) for row in probs])
        known = np.where(np.arange(100) < 50, labels, -1)
        kept = likely_classes(probs, "conformal:0.2", known)
        covered.append(kept[np.arange(50, 100), labels[50:]].mean())
    # 1 - A at least, and 1 / (n + 1) more at most
    assert 0.8 - 0.01 < np.mean(covered) < 0.8 + 1 / 51 + 0.01


def test_what_a_person_gave_and_what_says_nothing_stays():
    table = np.ones((4, 3), dtype=bool)
    table[0] = [True, False, False]
    table[1] = [True, False, False]
    probs = np.array([[0.1, 0.2, 0.7]] * 4)
    rest = weak_of(table, certain=[0], unusable=[2]).keep_likely(probs, "topk:1")
    assert rest.samples.tolist() == [100, 102, 103]  # the second lost its only candidate
    assert rest.table.tolist() == [[True, False, False], [True] * 3, [False, False, True]]
    assert rest.certain.tolist() == [True, False, False] and rest.usable.tolist() == [True, False, True]
    assert rest.source["prefilter"]["partial_accuracy"] == {"before": None, "after": None}
    alone = np.eye(3, dtype=bool)[[0, 0, 2]]
    with pytest.raises(UserError, match="leaves 1 of 3 images a candidate"):
        weak_of(alone).keep_likely(probs[:3], "topk:1")
    assert (weak_of(alone).keep_likely(probs[:3], "topk:9").table == alone).all()
    two = weak_of(np.ones((2, 2), dtype=bool)).keep_likely(np.array([[0.4, 0.6], [0.5, 0.5]]), "topk")
    assert two.table.tolist() == [[False, True], [True, False]]  # the first of two that are equally probable


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("half", "unknown --prefilter half; write one of none, topk"),
        ("none:1", "unknown"),
        ("topk:0", "whole number from 1 on"),
        ("topk:1.5", "whole number from 1 on"),
        ("topk:", "whole number from 1 on"),
        ("mass", "above 0 and up to 1"),
        ("mass:nan", "above 0 and up to 1"),
        ("mass:1.1", "above 0 and up to 1"),
        ("conformal:1", "above 0 and below 1"),
        ("conformal:0", "above 0 and below 1"),
    ],
)
def test_other_spellings_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        parse_prefilter(spec)


def test_conformal_needs_labels():
    with pytest.raises(UserError, match="--labels FILE or --few_shot N"):
        likely_classes(probabilities(), "conformal:0.1", UNKNOWN)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_annotator(small_store, tmp_path_factory):
    """What another annotator would say of the images of `small_store`."""
    root = tmp_path_factory.mktemp("other")
    draw([
        "--images", str(small_store.parent / "images"), "--classes", str(small_store.parent / "classes.txt"),
        "--rule", "flip", "--q", "0.2", "--eta", "0.3", "--seed", "5", "--output_dir", str(root / "drawn"),
    ])  # fmt: skip
    return as_votes(root / "drawn", root / "store", "other")


SMALL = [
    "--recipe", "digits", "--refine", "none", "--channels", "3", "--image_size", "12", "--backbone_args",
    '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}', "--batch_size", "26", "--workers", "0", "--report_to", "none",
]  # fmt: skip
RUNS = {
    "train_coreg": (train_coreg.main, ["--warmup_epochs", "1", "--queue_size", "50"]),
    "pll": (script("pll").main, ["--method", "cc"]),
    "dividemix": (script("dividemix").main, ["--warmup_epochs", "1"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_on_what_is_left_and_says_so(small_store, other_annotator, tmp_path, name, capsys):
    main, more = RUNS[name]
    job = [*SMALL, *more, "--annotations", str(small_store), "--prefilter", "topk:1", "--epochs", "2"]
    job += ["--prefilter_annotations", str(other_annotator), "--few_shot", "1"]
    main([*job, "--output_dir", str(tmp_path / "run")])
    out = capsys.readouterr().out
    store, other = AnnotationStore.open(small_store), AnnotationStore.open(other_annotator)
    train, best = np.flatnonzero(store.split == 0), other.probs().argmax(axis=1)
    report, weak = (
        json.loads((tmp_path / "run" / "report.json").read_text()),
        WeakLabels.read(tmp_path / "run" / "weak_labels.safetensors"),
    )
    certain = dict(zip(weak.samples[weak.certain].tolist(), weak.known[weak.certain].tolist()))
    assert len(certain) == 3 and all(store.labels[row] == label for row, label in certain.items())
    wanted = {
        row: {certain[row]} if row in certain else {best[row]} & set(np.flatnonzero(store.drawn_sets()[row]))
        for row in train
    }
    left = [row for row in train if wanted[row]]
    assert 2 < len(left) < len(train) and weak.samples.tolist() == left
    assert [set(np.flatnonzero(row)) for row in weak.table] == [wanted[row] for row in left]
    assert report["images"]["train"] == len(left) == len((tmp_path / "run" / "labels.csv").read_text().splitlines()) - 1
    filtered = report["weak_labels"]["prefilter"]
    assert (filtered["rule"], filtered["dropped"]) == ("topk:1", len(train) - len(left))
    share = np.mean([store.labels[row] in wanted[row] for row in left])
    assert filtered["partial_accuracy"]["after"] == pytest.approx(share)
    assert (
        out.count(f"Pre-filter topk:1: mean candidates {filtered['mean_candidates']['before']:.2f} before and 1.00 after")
        == 2
    )
    # another store makes another job
    more = ["--output_dir", str(tmp_path / "run"), "--prefilter_annotations", str(small_store)]
    assert "drawn from true labels" in refused(capsys, main, *job, *more)


def test_the_runs_own_annotator_is_asked_where_no_other_is_named(small_annotated, tmp_path):
    job = [*SMALL, "--method", "cc", "--annotations", str(small_annotated), "--prefilter", "conformal:0.3"]
    job += ["--few_shot", "8", "--epochs", "1"]
    RUNS["pll"][0]([*job, "--output_dir", str(tmp_path / "run")])
    weak, store = WeakLabels.read(tmp_path / "run" / "weak_labels.safetensors"), AnnotationStore.open(small_annotated)
    probs = store.probs()[weak.samples]
    threshold = conformal_threshold(probs, weak.known, 0.3)
    assert threshold > 0
    doubted = ~weak.certain
    sets = (store.probs() > 0)[weak.samples]
    assert (weak.table == (sets & (probs >= threshold)))[doubted].all()


def test_what_does_not_go_together_is_one_line(small_store, small_annotated, tmp_path, capsys):
    pll, run = RUNS["pll"][0], ["--output_dir", str(tmp_path / "run")]
    job = [*SMALL, "--annotations", str(small_store), *run]
    assert "name the store of an annotator with --prefilter_annotations" in refused(
        capsys, pll, *job, "--prefilter", "topk"
    )
    assert "such as --prefilter topk" in refused(capsys, pll, *job, "--prefilter_annotations", str(small_annotated))
    assert "unknown --prefilter best" in refused(capsys, pll, *job, "--prefilter", "best")
    few = ["--prefilter", "conformal:0.1", "--prefilter_annotations", str(small_annotated)]
    assert "--few_shot N" in refused(capsys, pll, *job, *few)
    for name, more in (("distill", []), ("probe", ["--targets", "probabilities"])):
        assert "is for candidate sets" in refused(capsys, script(name).main, *job, *more, "--prefilter", "topk")
    assert not (tmp_path / "run").exists()


def test_a_pre_filter_is_of_the_same_images_and_classes(small_store, small_annotated):
    store, job = AnnotationStore.open(small_store), SimpleNamespace(prefilter="topk", prefilter_annotations=small_annotated)
    assert annotators_store(job, store).root == small_annotated
    for change, message in (
        ({"class_names": ["a", "d", "c"]}, "has other classes \\('b' for 'd'\\)"),
        ({"class_names": ["a", "b", "c", "d"]}, "has other classes \\(3 classes\\)"),
        ({"images": store.manifest["images"] | {"sha256": "x"}}, "is of other images"),
    ):
        with pytest.raises(UserError, match=message):
            annotators_store(job, dataclasses.replace(store, manifest=store.manifest | change))
