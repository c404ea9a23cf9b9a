"""baselines/spml.py: several labels an image, from a store to a report."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import final_state, killed_at, on_two_processes, refused, same_curves, script
from safetensors.numpy import load_file
from sklearn.metrics import average_precision_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import annotate_vlm
from coreg.annotate.tag_evidence import label_evidence
from coreg.annotate.textual import class_embeddings, label_similarities, text_side
from coreg.data.tags import read_tags
from coreg.export import predict
from coreg.export.tagging import read_thresholds
from coreg.label.page import read_page
from coreg.learn.multi_options import OPTIONS
from coreg.nets.model import Model
from coreg.report.multi_metrics import average_precisions
from coreg.report.record import read_report
from coreg.run.tags import observed_labels
from coreg.settings import TagJob
from coreg.store.store import AnnotationStore

spml, zero_shot_tags = script("spml"), script("zero_shot_tags")
NAMES = ["one", "two", "three"]
SMALL = [
    "--recipe", "digits", "--dtype", "float64", "--channels", "3", "--image_size", "8", "--batch_size", "7",
    "--backbone_args", '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}', "--epochs", "3", "--workers", "0",
    "--report_to", "none", "--flip", "false", "--padding", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """34 training and 10 test images of bands in up to three colours, one of which has none, with their labels."""
    root, rng = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    lines = ["path,labels,split"]
    for number in range(44):
        shown = rng.random(3) < [0.6, 0.4, 0.4] if number else np.zeros(3, bool)
        pixels = rng.integers(0, 60, (15, 15, 3)).astype(np.uint8)
        for colour in np.flatnonzero(shown):
            pixels[5 * colour : 5 * colour + 5, :, colour] = 255
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        named = ";".join(name for name, there in zip(NAMES, shown) if there)
        lines.append(f"{number:02d}.png,{named},{'test' if number >= 34 else 'train'}")
    (root / "list.csv").write_text("\n".join(lines))
    (root / "classes.txt").write_text("\n".join(NAMES))
    places = [f"--images={root / 'list.csv'}", f"--classes={root / 'classes.txt'}", f"--output_dir={root / 'ann'}"]
    annotate_vlm.main([*places, "--tiles", "2", "--workers", "0"])
    return root / "ann"


def words(store, output, method, *more):
    return ["--annotations", str(store), "--output_dir", str(output), "--method", method, *SMALL, *more]


def train(store, output, method, *more):
    spml.main(words(store, output, method, *more))
    return json.loads((output / "report.json").read_text())


def test_true_labels_are_learnt_and_reported(store, tmp_path, capsys):
    report = train(store, tmp_path / "run", "bce", "--epochs", "25", "--lr", "0.05", "--report_to", "tensorboard")
    assert report["tags"]["test"]["mAP"] > 0.95 and report["method"] == "BCE"
    assert report["images"] == {"train": 27, "validation": 7, "test": 10}
    assert report["thresholds_from"] == "validation labels" and len(report["thresholds"]) == 3
    # what the annotator's similarities are worth, whatever the method
    assert 0 < report["tags"]["test"]["annotator"] < 1
    out = capsys.readouterr().out
    assert "labels of 27 training images" in out and f"coreg-label {tmp_path / 'run'}" in out
    # nobody gave a label, so that a person can be asked about every image
    shown = read_page(tmp_path / "run")
    assert shown.several and shown.class_names == NAMES and len(shown.images) == 27 and shown.others == []
    # labels.csv can be read back as a person's labels
    opened = AnnotationStore.open(store)
    read = read_tags(str(tmp_path / "run" / "labels.csv"), opened.paths, NAMES)
    rows = list(csv.DictReader((tmp_path / "run" / "labels.csv").open()))
    assert len(rows) == 27
    for row in rows:
        at = list(opened.paths).index(row["path"])
        p = [float(row[f"p({name})"]) for name in NAMES]
        near = np.abs(np.array(p) - report["thresholds"]) < 1e-4
        assert ((read[at] == 1) == (np.array(p) >= report["thresholds"]))[~near].all()
    # the export names what labels.csv names
    predict.main(["--model", str(tmp_path / "run"), "--images", opened.images_spec, "--output", str(tmp_path / "p.csv")])
    predicted = {row["path"]: row for row in csv.DictReader((tmp_path / "p.csv").open())}
    assert len(predicted) == 44
    for row in rows:
        again = predicted[row["path"]]
        assert [float(again[f"p({n})"]) for n in NAMES] == pytest.approx([float(row[f"p({n})"]) for n in NAMES], abs=2e-4)
        near = np.abs(np.array([float(row[f"p({n})"]) for n in NAMES]) - report["thresholds"]) < 1e-3
        assert near.any() or set(again["labels"].split(";")) == set(row["labels"].split(";"))
    settings = json.loads((tmp_path / "run" / "export" / "coreg.json").read_text())
    assert settings["thresholds"] == report["thresholds"] and settings["thresholds_from"] == "validation labels"
    # so does the list of thresholds, which a person may edit
    at = read_thresholds(str(tmp_path / "run" / "thresholds.csv"), NAMES, np.zeros(3))
    assert at.tolist() == report["thresholds"]
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    for number in (report["tags"]["test"]["mAP"], report["tags"]["test"]["OF1"], report["tags"]["test"]["annotator"]):
        assert f"{number:.1%}" in card
    assert f"| two | {at[1]:.3f} | {report['tags']['test']['average_precision'][1]:.0%} |" in card
    # the page has the same numbers, and so has TensorBoard
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"{report['tags']['test']['mAP']:.1%} mAP on the test images" in page
    board = EventAccumulator(str(next((tmp_path / "run").rglob("events.out*")).parent)).Reload()
    assert board.Scalars("final/CF1_test")[0].value == pytest.approx(report["tags"]["test"]["CF1"])
    assert len(board.Scalars("mAP/test")) == 25 and "views/plain, weak, weak, strong, strong" in board.Tags()["images"]
    (lines,) = [file.read_text().splitlines() for file in (tmp_path / "run").rglob("metadata.tsv")]
    assert lines[0] == "labels\tannotator\ttruth" and set(lines[1].split("\t")[2].split(";")) <= {*NAMES, "none"}
    # a finished run says so, and shows the same table
    spml.main(words(store, tmp_path / "run", "bce", "--epochs", "25", "--lr", "0.05", "--report_to", "tensorboard"))
    out = capsys.readouterr().out
    assert "This run is finished" in out and f"{report['tags']['test']['mAP']:.1%}" in out


@pytest.mark.parametrize("method", ["em_apl", "role", "ll_cp"])
def test_a_run_that_was_killed_goes_on_as_it_would_have(method, store, tmp_path, monkeypatch):
    own = {"em_apl": ["--pseudo_after", "1"], "ll_cp": ["--large_share", "0.1"]}.get(method, [])
    train(store, tmp_path / "whole", method, *own)
    with killed_at(monkeypatch, 2):
        train(store, tmp_path / "killed", method, *own)
    train(store, tmp_path / "killed", method, *own)
    ours, theirs = final_state(tmp_path / "killed"), final_state(tmp_path / "whole")
    same_curves(ours, theirs, limit=0)
    for name, value in ours["learners"][0].items():
        assert torch.equal(value, theirs["learners"][0][name]), name
    tables = {"em_apl": "soft", "role": "estimate", "ll_cp": "observed"}
    assert tables[method] in ours["learners"][0]


@pytest.mark.multiprocess
def test_two_processes_train_as_one_does(store, tmp_path):
    """Of batches of odd sizes; every method's step is compared in tests/test_multi_methods.py."""
    train(store, tmp_path / "one", "role")
    on_two_processes(spml.main, *words(store, tmp_path / "two", "role"))
    ours, theirs = final_state(tmp_path / "two"), final_state(tmp_path / "one")
    same_curves(ours, theirs)
    for name, value in ours["learners"][0].items():
        torch.testing.assert_close(value, theirs["learners"][0][name], rtol=1e-9, atol=1e-10)


def test_observed_labels_are_kept_with_the_run(store, tmp_path):
    report = train(store, tmp_path / "run", "an", "--epochs", "1", "--positives", "1", "--validation", "0")
    saved, opened = load_file(tmp_path / "run" / "observed_labels.safetensors"), AnnotationStore.open(store)
    assert len(saved["observed"]) == 34 and report["labels_used"] == (saved["observed"] != 0).sum()
    truth = opened.tags[saved["samples"]]
    assert (saved["observed"] * truth >= 0).all()
    np.testing.assert_array_equal((saved["observed"] == 1).sum(axis=1), (truth == 1).any(axis=1))
    assert report["observed"] == {"generator": "numbers", "positives": 1.0, "negatives": 0.0, "seed": 0}
    # without validation images, one threshold comes without labels: images have as many as the annotator suggests
    assert report["thresholds_from"] == "annotator" and "validation" not in report["images"]
    # in the whole image or a part of it
    suggested = label_evidence(opened, "tiles", 0)[saved["samples"]] > 0.5

    def given(folder):
        with (folder / "labels.csv").open(newline="") as file:
            return [len(row["labels"].split(";")) if row["labels"] else 0 for row in csv.DictReader(file)]

    assert len(set(report["thresholds"])) == 1 and sum(given(tmp_path / "run")) == pytest.approx(suggested.sum(), abs=1)
    more = train(store, tmp_path / "more", "an", "--epochs", "1", "--validation", "0", "--labels_an_image", "2")
    assert more["thresholds_from"] == "labels_an_image" and sum(given(tmp_path / "more")) == pytest.approx(68, abs=1)


def test_a_persons_labels_and_none_at_all(store, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("path,labels,absent\n03.png,one,two\n05.png,three,\n")
    report = train(store, tmp_path / "run", "vlpl", "--epochs", "1", "--tags", str(tmp_path / "mine.csv"))
    assert 0 < report["labels_used"] <= 3
    none = train(store, tmp_path / "none", "vlpl", "--epochs", "1", "--positives", "0")
    assert none["labels_used"] == 0
    # other labels are another job
    (tmp_path / "mine.csv").write_text("path,labels\n03.png,one\n04.png,one\n05.png,one\n06.png,one\n")
    again = words(store, tmp_path / "run", "vlpl", "--epochs", "1", "--tags", tmp_path / "mine.csv")
    assert "holds another job (tags was" in refused(capsys, spml.main, *again)
    (tmp_path / "mine.csv").unlink()
    assert "cannot read " in refused(capsys, spml.main, *again)


def test_nothing_is_put_aside_where_no_true_label_is_known(store):
    """Neither epochs nor thresholds can be chosen by it."""
    known = AnnotationStore.open(store)
    job = TagJob(validation=0.2)
    weak, aside = observed_labels(job, OPTIONS["soft"](method="soft"), known)
    assert (len(weak.samples), len(aside)) == (27, 7)
    unknown = dataclasses.replace(known, tags=None)
    weak, aside = observed_labels(job, OPTIONS["soft"](method="soft"), unknown)
    assert (len(weak.samples), len(aside)) == (34, 0) and not weak.table.any()


def test_what_cannot_be_trained_on_is_refused(store, tmp_path, capsys):
    def line(method, *more):
        return refused(capsys, spml.main, *words(store, tmp_path / "run", method, *more))

    assert "no label of any training image" in line("an", "--positives", "0")
    assert "write --observed shares" in line("an", "--positives", "0.5")
    (tmp_path / "tags.csv").write_text("path,labels\n40.png,one\n")
    assert "labels test images, such as 40.png" in line("an", "--tags", str(tmp_path / "tags.csv"))
    assert not (tmp_path / "run" / "report.json").exists()


def test_nothing_but_the_annotator_is_learnt_from(store, tmp_path):
    own = ["--positives", "0", "--keep", "last", "--evidence", "piaa"]
    report = train(store, tmp_path / "run", "soft", "--epochs", "2", *own)
    assert report["labels_used"] == 0 and report["epoch"] == 2 and report["method"] == "Soft targets"


@pytest.mark.parametrize("evidence", ["image", "tiles", "ccd", "piaa"])
def test_evidence_of_a_store(evidence, store):
    opened = AnnotationStore.open(store)
    side = text_side(opened, opened.templates)
    text, scale = class_embeddings(side), side.scale
    ours = label_evidence(opened, evidence, 0.0)
    image, tiles = (x.astype(np.float64) @ text.T.astype(np.float64) for x in (opened.features(), opened.tiles()))
    views = np.exp(scale * np.concatenate([image[:, None], tiles], axis=1))
    views /= views.sum(axis=2, keepdims=True)
    if evidence in ("image", "tiles"):
        expected = views[:, 0] if evidence == "image" else views.max(axis=1)
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    # a temperature of one's own, but for Gaussians
    other = label_evidence(opened, evidence, 1.0)
    assert np.array_equal(ours, other) == (evidence == "piaa")
    # Gaussians and biases are those of training images alone
    moved = dataclasses.replace(opened, split=np.where(opened.split == 1, 2, opened.split))
    np.testing.assert_array_equal(label_evidence(moved, evidence, 0.0), ours)


def test_every_way_without_training_leaves_a_report_and_labels(store, tmp_path, capsys):
    words = ["--annotations", str(store), "--output_dir", str(tmp_path)]
    zero_shot_tags.main(words)
    out, opened = capsys.readouterr().out, AnnotationStore.open(store)
    test = opened.rows_of(1)
    for way in ("image", "tiles", "ccd", "piaa"):
        report = read_report(tmp_path / way / "report.json")
        scores = label_evidence(opened, way, 0.0)
        expected = np.mean([average_precision_score(y == 1, s) for y, s in zip(opened.tags[test].T, scores[test].T)])
        assert report["tags"]["test"]["mAP"] == pytest.approx(expected) and f"{expected:.1%}" in out
        rows = list(csv.DictReader((tmp_path / way / "labels.csv").open()))
        assert len(rows) == 34 and report["labels_used"] == 0
        named = [name for name, p, at in zip(NAMES, scores[5], report["thresholds"]) if p >= at]
        assert rows[5]["labels"] == ";".join(named)
    before = (tmp_path / "piaa" / "report.json").read_bytes()
    zero_shot_tags.main(words)
    assert (tmp_path / "piaa" / "report.json").read_bytes() == before
    assert "another job" in refused(capsys, zero_shot_tags.main, *words, "--temperature", "0.5")


def test_tiles_are_asked_for_where_there_are_none(store, tmp_path, capsys):
    plain = ["--images", str(store.parent / "list.csv"), "--classes", str(store.parent / "classes.txt")]
    annotate_vlm.main([*plain, "--output_dir", str(tmp_path / "ann"), "--workers", "0"])
    line = refused(capsys, spml.main, *words(tmp_path / "ann", tmp_path / "run", "vlpl", "--evidence", "piaa"))
    assert "has no tiles, which --evidence piaa needs; annotate with --tiles 2 3" in line
    zero_shot_tags.main(["--annotations", str(tmp_path / "ann"), "--output_dir", str(tmp_path / "z")])
    assert "left out: Zero-shot, PIAA" in capsys.readouterr().out and (tmp_path / "z" / "image" / "report.json").exists()


def test_the_epoch_of_the_largest_validation_map_is_reported(store, tmp_path):
    more = ["--epochs", "8", "--lr", "0.2"]
    best = train(store, tmp_path / "best", "bce", *more)
    last = train(store, tmp_path / "last", "bce", *more, "--keep", "last")
    assert last["epoch"] == 8
    state = final_state(tmp_path / "best")
    values = [epoch["mAP/validation"] for epoch in state["curves"]]
    assert best["epoch"] == max(n for n, value in enumerate(values, 1) if value == max(values))
    assert best["tags"]["validation"]["mAP"] == max(values)
    assert last["tags"]["validation"]["mAP"] == values[-1]
    # without validation labels there is nothing to choose by
    none = train(store, tmp_path / "none", "bce", "--epochs", "2", "--validation", "0")
    assert none["epoch"] == 2


def test_a_frozen_backbone_gives_features_once(store, tmp_path, monkeypatch):
    """They are those that it gives in every epoch."""
    own = ["--tuner", "linear", "--view", "plain", "--method", "an", "--epochs", "2"]
    train(store, tmp_path / "once", "an", *own)
    monkeypatch.setattr(Model, "features_are_fixed", property(lambda net: False))
    train(store, tmp_path / "every", "an", *own)
    ours, theirs = final_state(tmp_path / "once"), final_state(tmp_path / "every")
    same_curves(ours, theirs)
    for name, value in ours["learners"][0].items():
        torch.testing.assert_close(value, theirs["learners"][0][name], rtol=1e-9, atol=1e-12)


def weights_after(folder, part):
    """The network's weights in the last checkpoint, those of the classifier or all others but the projector's."""
    state = final_state(folder)["learners"][0]
    names = [name for name in state if name.startswith("net.backbone.")]
    return {name: state[name] for name in names if (".fc." in name or "head" in name) == (part == "head")}


def test_roles_first_epochs_train_classifier_and_table_alone(store, tmp_path, monkeypatch, capsys):
    """On features of the network as it begins; a job that is killed there goes on as it would have."""
    own = ["--epochs", "3", "--keep", "last"]
    train(store, tmp_path / "linear", "role", *own, "--linear_epochs", "3")
    train(store, tmp_path / "both", "role", *own, "--linear_epochs", "2")
    with killed_at(monkeypatch, 2):
        train(store, tmp_path / "killed", "role", *own, "--linear_epochs", "2")
    train(store, tmp_path / "killed", "role", *own, "--linear_epochs", "2")
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    train(store, tmp_path / "start", "role", "--epochs", "1", "--keep", "last")
    start = weights_after(tmp_path / "start", "rest")
    for name, value in weights_after(tmp_path / "linear", "rest").items():
        assert "running" in name or "num_batches" in name or torch.equal(value, start[name]), name
    assert any(not torch.equal(value, start[name]) for name, value in weights_after(tmp_path / "both", "rest").items())
    first = weights_after(tmp_path / "start", "head")
    assert all(not torch.equal(value, first[name]) for name, value in weights_after(tmp_path / "linear", "head").items())
    for name, value in final_state(tmp_path / "both")["learners"][0].items():
        assert torch.equal(value, final_state(tmp_path / "killed")["learners"][0][name]), name
    line = refused(capsys, spml.main, *words(store, tmp_path / "no", "role", "--linear_epochs", "4"))
    assert "--linear_epochs is 4, of 3 --epochs" in line


def test_a_classifier_can_learn_faster_than_the_rest(store, tmp_path):
    """With a rate of 0 for it, it stays; the others are as fast as ever."""
    plain = ["--epochs", "1", "--keep", "last", "--batch_size", "27"]
    train(store, tmp_path / "fast", "ll_r", *plain, "--head_speed", "10")
    train(store, tmp_path / "usual", "ll_r", *plain)
    train(store, tmp_path / "none", "ll_r", *plain, "--head_speed", "0")
    heads = [weights_after(tmp_path / name, "head") for name in ("fast", "usual", "none")]
    for name in heads[0]:
        fast, usual = (heads[k][name] - heads[2][name] for k in (0, 1))
        torch.testing.assert_close(fast, 10 * usual)
    rests = [weights_after(tmp_path / name, "rest") for name in ("fast", "usual")]
    for name, value in rests[0].items():
        assert torch.equal(value, rests[1][name]), name


def test_images_that_are_held_out_are_those_for_validation(store, tmp_path):
    lines = (store.parent / "list.csv").read_text().split("\n")
    held = [line.replace(",train", ",val") if number % 7 == 0 else line for number, line in enumerate(lines)]
    (store.parent / "held.csv").write_text("\n".join(held))
    places = ["--images", str(store.parent / "held.csv"), "--classes", str(store.parent / "classes.txt")]
    annotate_vlm.main([*places, "--output_dir", str(tmp_path / "ann"), "--workers", "0"])
    report = train(tmp_path / "ann", tmp_path / "run", "an", "--epochs", "1")
    assert report["images"] == {"train": 30, "validation": 4, "test": 10}


@pytest.mark.slow
def test_built_in_pictures_of_several_digits(tmp_path):
    """The command without any option but the epochs: tiles make students that know more than the annotator's pictures."""
    spml.main(["--output_dir", str(tmp_path / "run"), "--workers", "0", "--report_to", "none", "--epochs", "4"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["dataset"] == "builtin:digit-pictures"
    assert report["images"] == {"train": 1200, "validation": 300, "test": 400}
    assert report["tags"]["test"]["mAP"] > report["tags"]["test"]["annotator"] > 0.2


def test_the_annotators_similarities_are_those_of_its_own_features(store, tmp_path):
    """The report's number for the annotator, from features and texts by hand."""
    opened = AnnotationStore.open(store)
    similarity = label_similarities(opened)
    assert similarity.shape == (44, 3) and np.abs(similarity).max() <= 1 + 1e-3
    # the softmax over the labels of one template's similarities is what annotating stored; of several, about that
    assert np.mean(similarity.argmax(axis=1) == opened.probs().argmax(axis=1)) > 0.9
    assert average_precisions(similarity, opened.tags).shape == (3,)
