"""A store made from a store by its images' features: what is in it, what it says of itself, and training on the way."""

import csv
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from conftest import SMALL_JOB
from runs import final_state, killed_at, refused
from test_annotate_annotators import save_tiny_clip
from test_annotate_view import WORDS, photos

import annotate_vlm
import train_coreg
from coreg.annotate.changes import shares_that_moved
from coreg.annotate.refined import votes_of
from coreg.annotate.tools import main
from coreg.annotate.view import View, views_of
from coreg.errors import UserError
from coreg.store.store import AnnotationStore
from coreg.weak.refine import refine
from coreg.weak.rules import candidate_sets


@pytest.fixture(scope="module")
def mended(digits, tmp_path_factory):
    """The digits, refined by the annotator's own features."""
    root = tmp_path_factory.mktemp("refined") / "ann2"
    assert main(["refine", str(digits.root), "--features", "own", "--output_dir", str(root)]) == 0
    return AnnotationStore.open(root)


def test_own_features_mend_the_digits(digits, mended):
    train, test = digits.split == 0, digits.split == 1
    expected = refine(digits.features(), digits.probs(), np.flatnonzero(train), np.flatnonzero(test))
    np.testing.assert_array_equal(mended.probs(), expected.probs)
    right = [store.probs().argmax(axis=1) == store.labels for store in (digits, mended)]
    assert right[0][test].mean() < 0.75 and right[1][test].mean() > 0.91 and right[1][train].mean() > 0.91
    # everything else is as it was
    np.testing.assert_array_equal(mended.features(), digits.features())
    np.testing.assert_array_equal(mended.labels, digits.labels)
    assert mended.class_names == digits.class_names and len(mended.templates) == 2
    assert AnnotationStore.open(digits.root).hash == digits.hash != mended.hash
    # candidates are the best class and a near second
    sets, probs = candidate_sets(mended), np.sort(mended.probs().astype(np.float32), axis=1)
    near = probs[:, -2] >= 0.3 * probs[:, -1]
    np.testing.assert_array_equal(sets.sum(axis=1), 1 + near)
    assert 0.01 < near.mean() < 0.5


def test_the_store_before_it_was_refined(mended, digits, small_store, tmp_path):
    assert digits.unrefined() is digits and mended.unrefined().hash == digits.hash
    for place in (tmp_path / "gone", small_store):  # the source is gone, or another store lies there
        moved = mended.manifest | {"refined": mended.manifest["refined"] | {"source": str(place)}}
        assert dataclasses.replace(mended, manifest=moved).unrefined() is None


@pytest.mark.parametrize("how", [["--features", "own"], WORDS])
def test_what_is_published_names_no_folder_of_ones_own(how, tmp_path):
    save_tiny_clip(tmp_path / "somebody" / "clip")
    images = photos(tmp_path / "photos", 40)
    (tmp_path / "names.txt").write_text("red thing\ngreen thing")
    words = ["--images", str(images), "--vlm", f"local-dir:{tmp_path}/somebody/clip"]
    words += ["--classes", str(tmp_path / "names.txt")]
    annotate_vlm.main([*words, "--output_dir", str(tmp_path / "ann"), "--workers", "0"])
    assert main(["refine", str(tmp_path / "ann"), *how, "--output_dir", str(tmp_path / "ann2")]) == 0
    assert main(["publish", str(tmp_path / "ann2"), "--output_dir", str(tmp_path / "published")]) == 0
    refined, published = (AnnotationStore.open(tmp_path / name) for name in ("ann2", "published"))
    assert published.manifest["refined"]["source"] == "ann"
    assert published.manifest["refined"]["model"]["spec"] == "local-dir:clip"
    assert published.manifest["model"]["spec"].endswith(": local-dir:clip")
    for file in ("manifest.json", "README.md", "croissant.json"):
        assert str(tmp_path) not in (tmp_path / "published" / file).read_text()
    np.testing.assert_array_equal(published.probs(), refined.probs())
    with pytest.raises(UserError, match="the store that it was refined from is gone"):
        published.need_unrefined()


def test_it_says_where_it_comes_from_and_what_changed(digits, mended, tmp_path, capsys):
    record = mended.manifest["refined"]
    assert record["source_hash"] == digits.hash and record["source"] == str(digits.root.resolve())
    assert record["prior"] == "uniform" and record["weight"] in (0, 0.5, 1) and record["temperature"] > 1
    before, after = record["changed"]["accuracy"]["before"], record["changed"]["accuracy"]["after"]
    assert before["test"] == pytest.approx(np.mean((digits.probs().argmax(1) == digits.labels)[digits.split == 1]))
    assert after["test"] == pytest.approx(np.mean((mended.probs().argmax(1) == mended.labels)[mended.split == 1]))
    line = f"best class right, test   {before['test']:.1%}, {after['test']:.1%}"
    assert line in (mended.root / "report.txt").read_text() and line in (mended.root / "report.html").read_text()
    # how often a class was named before and after: 8 is mistaken for others
    train = mended.split == 0
    eight = [np.mean(store.probs().argmax(1)[train] == 8) for store in (digits, mended)]
    moved = f"{mended.class_names[8]} {eight[0]:.1%}, {eight[1]:.1%}"
    assert main(["info", str(mended.root)]) == 0
    output = capsys.readouterr().out
    assert line in output and moved in next(line for line in output.split("\n") if "named more or less" in line)
    assert mended.manifest["model"]["spec"] == "refined by own features: builtin:glyph-clip"
    damaged = tmp_path / "ann2"
    shutil.copytree(mended.root, damaged)
    (damaged / "images.txt").unlink()
    with pytest.raises(UserError, match=r"run the same python -m coreg\.annotate refine command again"):
        AnnotationStore.open(damaged)
    assert main(["refine", str(digits.root), "--features", "own", "--output_dir", str(damaged)]) == 0
    assert AnnotationStore.open(damaged).hash == mended.hash


def test_a_near_second_class_and_ties():
    probs = np.array([[0.7, 0.2, 0.1], [0.6, 0.1, 0.3], [1 / 3] * 3, [0, 0, 1]], dtype=np.float16)
    assert votes_of(probs).tolist() == [[0, 0], [0, 2], [0, 1], [2, 2]]
    assert votes_of(np.ones((2, 1), np.float16)).tolist() == [[0, 0], [0, 0]]


def test_a_view_mends_a_store_and_what_was_stopped_goes_on(digits, tmp_path, capsys):
    root = tmp_path / "ann"
    shutil.copytree(digits.root, root)
    words = ["refine", str(root), *WORDS, "--channels", "1", "--output_dir", str(tmp_path / "ann2")]
    assert main(words) == 0
    store = AnnotationStore.open(tmp_path / "ann2")
    (folder,) = views_of(digits := AnnotationStore.open(root))
    view = View.open(folder, digits)
    rows = [np.flatnonzero(digits.split == split) for split in (0, 1)]
    np.testing.assert_array_equal(store.probs(), refine(view.features(), digits.probs(), *rows).probs)
    assert store.manifest["refined"]["view"] == "preact_resnet_tiny-12"
    before = {path.name: path.read_bytes() for path in store.root.rglob("*") if path.is_file()}
    next((store.root / "blocks").iterdir()).unlink()
    assert main(words) == 0
    assert {path.name: path.read_bytes() for path in store.root.rglob("*") if path.is_file()} == before
    assert "holds the annotations of another job" in refused(capsys, main, *words, "--weight", "1")


def test_unreadable_images_stay_unreadable(tmp_path):
    from test_annotate_view import annotated

    store = annotated(photos(tmp_path / "photos", 40), tmp_path / "ann")
    assert main(["refine", str(store.root), *WORDS, "--output_dir", str(tmp_path / "ann2")]) == 0
    reopened = AnnotationStore.open(tmp_path / "ann2")
    # the store's maker could read nothing wrong, the view could not: the annotator's word stays
    bad = np.flatnonzero(View.open(views_of(store)[0], store).unreadable)
    np.testing.assert_array_equal(reopened.probs()[bad], store.probs()[bad])
    assert np.isfinite(reopened.probs()).all()


def test_what_cannot_be_refined_is_refused(digits, mended, small_store, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "x")]
    assert "is refined already; refine " in refused(capsys, main, "refine", mended.root, "--features", "own", *out)
    assert "keeps no features" in refused(capsys, main, "refine", small_store, "--features", "own", *out)
    assert "--output_dir is missing" in refused(capsys, main, "refine", digits.root)
    assert "--weight" in refused(capsys, main, "refine", digits.root, "--weight", "2", *out)
    words = ["--rescore", mended.root, "--output_dir", tmp_path / "y"]
    assert "evidence that was refined, and no model" in refused(capsys, annotate_vlm.main, *words)
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_training_refines_on_the_way_and_resumes(small_store, tmp_path, monkeypatch, capsys):
    shutil.copytree(small_store, tmp_path / "ann")
    words = ["--annotations", str(tmp_path / "ann"), *SMALL_JOB, "--refine", "view"]
    train_coreg.main([*words, "--output_dir", str(tmp_path / "a")])
    store = AnnotationStore.open(tmp_path / "a" / "refined")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    # the report speaks of the annotator as it was; what was made of its evidence stands beside it
    raw = AnnotationStore.open(small_store)
    train = raw.split == 0
    assert report["annotator"]["name"] == raw.manifest["model"]["spec"]
    assert report["annotator"]["mean_candidates"] == pytest.approx(candidate_sets(raw)[train].sum() / train.sum())
    mended = store.probs().argmax(axis=1) == store.labels
    assert report["refined"]["accuracy"] == {"train": mended[train].mean(), "test": mended[~train].mean()}
    assert report["refined"]["mean_candidates"] == candidate_sets(store)[train].sum() / train.sum()
    assert store.manifest["refined"]["source_hash"] == AnnotationStore.open(small_store).hash
    assert "Refining" in (text := capsys.readouterr().out) and "mean candidates" in text
    assert re.search(r"accuracy +annotator +refined +Co-Reg", text) and re.search(r"covering rate +\d", text)
    # so do the scores without labels: the annotator's own sets, not those that were trained on
    with (tmp_path / "a" / "labels.csv").open() as file:
        named = {line["path"]: store.class_names.index(line["label"]) for line in csv.DictReader(file)}
    inside = [candidate_sets(raw)[row, named[raw.paths[row]]] for row in np.flatnonzero(train)]
    assert report["label_free"]["covering_rate"]["train"] == pytest.approx(np.mean(inside))
    assert report["label_free"]["approximated_accuracy"]["train"] < np.mean(inside)
    assert 0 <= report["label_free"]["consensus"] <= 1
    page = (tmp_path / "a" / "report.html").read_text()
    assert "refined labels" in page and "covering rate" in page and "consensus" in page
    # the same as training on a store that was refined before
    train_coreg.main(["--annotations", str(store.root), *SMALL_JOB, "--output_dir", str(tmp_path / "b")])
    before, after = (final_state(tmp_path / name)["learners"][0] for name in "ab")
    assert all((before[key] == after[key]).all() for key in before)
    again = json.loads((tmp_path / "b" / "report.json").read_text())
    assert again["label_free"] == report["label_free"] and "refined" not in again
    # killed and started again; finished and started again; another choice
    with killed_at(monkeypatch, 1):
        train_coreg.main([*words, "--output_dir", str(tmp_path / "c")])
    train_coreg.main([*words, "--output_dir", str(tmp_path / "c")])
    again = final_state(tmp_path / "c")["learners"][0]
    assert all((before[key] == again[key]).all() for key in before)
    train_coreg.main([*words, "--output_dir", str(tmp_path / "c")])
    assert "This run is finished" in capsys.readouterr().out
    line = refused(capsys, train_coreg.main, *words[:-1], "none", "--output_dir", tmp_path / "c")
    assert "refine was view and is none" in line


def test_what_is_printed_of_the_sizes_of_classes(digits, tmp_path, capsys):
    output = tmp_path / "ann2"
    command = ["refine", str(digits.root), "--features", "own", "--output_dir", str(output)]
    assert main([*command, "--prior", "estimated", "--weight", "1"]) == 0
    assert "classes as large as they are estimated" in capsys.readouterr().out
    assert shares_that_moved(["a", "b", "c", "d"], [0.3, 0.35, 0.25, 0.1], [0.3, 0.34, 0.2, 0.16]) == [
        "d 10.0%, 16.0%",
        "c 25.0%, 20.0%",
    ]
    assert shares_that_moved(["a"], [1.0], [1.0]) == []
