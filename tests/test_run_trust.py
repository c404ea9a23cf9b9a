"""What the end of a run says of whom to trust: in report.json, on the page, in the card, on one and two processes."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import on_two_processes, refused, script

from coreg.report.trust import trust_lines
from coreg.run import results
from coreg.store.manifest import read_manifest
from coreg.store.store import AnnotationStore
from coreg.store.writer import StoreWriter
from coreg.weak.trust import verdict

probe = script("probe")
ROOT = Path(__file__).parents[1]
JOB = [
    "--recipe", "digits", "--dtype", "float64", "--channels", "3", "--image_size", "12", "--share", "300",
    "--batch_size", "50", "--workers", "0", "--report_to", "none",
]  # fmt: skip
TINY = ["--backbone_args", '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}']


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """A probe on features of untrained weights, which the annotator's own features judge."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    probe.main(["--annotations", str(digits.root), *JOB, *TINY, "--refine", "none", "--output_dir", str(folder)])
    return folder


def test_a_report_says_whom_to_trust(run, digits, capsys):
    trust = report_of(run)["trust"]
    assert (trust["kind"], trust["split"], trust["images"]) == ("own", "test", 360) and not trust["fit"]["hopeless"]
    # untrained features: the student is far below its annotator, and that is not silent
    accuracy, before = report_of(run)["accuracy"]["test"]["ensemble"], report_of(run)["annotator"]["zero_shot_accuracy"]
    assert accuracy < before["test"] - 0.05 and trust["most"] != "student"
    # the numbers are those of the rule, of the images that the run was given
    test = np.flatnonzero(digits.split == 1)
    assert set(trust["agreement"]) == {"annotator", "student", "view"}
    assert trust["agreement"]["student"] < trust["agreement"]["annotator"] < trust["agreement"]["view"]
    chosen = np.flatnonzero(digits.split == 0)
    of = [{"train": rows[chosen], "test": rows[test]} for rows in (digits.features(), digits.probs())]
    whole = verdict(*of, chosen, digits.probs()[test].argmax(axis=1), refined=False)  # the annotator as its own student
    assert whole["agreement"]["student"] == whole["agreement"]["annotator"] and whole["most"] == "view"
    # in words: at the end, on the page, in the export
    advice = trust_lines(report_of(run))[0]
    assert ("annotator itself" if trust["most"] == "annotator" else "refined labels") in advice
    assert "not Probe, soft labels" in advice and "annotator's own" in trust_lines(report_of(run))[2]
    probe.main(["--annotations", str(digits.root), *JOB, *TINY, "--refine", "none", "--output_dir", str(run)])
    assert advice in capsys.readouterr().out
    assert advice in (run / "report.html").read_text()
    assert "To be trusted most" in (run / "export" / "README.md").read_text()


def test_a_report_estimates_its_accuracy_without_labels(run, capsys, digits):
    report = report_of(run)
    made, scores = report["estimate"], report["label_free"]["approximated_accuracy"]
    with (run / "labels.csv").open(newline="") as file:
        sure = np.mean([float(line["probability"]) for line in csv.DictReader(file)])
    assert made["train"]["scores"] == {
        "confidence": pytest.approx(sure, abs=1e-4),
        "approximated_accuracy": scores["train"],
    }
    for split, one in made.items():
        low, high = sorted(one["scores"].values())
        assert (
            one["accuracy"] == pytest.approx((low + high) / 2) and one["scores"]["approximated_accuracy"] == scores[split]
        )
        assert one["interval"] == [pytest.approx(max(0, low - 0.1)), pytest.approx(min(1, high + 0.1))]
    assert list(made) == ["train", "test"]
    low, high = made["test"]["interval"]
    words = f"probably between {low:.0%} and {high:.0%}"
    probe.main(["--annotations", str(digits.root), *JOB, *TINY, "--refine", "none", "--output_dir", str(run)])
    card = (run / "export" / "README.md").read_text()
    assert words in capsys.readouterr().out and words in (run / "report.html").read_text()
    assert "Estimated without labels" in card and f"{low:.0%} and {high:.0%}" in card


@pytest.mark.parametrize(
    ("source", "certain", "scores", "there"),
    [
        ({"annotator": "clip"}, 1, {"consensus": 0.5}, True),
        ({"annotator": "clip"}, 120, {"consensus": 0.5}, False),  # labels of all images
        ({"annotator": "clip"}, 0, {}, False),  # one number alone
        ({"annotator": "clip"}, 0, None, False),
        ({"annotator": "clip"}, 0, {"consensus": 0.5, "covering_rate": {"train": 0.989}}, True),
        ({"annotator": "clip"}, 0, {"consensus": 0.5, "covering_rate": {"train": 0.99}}, False),  # it repeats the annotator
        ({"generator": "synthetic"}, 0, {"consensus": 0.5}, False),
        (None, 0, {"consensus": 0.5}, False),  # the annotator itself, tuned
    ],
)
def test_nothing_is_estimated_where_nothing_can_be_said(source, certain, scores, there):
    weak = None if source is None else SimpleNamespace(source=source, certain=np.arange(120) < certain)
    logits = {"train": {"ensemble": np.zeros((120, 4))}, "test": {"ensemble": np.zeros((99, 4))}}
    predicted = SimpleNamespace(weak=weak, logits=logits, temperature=1.0, classes={s: np.zeros(120, int) for s in logits})
    predicted.classes["test"] = np.zeros(99, int)
    made = results._estimates(predicted, scores)
    # of 99 test images nothing is said
    assert (
        (list(made) == ["train"] and made["train"]["scores"] == {"confidence": 0.25, "consensus": 0.5})
        if there
        else not made
    )


def test_pretrained_weights_judge_the_same_on_two_processes(run, digits, tmp_path):
    words = ["--annotations", str(digits.root), *JOB, "--backbone_args", "{}", "--refine", "none"]
    words += ["--backbone", f"local-dir:{run / 'export' / 'net1'}", "--output_dir"]
    probe.main([*words, str(tmp_path / "one")])
    on_two_processes(probe.main, *words, tmp_path / "two")
    one, two = (report_of(tmp_path / name)["trust"] for name in ("one", "two"))
    assert one["kind"] == "weights" and one["agreement"] == two["agreement"] and one["most"] == two["most"]
    assert one["fit"]["score"] == pytest.approx(two["fit"]["score"], abs=1e-9)


def test_a_view_that_knows_nothing_is_refused_before_training(digits, tmp_path, capsys):
    """Features that belong to other images."""
    strange = digits.features()[np.random.default_rng(0).permutation(len(digits))]
    tensors = {"votes": digits.votes(), "probs": digits.probs(), "features": strange}
    writer = StoreWriter(tmp_path / "ann", dict(digits.manifest))
    writer.write_all(digits.images(), lambda rows: {name: table[rows] for name, table in tensors.items()})
    words = ["--annotations", tmp_path / "ann", *JOB, *TINY, "--refine", "own", "--output_dir", tmp_path / "run"]
    line = refused(capsys, probe.main, *words)
    assert "cannot tell the classes apart" in line and "--refine none" in line
    assert not (tmp_path / "run" / "report.json").exists()
    # the store that was made says so, too, and a run without it starts in the same folder
    fit = read_manifest(tmp_path / "run" / "refined")["refined"]["fit"]
    assert fit["hopeless"] and fit["itself"] < 0.3
    for name in ("report.txt", "report.html"):
        assert "do not train on it" in (tmp_path / "run" / "refined" / name).read_text()
    probe.main([str(word) for word in words[:-4]] + ["--refine", "none", "--output_dir", str(tmp_path / "run")])
    trust = report_of(tmp_path / "run")["trust"]
    assert trust["most"] == "annotator" and trust["fit"]["hopeless"]
    assert "There is no referee" in capsys.readouterr().out


def test_a_refined_store_says_how_well_its_features_read_alone(digits, tmp_path):
    from coreg.annotate.tools import main

    assert main(["refine", str(digits.root), "--features", "own", "--output_dir", str(tmp_path / "ann2")]) == 0
    fit = AnnotationStore.open(tmp_path / "ann2").manifest["refined"]["fit"]
    assert not fit["hopeless"] and fit["itself"] > fit["annotator"] + 0.05 and fit["score"] > fit["shuffled"] + 0.5
    assert f"agree with each other on {fit['itself']:.1%} and" in (tmp_path / "ann2" / "report.txt").read_text()


def test_evidence_is_mended_of_itself_where_pretrained_weights_can(run, digits, tmp_path, capsys, monkeypatch):
    backbone = f"local-dir:{run / 'export' / 'net1'}"
    shutil.copytree(digits.root, tmp_path / "ann")  # a view is written into it
    words = ["--annotations", str(tmp_path / "ann"), *JOB, "--backbone_args", "{}", "--refine", "auto", "--output_dir"]
    probe.main([*words, str(tmp_path / "a"), "--backbone", backbone])
    report, fit = report_of(tmp_path / "a"), read_manifest(tmp_path / "a" / "refined")["refined"]["fit"]
    # whichever it is, it is printed, and what is trained on is that
    assert ("refined" in report) == fit["mends"]
    printed = capsys.readouterr().out
    assert ("before and after" in printed) == fit["mends"] != ("The evidence is left as it is" in printed)
    # the other one
    monkeypatch.setattr("coreg.weak.trust.REFEREES_AGREE", 1.1 if fit["mends"] else -1.0)
    monkeypatch.setattr("coreg.weak.trust.ERRORS", 2.0 if fit["mends"] else -99.0)
    probe.main([*words, str(tmp_path / "b"), "--backbone", backbone])
    assert ("refined" in report_of(tmp_path / "b")) != fit["mends"]
    # nothing to see with; refined already
    capsys.readouterr()
    probe.main([*words, str(tmp_path / "c"), *TINY])
    mended = tmp_path / ("a" if fit["mends"] else "b") / "refined"
    probe.main(["--annotations", str(mended), *words[2:], str(tmp_path / "d"), "--backbone", backbone])
    assert "Refining" not in capsys.readouterr().out
    assert not (tmp_path / "c" / "refined").exists() and not (tmp_path / "d" / "refined").exists()
    assert report_of(tmp_path / "d")["trust"]["kind"] == "view"


def test_words_for_referees_that_are_doubted():
    judged = {"features": "lite0-32", "kind": "weights", "split": "test", "images": 400, "fit": {"hopeless": False}}
    judged |= {"most": "annotator", "agreement": {"annotator": 0.4, "student": 0.5, "view": 0.7}}
    judged |= {"surest": {"annotator": 0.45, "view": 0.75}}
    sentence = "They are not believed: of the images that the annotator is surest of they agree with it on 45.0% and with"
    for doubt in (True, False):
        lines = trust_lines({"method": "m", "trust": judged | {"doubted": doubt}})
        assert lines[0].endswith("the annotator itself, not m.") and any(sentence in line for line in lines) == doubt


def test_words_of_a_report_that_comes_from_anywhere():
    assert trust_lines({}) == [] == trust_lines({"method": "m", "trust": None})
    strange = {"most": "me", "fit": {}, "agreement": {}}
    assert trust_lines({"method": "m", "trust": strange}) == []
