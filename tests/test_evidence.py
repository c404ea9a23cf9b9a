"""What `make evidence` runs, in which order and how often; its annotators and tables, by hand."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from runs import refused
from torch import nn

import train_coreg
from benchmarks import evidence, planned, spoil, unlabelled
from benchmarks.conse import judged, placed, read_glosses
from benchmarks.evidence import plan
from benchmarks.evidence_sets import GLOSSES, SETS, ImageSet, divided, write_lists
from benchmarks.evidence_tables import Runs, main_table, picks_table, spread
from benchmarks.jobs import Job, cpu_seconds, run_jobs
from benchmarks.lite import named_like
from coreg.annotate import view
from coreg.annotate.view import View
from coreg.errors import UserError
from coreg.report.record import write_report
from coreg.store.store import AnnotationStore

# ---- the plan -----------------------------------------------------------------------------------------------------


def test_seeds_are_the_outermost_loop_and_all_is_raw_and_refined(tmp_path):
    jobs = plan(tmp_path, list(SETS), [0, 1], ["table"])
    runs = [job.name for job in jobs if job.name.endswith(("-0", "-1"))]
    assert runs == sorted(runs, key=lambda name: int(name[-1]))  # stable: all of seed 0 come first
    for name in SETS:
        for evidence_of in ("raw", "refined"):
            for method in ("kd", "partial", "alim", "coreg"):
                assert [runs.count(f"{name}/{method}-{evidence_of}-{seed}") for seed in (0, 1)] == [1, 1]
            # no seed changes a probe
            assert [runs.count(f"{name}/probe-{evidence_of}-{seed}") for seed in (0, 1)] == [1, 0]
    # what a recipe refines by itself would make raw runs refined ones
    students = [job for job in jobs if "--recipe" in job.command]
    assert students and all(" --refine none " in " ".join(job.command) for job in students)
    assert len({job.name for job in jobs}) == len({job.mark for job in jobs}) == len(jobs)


def test_every_need_is_the_mark_of_a_job_before(tmp_path):
    marks = set()
    for job in plan(tmp_path, list(SETS), [0, 1, 2], evidence.STAGES):
        assert set(job.needs) <= marks, job.name
        marks.add(job.mark)


def test_the_commands_are_ones_that_the_programs_take(tmp_path):
    """Each script of the plan is asked for its settings once with every combination of options that the plan has."""
    (tmp_path / "lite0").mkdir()  # the settings of a network are read beside its weights
    (tmp_path / "lite0" / "config.json").write_text('{"architecture": "efficientnet_lite0", "num_classes": 1000}')
    asked = {}
    for job in plan(tmp_path, list(SETS), [0], evidence.STAGES):
        script, *options = job.command
        if script in ("train_coreg.py", "baselines/pll.py", "baselines/distill.py", "baselines/probe.py"):
            asked[(script, *(word for word in options if word.startswith("--")))] = (script, options)
    assert len(asked) > 10
    for script, options in asked.values():
        module = __import__(script.removesuffix(".py").replace("/", "."), fromlist=["read_settings"])
        module.read_settings(options)


def test_a_missing_set_is_left_out_with_one_line_and_a_plan_runs_nothing(tmp_path, capsys):
    for split in ("train", "test"):
        (tmp_path / "data" / "gtsrb" / split).mkdir(parents=True)
    words = ["--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--plan"]
    assert evidence.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    left_out = [line for line in lines if line.startswith("left out")]
    assert [name in line for line, name in zip(left_out, ("CIFAR-10", "EuroSAT"))] == [True, True] and len(left_out) == 2
    assert any(" digits/coreg-refined-2: python train_coreg.py" in line for line in lines)
    assert any(" gtsrb/coreg-refined-2: " in line for line in lines) and not any(" eurosat/" in line for line in lines)
    assert not (tmp_path / "out").exists()


# ---- jobs, as real processes --------------------------------------------------------------------------------------

TOUCH = "import sys, pathlib; sum(range(3_000_000)); pathlib.Path(sys.argv[1]).write_text('x'); print('seen')"


def job(root, name, needs=(), code=TOUCH):
    return Job(name, ("-c", code, str(root / name)), root / name, tuple(root / need for need in needs))


def test_what_is_finished_is_skipped_and_needs_are_waited_for(tmp_path, capsys):
    (tmp_path / "old").write_text("kept")
    jobs = [job(tmp_path, "last", ("first",)), job(tmp_path, "old"), job(tmp_path, "first")]
    assert run_jobs(jobs, tmp_path, 2) == []
    assert (tmp_path / "old").read_text() == "kept" and (tmp_path / "last").exists()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["first", "last"]
    assert (tmp_path / "logs" / "first.log").read_text() == "seen\n"
    assert 0 < cpu_seconds(tmp_path, "first") < 60 and cpu_seconds(tmp_path, "old") is None
    assert run_jobs(jobs, tmp_path, 2) == [] and capsys.readouterr().out == ""


def test_a_job_that_fails_takes_along_what_needs_it_and_nothing_else(tmp_path, capsys):
    bad = job(tmp_path, "bad", code="import sys; sys.exit('error: no weights')")
    jobs = [bad, job(tmp_path, "after", ("bad",)), job(tmp_path, "other")]
    assert [one.name for one in run_jobs(jobs, tmp_path, 1)] == ["bad", "after"]
    assert (tmp_path / "other").exists() and "logs/bad.log" in capsys.readouterr().out
    assert "error: no weights" in (tmp_path / "logs" / "bad.log").read_text()


def test_seconds_of_several_starts_are_added(tmp_path):
    (tmp_path / "logs" / "set").mkdir(parents=True)
    (tmp_path / "logs" / "set" / "a.seconds").write_text("1.5\n2.0\n")
    assert cpu_seconds(tmp_path, "set/a") == 3.5


def test_a_fork_is_a_program_with_what_is_imported_already(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\nfrom pathlib import Path\nassert __name__ == '__main__' and sys.argv[0] == __file__\n"
        "Path(sys.argv[1]).write_text(str(os.getppid()))\nprint('out')\nprint('err', file=sys.stderr)\n"
        "if len(sys.argv) > 2:\n    Path(sys.argv[1]).unlink()\n    sys.exit(sys.argv[2])\n"
    )
    good = Job("set/good", (str(script), str(tmp_path / "good")), tmp_path / "good")
    bad = Job("bad", (str(script), str(tmp_path / "bad"), "error: no weights"), tmp_path / "bad")
    module = Job("module", ("-m", "benchmarks.tiny_clip", "--help"), tmp_path / "no mark")
    assert run_jobs([good, bad, module], tmp_path, 1, forked=True) == [bad, module]
    assert (tmp_path / "good").read_text() == str(os.getpid())
    logs = {name: (tmp_path / "logs" / f"{name}.log").read_text() for name in ("set/good", "bad", "module")}
    assert sorted(logs["set/good"].split("\n")) == ["", "err", "out"]
    assert sorted(logs["bad"].split("\n")) == ["", "err", "error: no weights", "out"]
    assert "tiny_clip" in logs["module"] and "--per_class" in logs["module"]
    assert 0 < cpu_seconds(tmp_path, "set/good") < 60


@pytest.mark.parametrize("forked", (False, True))
def test_a_stopped_program_stops_its_jobs_and_waits_for_what_they_save(tmp_path, forked):
    saving = tmp_path / "saving.py"
    saving.write_text(
        "import pathlib, signal, sys, time; sum(range(3_000_000))\n"
        "def save(*_):\n    time.sleep(0.3); pathlib.Path(sys.argv[1] + '.saved').write_text('x'); sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path(sys.argv[1] + '.begun').write_text('x')\ntime.sleep(120)\n"
    )
    code = (
        "from pathlib import Path; import sys; from benchmarks.jobs import Job, run_jobs\n"
        f"root = Path(sys.argv[1]); run_jobs([Job('a', (sys.argv[2], str(root / 'a')), root / 'a')], root, 1, {forked})"
    )
    outer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(saving)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (tmp_path / "a.begun").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(outer.pid, signal.SIGTERM)
    assert outer.wait(60) != 0 and (tmp_path / "a.saved").exists()
    assert cpu_seconds(tmp_path, "a") > 0


# ---- lists of images ----------------------------------------------------------------------------------------------


def test_lists_share_no_image_and_nothing_is_written_beside_the_data(tmp_path):
    data = tmp_path / "data"
    for split, count in (("train", 5), ("test", 3)):
        for folder in ("00_stop_sign", "01_no_entry"):
            (data / split / folder).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (4, 4)).save(data / split / folder / f"{number}.png")
    before = sorted(data.rglob("*"))
    chosen = ImageSet("signs", "clip", per_class=2, tested=3)
    write_lists(data, tmp_path / "out", chosen)
    write_lists(data, tmp_path / "out", chosen)  # again, as when a job goes on
    assert sorted(data.rglob("*")) == before
    assert (tmp_path / "out" / "classes.txt").read_text() == "stop sign\nno entry\n"
    rows = {name: list(csv.DictReader((tmp_path / "out" / name).open())) for name in ("images.csv", "others.csv")}
    assert [row["path"] for row in rows["others.csv"]] == [
        f"data/train/{folder}/{number}.png" for folder in ("00_stop_sign", "01_no_entry") for number in (2, 3, 4)
    ]
    assert [(row["label"], row["split"]) for row in rows["images.csv"]] == (
        [("stop sign", "train")] * 2
        + [("no entry", "train")] * 2
        + [("stop sign", "test")] * 3
        + [("no entry", "test")] * 3
    )
    assert all((tmp_path / "out" / row["path"]).is_file() for listed in rows.values() for row in listed)
    with pytest.raises(UserError, match="holds 5 images, 5 of them usable; 6 are wanted"):
        write_lists(data, tmp_path / "out", ImageSet("signs", "clip", per_class=6, tested=3))


def test_fewer_and_more_images_leave_out_those_that_the_annotator_has_seen(tmp_path):
    for split, count in (("train", 60), ("test", 2)):
        folder = tmp_path / "data" / split / "a"
        folder.mkdir(parents=True)
        for number in range(count):
            (folder / f"{number:02}.png").touch()
    chosen = ImageSet("A", "clip", per_class=1, tested=2, seen=(10, 13), many=55)
    write_lists(tmp_path / "data", tmp_path / "out", chosen)
    listed = {}
    for name in ("few", "many"):
        rows = list(csv.DictReader((tmp_path / "out" / f"{name}.csv").open()))
        assert [row["path"] for row in rows[-2:]] == ["data/test/a/00.png", "data/test/a/01.png"]
        assert [row["split"] for row in rows] == ["train"] * (len(rows) - 2) + ["test"] * 2
        listed[name] = [int(row["path"][-6:-4]) for row in rows[:-2]]
    assert listed == {"few": [*range(10), *range(13, 53)], "many": [*range(10), *range(13, 58)]}
    assert SETS["eurosat"].clip[1::2] == ("20", "100")  # of those after the first 80: the 100 from the 100th on
    assert SETS["eurosat"].per_class + 20 == SETS["eurosat"].seen[0] == SETS["eurosat"].seen[1] - 100


def test_pictures_of_one_scene_are_on_one_side_and_as_few_as_possible_of_each_are_taken():
    files = ["a1", "a2", "a3", "b1", "b2", "c1", "d1", "d2", "e1"]  # every third scene trains: a and d
    assert divided(files, 3, 1) == (["a1", "a2", "d1"], ["b1", "b2", "c1", "e1"])
    assert divided(files, 9, 1)[0] == ["a1", "a2", "a3", "d1", "d2"]  # fewer than wanted: write_lists refuses
    assert divided(files, 2, 0) == (files[:2], files[2:])


# ---- annotators ---------------------------------------------------------------------------------------------------


def test_conse_is_its_formula():
    generator = np.random.default_rng(0)
    p, known = generator.dirichlet(np.ones(4), 3), generator.normal(size=(4, 5))
    texts = generator.normal(size=(2, 3, 5))
    places, probs = placed(p, known), judged(placed(p, known), texts)
    for n in range(3):
        mean = [sum(known[k][d] for k in range(4)) / 4 for d in range(5)]
        e = [0.0] * 5
        for k in range(4):
            centred = [known[k][d] - mean[d] for d in range(5)]
            length = math.sqrt(sum(x * x for x in centred))
            e = [e[d] + p[n][k] * centred[d] / length for d in range(5)]
        length = math.sqrt(sum(x * x for x in e))
        e = [x / length for x in e]
        assert places[n] == pytest.approx(e)
        for t in range(2):
            scores = []
            for c in range(3):
                text = [texts[t][c][d] - sum(texts[t][i][d] for i in range(3)) / 3 for d in range(5)]
                length = math.sqrt(sum(x * x for x in text))
                scores.append(math.exp(20 * sum(a * b / length for a, b in zip(e, text))))
            assert probs[t, n] == pytest.approx([score / sum(scores) for score in scores])


def test_conse_of_meanings_that_are_all_the_same_knows_nothing():
    places = placed(np.full((2, 3), 1 / 3), np.ones((3, 4)))
    assert (places == 0).all() and judged(places, np.ones((1, 5, 4))) == pytest.approx(np.full((1, 2, 5), 0.2))


def test_glosses_are_lines_with_a_name_and_a_description(tmp_path):
    file = tmp_path / "glosses.txt"
    file.write_text("cat: a small animal: it purrs\n\ndog: another one\n")
    assert list(read_glosses(str(file)).items()) == [("cat", "a small animal: it purrs"), ("dog", "another one")]
    for wrong in ("cat\n", "cat: \n", ": x\n", "cat: x\ncat: y\n"):
        file.write_text(wrong)
        with pytest.raises(UserError, match="write `name: description`"):
            read_glosses(str(file))
    with pytest.raises(UserError, match="cannot read"):
        read_glosses(str(tmp_path / "none.txt"))


def test_the_glosses_at_hand_name_the_classes_of_their_set():
    assert list(read_glosses(str(GLOSSES / "cifar10.txt"))) == (
        "airplane automobile bird cat deer dog frog horse ship truck".split()
    )


def test_weights_get_their_names_by_order_and_only_where_all_shapes_agree():
    model = nn.Linear(2, 3)
    weights = {"a": torch.ones(3, 2), "b": torch.zeros(3)}
    assert {name: tensor.shape for name, tensor in named_like(model, weights).items()} == {
        "weight": (3, 2),
        "bias": (3,),
    }
    for wrong in ({"a": torch.ones(2, 3), "b": torch.zeros(3)}, {"a": torch.ones(3, 2)}):
        with pytest.raises(UserError, match="not those of Linear"):
            named_like(model, wrong)


def test_a_spoiled_row_is_moved_on_and_abstention_stays():
    votes, probs = np.array([[0, 2, -1], [2, 1, 0]], dtype=np.int16), np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    moved, shifted = spoil.moved_on(votes, probs, np.array([True, False]))
    assert moved.tolist() == [[1, 0, -1], [2, 1, 0]] and moved.dtype == np.int16
    assert shifted.tolist() == [[0.1, 0.7, 0.2], [0.0, 0.5, 0.5]]


def test_shares_of_spoiled_images_are_nested_and_features_stay(digits, tmp_path, capsys):
    spoiled = {}
    for share in ("0", "0.2", "0.6"):
        words = [str(digits.root), "--share", share, "--output_dir", str(tmp_path / share)]
        assert spoil.main(words) == 0
        worse = AnnotationStore.open(tmp_path / share)
        rows = spoiled[share] = (worse.probs() != digits.probs()).any(axis=1)
        np.testing.assert_array_equal(worse.votes()[rows], (digits.votes()[rows] + 1) % 10)
        np.testing.assert_array_equal(worse.votes()[~rows], digits.votes()[~rows])
        np.testing.assert_array_equal(worse.features(), digits.features())
        assert rows.mean() == pytest.approx(float(share), abs=0.04)
    assert not (spoiled["0.2"] & ~spoiled["0.6"]).any()
    wrong = [digits.root, "--share", "1.5", "--output_dir", tmp_path / "x"]
    assert refused(capsys, spoil.main, *wrong) == "error: --share is 1.5; write a share from 0 to 1"


# ---- tables -------------------------------------------------------------------------------------------------------


def report_of(accuracy, seed):
    judged_test = {"ensemble": accuracy, "interval": [0.0, 1.0], "n": 100}
    annotator = {"name": "a", "zero_shot_accuracy": {"test": 0.5}}
    return {"schema": 1, "method": "m", "dataset": "d", "seed": seed, "labels_used": 0} | {
        "annotator": annotator,
        "accuracy": {"test": judged_test},
        "label_free": {"covering_rate": {"train": 0.8, "test": 0.1}, "consensus": 0.9},
    }


def test_cells_are_means_and_spreads_of_what_is_finished(tmp_path):
    for seed, accuracy in ((0, 0.7), (1, 0.72)):
        run = tmp_path / "digits" / f"kd-raw-{seed}"
        run.mkdir(parents=True)
        write_report(run / "report.json", report_of(accuracy, seed))
        (tmp_path / "logs" / "digits").mkdir(parents=True, exist_ok=True)
        (tmp_path / "logs" / "digits" / f"kd-raw-{seed}.seconds").write_text("10\n" if seed else "10\n20\n")
    text = main_table(tmp_path, {"digits": "digits"}, {"kd": "KD", "coreg": "Co-Reg"}, [0, 1, 2])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert cells[0] == ["test accuracy", "digits, raw", "digits, refined", "digits, CPU s"]
    assert cells[2:] == [["KD", "71.0 ± 1.4", "–", "20"]]  # sd: 2 / sqrt(2); seconds: (30 + 10) / 2


def test_tables_of_nothing_are_left_out_and_a_page_has_a_place_for_them(tmp_path, capsys):
    run, page = tmp_path / "out" / "digits" / "coreg-raw-1", tmp_path / "page.md"
    run.mkdir(parents=True)
    write_report(run / "report.json", report_of(0.7, 1))
    page.write_text("Before.\n<!-- evidence -->\nold\n<!-- end of evidence -->\nAfter.\n")
    words = ["--data", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--tables", "--page", str(page)]
    assert evidence.main(words) == 0
    text = page.read_text()
    assert text.startswith("Before.\n<!-- evidence -->\n\n### All methods\n") and text.endswith("-->\nAfter.\n")
    assert "| Co-Reg" in text and "KD" not in text and "views" not in text and "old" not in text
    # the usual setting is no answer to a question by itself
    assert text.count("70.0") == 1 and "Threshold" not in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["digits", "evidence.md"]


def test_a_record_stands_for_the_runs_that_it_names(tmp_path, capsys, monkeypatch):
    """Runs of one folder, packed, are finished runs of another: the same tables, nothing run again, nothing lost."""
    record, first, second = tmp_path / "record.jsonl", tmp_path / "first", tmp_path / "second"
    for seed, accuracy in ((1, 0.7), (0, 1 / 3)):
        run = first / "digits" / f"kd-raw-{seed}"
        run.mkdir(parents=True)
        extra = {"refined": {"features": "own", "accuracy": {"test": 0.5}}, "last_epoch": {"loss": 1.0}}
        write_report(run / "report.json", report_of(accuracy, seed) | extra)
        (first / "logs" / "digits").mkdir(parents=True, exist_ok=True)
        (first / "logs" / "digits" / f"kd-raw-{seed}.seconds").write_text("10.5\n20\n")
    words = ["--data", str(tmp_path), "--tables", "--record", str(record), "--output_dir"]
    assert evidence.main([*words, str(first)]) == 0
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["run"] for line in lines] == ["digits/kd-raw-0", "digits/kd-raw-1"]
    assert lines[0]["cpu_seconds"] == 30.5 and lines[0]["report"]["accuracy"]["test"]["ensemble"] == 0.333333
    assert lines[0]["report"]["refined"]["accuracy"] == {"test": 0.5} and "last_epoch" not in lines[0]["report"]

    before = record.read_text()
    assert evidence.main([*words, str(second)]) == 0
    assert (second / "evidence.md").read_text() == (first / "evidence.md").read_text() and record.read_text() == before
    assert "51.7 ± 25.9" in (second / "evidence.md").read_text()

    # what a folder has anew does not replace what is recorded, and what only the record has is not lost
    shutil.rmtree(first / "digits" / "kd-raw-0")
    write_report(first / "digits" / "kd-raw-1" / "report.json", report_of(0.9, 1))
    assert evidence.main([*words, str(first)]) == 0 and record.read_text() == before
    begun = []
    monkeypatch.setattr(planned, "run_jobs", lambda jobs, *rest: begun.extend(jobs) or [])
    capsys.readouterr()
    del words[2]
    assert evidence.main([*words, str(tmp_path / "third"), "--stages", "table", "--seeds", "0", "1"]) == 0
    todo = {job.name for job in begun if not job.mark.exists()}
    assert "digits/kd-refined-0" in todo and not todo & {"digits/kd-raw-0", "digits/kd-raw-1"}

    record.write_text('{"run": "digits/kd-raw-0"}\n')
    message = refused(capsys, evidence.main, *words, tmp_path / "fourth")
    assert message.startswith(f"error: {record} is no record of runs (KeyError") and "another --record" in message


def test_preparations_are_made_only_for_what_is_left(tmp_path):
    jobs = [job(tmp_path, "weights"), job(tmp_path, "store", ("weights",)), job(tmp_path, "run", ("store",))]
    jobs += [job(tmp_path, "other store"), job(tmp_path, "other run", ("other store",)), job(tmp_path, "alone")]
    assert planned.needed(jobs) == jobs
    (tmp_path / "run").write_text("x")
    assert [one.name for one in planned.needed(jobs)] == ["run", "other store", "other run", "alone"]
    (tmp_path / "other store").write_text("x")
    assert [one.name for one in planned.needed(jobs)] == ["run", "other store", "other run", "alone"]


def test_shares_are_shown_with_the_epochs_and_with_the_steps_of_all_images(tmp_path):
    for name, accuracy in (("coreg_share_0.2_own", 0.4), ("coreg_steps_0.2_own", 0.8), ("coreg_mixup", 0.9)):
        run = tmp_path / "digits" / f"{name}-raw-0"
        run.mkdir(parents=True)
        labels = {"refined": {"features": "own", "accuracy": {"test": 0.6}}} if name != "coreg_mixup" else {}
        write_report(run / "report.json", report_of(accuracy, 0) | labels)
    text = evidence.tables(tmp_path, ["digits"], [0], ["questions"])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert cells[0][1:6] == [
        "refined labels",
        *(f"{how}, {what}" for how in ("Co-Reg", "as many steps") for what in ("raw", "refined")),
    ]
    assert cells[2] == ["0.2", "60.0", "–", "40.0", "–", "80.0", "0, 0", "0, 1, 0, 1"]
    assert cells[3] == ["1", "–", "90.0", "–", "90.0", "–", "0, 0", "1, 0, 1, 0"]


@pytest.mark.parametrize("share", evidence.SHARES)
def test_a_share_gets_as_many_steps_as_all_images(share):
    """All that recipe `digits` counts in epochs is longer by the same factor."""
    words = ["--recipe", "digits"]
    (usual_job, _, usual), (job_of, _, longer) = (
        train_coreg.read_settings([*words, *more]) for more in ((), evidence.as_many_steps(float(share)))
    )
    assert job_of.epochs == pytest.approx(usual_job.epochs / float(share), abs=0.5)
    for name in ("warmup_epochs", "rampup_epochs", "contrast_after"):
        assert getattr(longer, name) == pytest.approx(getattr(usual, name) / float(share), abs=0.5)


def test_the_labels_of_a_store_stand_beside_what_was_trained_on_them(tmp_path):
    for run, accuracy in (("labels-few_refined/averaged", 0.6), ("partial_128_e8_b16-few_refined-0", 0.7)):
        (tmp_path / "eurosat" / run).mkdir(parents=True)
        write_report(tmp_path / "eurosat" / run / "report.json", report_of(accuracy, 0))
    (tmp_path / "logs" / "eurosat").mkdir(parents=True)
    (tmp_path / "logs" / "eurosat" / "few_refined.seconds").write_text("20\n")
    text = evidence.tables(tmp_path, ["digits", "eurosat"], [0], ["amounts"])
    assert text.startswith("### Recipe folder, 500 images\n") and "EuroSAT" in text and "CIFAR" not in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:]]
    assert cells == [
        ["EuroSAT", "the labels, nothing trained", "80.0", "–", "90.0", "60.0", "20", "1"],
        ["EuroSAT", "partial cross-entropy, 128 pixels, 8 epochs, batch 16", "80.0", "–", "90.0", "70.0", "0", "1"],
    ]


def test_what_the_rule_loses_is_counted_over_the_seeds_of_which_all_runs_are_finished(tmp_path):
    runs = {("a", 0): (0.7, 0.9), ("b", 0): (0.8, 0.5), ("a", 1): (0.7, 0.5), ("b", 1): (0.6, 0.9), ("a", 2): (0.9, 0.9)}
    for (name, seed), (accuracy, consensus) in runs.items():
        run = tmp_path / "digits" / f"{name}-raw-{seed}"
        run.mkdir(parents=True)
        scores = {"covering_rate": {"train": 0.8, "test": 0.8}, "consensus": consensus}
        write_report(run / "report.json", report_of(accuracy, seed) | {"label_free": scores})
    among = {"two": {"A": ("a", "raw"), "B": ("b", "raw")}, "three": {"A": ("a", "raw"), "C": ("c", "raw")}}
    text = picks_table(tmp_path, {"digits": "Digits"}, among, [0, 1, 2])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert cells == [["Digits", "two", "A; B", "B; A", "10.0 ± 0.0", "5.0 ± 0.0", "2"]]


def test_one_run_has_no_spread_and_missing_scores_are_left_out():
    assert spread([71.26]) == "71.3" and spread([]) == "–"
    runs = Runs({0: report_of(0.7, 0), 1: report_of(0.7, 1) | {"label_free": None}}, [])
    assert runs.without_labels("covering_rate") == [80.0] and runs.without_labels("consensus") == [90.0]


# ---- a view of another origin -------------------------------------------------------------------------------------


def test_contrast_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    z = [row / row.norm() for row in (*first, *second)]
    total = 0.0
    for i in range(6):
        partner = (i + 3) % 6
        others = sum(math.exp(float(z[i] @ z[j]) / 0.5) for j in range(6) if j != i)
        total -= math.log(math.exp(float(z[i] @ z[partner]) / 0.5) / others)
    assert float(unlabelled.contrast(first, second, 0.5)) == pytest.approx(total / 6, rel=1e-5)


def test_a_network_is_trained_without_labels_and_gives_a_view(small_store, tmp_path, capsys):
    words = [str(small_store), "--size", "8", "--channels", "1", "--epochs", "2", "--no_flip"]
    for name in ("a", "b"):
        assert unlabelled.main([*words, "--output_dir", str(tmp_path / name)]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1] and "use it with" in capsys.readouterr().out
    shutil.copytree(small_store, tmp_path / "store")
    pixels = ["--image_size", "8", "--channels", "1", "--mirror", "false", "--workers", "0"]
    assert view.main([str(tmp_path / "store"), "--backbone", f"local-dir:{tmp_path / 'a'}", *pixels]) in (0, None)
    store = AnnotationStore.open(tmp_path / "store")
    features = View.open(store.root / "views" / "a-8", store).features()
    assert features.shape == (len(store), 128) and features.std(axis=0).max() > 0
    assert "exists" in refused(capsys, unlabelled.main, *words, "--output_dir", str(tmp_path / "a"))
