"""The main job through its own entry point: files written, resumed bit for bit, refused with one line."""

import csv
import importlib.util
import json
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL_JOB
from runs import final_state, killed_at, refused, signalled_after

import train_coreg
from coreg.annotate.view import View, views_of
from coreg.run import checkpoint
from coreg.run.training import build_optimizer
from coreg.run.watch import EXIT_INTERRUPTED
from coreg.settings import JobConfig
from coreg.store.store import AnnotationStore, StoreWriter
from coreg.views.order import drawn_part
from coreg.weak.refine import refine

SHORT = ["--epochs", "4", "--warmup_epochs", "1", "--contrast_after", "0", "--queue_size", "256", "--workers", "0"]


@pytest.fixture(scope="module")
def annotations(digits):
    return digits.root


def run(annotations, output, *more):
    arguments = ["--annotations", str(annotations), "--recipe", "digits", "--output_dir", str(output), *SHORT]
    train_coreg.main([*arguments, *more])


@pytest.fixture(scope="module")
def finished(annotations, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    run(annotations, output)
    return output


def test_the_report_has_what_people_compare(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["schema"] == 1 and report["method"] == "Co-Reg" and report["dataset"] == "builtin:digits"
    assert report["annotator"]["name"] == "builtin:glyph-clip"
    assert set(report["annotator"]["zero_shot_accuracy"]) == {"train", "test"}
    for split, n in (("train", 1437), ("test", 360)):
        assert report["accuracy"][split]["n"] == n
        for name in ("ensemble", "net1", "net2"):
            assert 0 <= report["accuracy"][split][name] <= 1
    assert next(iter(report["per_class_accuracy"])) == "zero" and len(report["per_class_accuracy"]) == 10
    assert sum(row["n"] for row in report["per_class_accuracy"].values()) == 360
    for key in ("parameters", "images_per_second", "wall_seconds", "peak_memory_mb", "command", "versions", "seed"):
        assert report[key] not in (None, "", {})
    assert -1 / 9 <= report["last_epoch"]["prototypes/mean_cosine"] <= 1  # ten directions cannot lie further apart
    assert 1 <= report["last_epoch"]["prototypes/effective_rank"] <= 10


def test_the_run_folder_is_complete(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"job.json", "config.yaml", "report.json", "labels.csv", "export", "checkpoints", "tensorboard"} <= names
    assert len((finished / "labels.csv").read_text().splitlines()) == 1438
    assert len(list((finished / "checkpoints").iterdir())) == 2
    assert not list(finished.rglob("*.tmp*"))


def test_the_same_command_again_says_that_it_is_finished(annotations, finished, capsys):
    before = (finished / "report.json").stat().st_mtime_ns
    run(annotations, finished)
    assert "finished" in capsys.readouterr().out
    assert (finished / "report.json").stat().st_mtime_ns == before
    hostile = finished.with_name("whole\x1b[31m")
    hostile.symlink_to(finished)
    run(annotations, hostile)
    hostile.unlink()
    output = capsys.readouterr().out
    assert "finished" in output and "whole\\x1b[31m" in output and "\x1b" not in output


@pytest.mark.parametrize("epoch", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_killed_run_goes_on_bit_for_bit(annotations, finished, tmp_path, monkeypatch, epoch):
    """Killed right after the checkpoint of epoch 1 (warm-up) or 3 (co-training with contrast), then started again."""
    with killed_at(monkeypatch, epoch):
        run(annotations, tmp_path / "run")
    run(annotations, tmp_path / "run")
    expected, actual = (final_state(folder) for folder in (finished, tmp_path / "run"))
    for ours, theirs in zip(expected["learners"], actual["learners"]):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for key in ("losses", "weights"):
        assert all(torch.equal(a, b) for a, b in zip(expected["divisions"][key], actual["divisions"][key]))
    assert expected["curves"] == actual["curves"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(annotations, finished, tmp_path, monkeypatch):
    with killed_at(monkeypatch, 3):
        run(annotations, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    damaged = folder / f"{checkpoint.latest(folder):08d}" / "state.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="damaged"):
        run(annotations, tmp_path / "run")
    expected, actual = (final_state(folder) for folder in (finished, tmp_path / "run"))
    assert expected["curves"] == actual["curves"]


def test_another_job_in_the_folder_is_refused(annotations, finished, capsys):
    arguments = ["--annotations", str(annotations), "--recipe", "digits", "--output_dir", str(finished), *SHORT]
    message = refused(capsys, train_coreg.main, *arguments, "--lr", "0.5")
    assert "lr was 0.03 and is 0.5" in message


def test_a_folder_with_other_things_is_refused_and_left_alone(annotations, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    message = refused(capsys, train_coreg.main, "--annotations", str(annotations), "--output_dir", str(tmp_path))
    assert "thesis.tex" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--lrr", "1"], "did you mean --lr?"),
        (["--epochs", "many"], "--epochs"),
        (["--epochs", "5", "--warmup_epochs", "6"], "--warmup_epochs"),
        (["--recipe", "digit"], "did you mean digits?"),
        (["--backbone", "preact_resnet19"], "did you mean preact_resnet18?"),
        (["--backbone_args", "{norm: 1}"], "is not a JSON object"),
        (["--backbone_args", '{"sugar": 1}'], "does not take"),
        (["--strong_ops", "rotate", "explode"], "explode"),
        (["--mean", "0.5", "0.5"], "--mean has 2 numbers"),
        (["--annotations", "nowhere"], "nowhere"),
        (["--candidates", "onion"], "onion"),
        (["--temperature", "0"], "--temperature"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, annotations, arguments, reason):
    monkeypatch.chdir(tmp_path)
    own = [] if "--annotations" in arguments else ["--annotations", str(annotations)]
    recipe = [] if "--recipe" in arguments else ["--recipe", "digits"]
    message = refused(capsys, train_coreg.main, *own, *recipe, "--output_dir", "run", *arguments)
    assert reason in message
    assert not (tmp_path / "run").exists()


def test_exploding_losses_stop_with_a_message_and_keep_the_last_checkpoint(annotations, tmp_path, capsys):
    arguments = ["--annotations", str(annotations), "--recipe", "digits", "--output_dir", str(tmp_path / "run"), *SHORT]
    answer_before = signal.getsignal(signal.SIGINT)
    message = refused(capsys, train_coreg.main, *arguments, "--lr", "1e6")
    assert "smaller --lr" in message
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGINT) == answer_before


def test_a_tracker_that_is_missing_is_an_error_before_anything_is_written(small_store, tmp_path, monkeypatch, capsys):
    out = ["--output_dir", str(tmp_path / "run"), *SHORT, "--refine", "none"]
    arguments = ["--annotations", str(small_store), "--recipe", "digits", *out]
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else there(name, *a))
    message = refused(capsys, train_coreg.main, *arguments, "--report_to", "wandb")
    assert "--report_to wandb needs the package wandb" in message and "pip install wandb" in message
    assert "write one of tensorboard, wandb" in refused(capsys, train_coreg.main, *arguments, "--report_to", "wandbb")
    assert not (tmp_path / "run").exists()


def test_the_digits_are_refined_unless_that_is_switched_off_or_cannot_be(small_store, finished, tmp_path, capsys):
    report = json.loads((finished / "report.json").read_text())
    assert report["refined"]["features"] == "own"
    # the annotator's evidence is mended by more than one could by chance: 360 images, 3 standard errors
    gain = report["refined"]["accuracy"]["test"] - report["annotator"]["zero_shot_accuracy"]["test"]
    assert gain > 3 * (2 * 0.25 / 360) ** 0.5
    out = ["--output_dir", str(tmp_path / "run"), *SHORT]
    message = refused(capsys, train_coreg.main, "--annotations", str(small_store), "--recipe", "digits", *out)
    assert "keeps no features" in message and "--refine none" in message
    message = refused(capsys, train_coreg.main, "--annotations", str(finished / "refined"), "--recipe", "digits", *out)
    assert "refined already" in message and "--refine none" in message
    assert not (tmp_path / "run").exists()


def test_two_jobs_cannot_share_a_folder(annotations, tmp_path, capsys):
    from coreg.run.folder import RunFolder

    output = tmp_path / "run"
    with RunFolder(output).locked():
        arguments = ["--annotations", str(annotations), "--recipe", "digits", "--output_dir", str(output), *SHORT]
        message = refused(capsys, train_coreg.main, *arguments)
    assert "another job is running" in message


@pytest.mark.parametrize(
    "switch",
    [[], ["--preset", "fast"], ["--gradient_accumulation_steps", "3"], ["--optimizer", "adamw", "--lr", "0.001"]],
    ids=" ".join,
)
def test_stopped_at_any_step_by_a_signal_it_goes_on_bit_for_bit(small_store, tmp_path, monkeypatch, capsys, switch):
    """SIGTERM or SIGUSR1 again and again, after so many steps each time, until the job is through."""
    whole, _ = small_run(small_store, tmp_path / "whole", *switch)
    steps, stops = iter([1, 5, 3, 11, 2, 7, 4, 9, 1, 6] + [1000] * 5), 0
    while not (tmp_path / "run" / "report.json").exists():
        try:
            with signalled_after(monkeypatch, next(steps), signal.SIGUSR1 if stops % 2 else signal.SIGTERM):
                state, _ = small_run(small_store, tmp_path / "run", *switch)
        except SystemExit as stopped:
            assert stopped.code == EXIT_INTERRUPTED and "Stopped by a signal" in capsys.readouterr().out
            stops += 1
    assert stops >= 5
    for ours, theirs in zip(whole["learners"], state["learners"]):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole["curves"] == state["curves"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_checkpoint_of_another_layout_is_one_line(small_store, tmp_path, monkeypatch, capsys):
    """As earlier versions wrote them, with what divisions remember among the rest."""
    with killed_at(monkeypatch, 1):
        small_run(small_store, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    for number in sorted(int(path.name) for path in folder.iterdir()):
        state = checkpoint.load(folder, number)
        checkpoint.save(folder, number, state | state.pop("divisions"))
    line = refused(capsys, train_coreg.main, "--annotations", small_store, "--output_dir", tmp_path / "run", *SMALL_JOB)
    assert "does not hold this training (there is no 'divisions')" in line and "start the training anew" in line


def test_optimizers_take_the_first_step_that_their_equations_say():
    w, g = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64), torch.tensor([0.3, -4.0, 1e-3], dtype=torch.float64)
    # AdamW's first step is the gradient's sign, beside a decay that the gradient has no part in
    expected = {"sgd": w - 0.1 * (g + 0.2 * w), "adamw": w * (1 - 0.1 * 0.2) - 0.1 * g / (g.abs() + 1e-8)}
    for name, weights in expected.items():
        net = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
        net.weight.data, net.weight.grad = w.clone()[None], g.clone()[None]
        build_optimizer(net, JobConfig(optimizer=name, lr=0.1, momentum=0.9, weight_decay=0.2)).step()
        torch.testing.assert_close(net.weight.data[0], weights)


def test_averaged_gradients_move_the_weights_less_often(small_store, small, tmp_path):
    state, _ = small_run(small_store, tmp_path / "run", "--gradient_accumulation_steps", "1000")
    assert state["updates"] > 0 and not torch.equal(weights_of(state), weights_of(small[0]))


def small_run(store, output, *more):
    train_coreg.main(["--annotations", str(store), "--output_dir", str(output), *SMALL_JOB, *more])
    return final_state(output), json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def small(small_store, tmp_path_factory):
    return small_run(small_store, tmp_path_factory.mktemp("small") / "run")


def test_images_that_were_moved_are_trained_on_in_their_new_place(small_store, small, tmp_path, capsys):
    """The same run, bit for bit, which is the same job with and without the new place."""
    store = AnnotationStore.open(small_store)
    shutil.copytree(store.images_spec, tmp_path / "new")
    moved = shutil.copytree(small_store, tmp_path / "store")
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["images"]["spec"] = str(tmp_path / "nowhere")
    (moved / "manifest.json").write_text(json.dumps(manifest))
    line = refused(capsys, train_coreg.main, "--annotations", moved, "--output_dir", tmp_path / "run", *SMALL_JOB)
    assert (
        "cannot be opened" in line and "say with --images where to" in line and not (tmp_path / "run" / "job.json").exists()
    )
    state, report = small_run(moved, tmp_path / "run", "--images", str(tmp_path / "new"))
    assert torch.equal(weights_of(state), weights_of(small[0]))
    assert report["dataset"] == str(tmp_path / "new")
    small_run(small_store, tmp_path / "run")  # finished: it is one job
    job = json.loads((tmp_path / "run" / "job.json").read_text())
    assert not {"images", "data_root"} & set(job) and job["store"] == store.hash
    line = refused(capsys, train_coreg.main, "--images", tmp_path / "new", "--output_dir", tmp_path / "other")
    assert "give that too" in line


def test_a_store_in_which_no_template_names_a_class_is_refused(small_annotated, tmp_path, capsys):
    store = AnnotationStore.open(small_annotated)
    writer = StoreWriter(tmp_path / "silent", store.manifest)
    votes, probs = np.full_like(store.votes(), -1), np.full_like(store.probs(), 1 / 3)
    writer.write_all(store.images(), lambda rows: {"votes": votes[rows], "probs": probs[rows]})
    line = refused(capsys, train_coreg.main, "--annotations", writer.root, "--output_dir", tmp_path / "run", *SMALL_JOB)
    assert "no template names a class of any training image" in line


def weights_of(state):
    return torch.cat([tensor.flatten() for name, tensor in state["learners"][0].items() if name.startswith("net.")])


@pytest.mark.parametrize(
    "switch",
    [
        ["--preset", "paper"],
        ["--preset", "fast"],
        ["--co_pseudo_labels", "false"],
        ["--use_unlabeled", "false"],
        ["--contrast_weight", "0"],
        ["--contrast", "supervised"],
        ["--contrast", "hcp"],
        ["--contrast", "hcpn"],
        ["--contrast", "unsupervised"],
        ["--prototype_weight", "0"],
        ["--prototype_form", "paper"],
        ["--prototype_update", "all"],
        ["--mixup_alpha", "0"],
        ["--alignment", "none"],
        ["--alignment", "annotator"],
        ["--squared_error", "sum"],
        ["--guess_mode", "eval"],
        ["--division_view", "plain"],
        ["--warmup_view", "weak"],
        ["--entropy_weight", "0"],
        ["--key_reset", "never"],
        ["--history", "1"],
        ["--optimizer", "adamw"],
        ["--warmup_epochs", "3"],
        ["--queue_size", "5000"],
        ["--batch_size", "96"],
    ],
    ids=" ".join,
)
def test_every_switch_trains_and_changes_the_result(small_store, small, tmp_path, switch):
    state, report = small_run(small_store, tmp_path / "run", *switch)
    assert weights_of(state).isfinite().all() and 0 <= report["accuracy"]["test"]["ensemble"] <= 1
    if switch == ["--queue_size", "5000"]:
        return  # nothing was pushed out of a queue larger than the data: only then may the result differ
    if switch[0] == "--guess_mode":
        return  # without batch statistics both modes predict the same
    assert not torch.equal(weights_of(state), weights_of(small[0]))


def test_merged_guesses_are_the_same_where_no_batch_statistics_are(small_store, small, tmp_path):
    state, _ = small_run(small_store, tmp_path / "run", "--guess_mode", "eval")
    torch.testing.assert_close(weights_of(state), weights_of(small[0]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("mode", ["replace", "replace+repeat", "extra_ce"])
def test_few_shot_labels_are_trusted_and_counted(small_store, tmp_path, mode):
    state, report = small_run(small_store, tmp_path / "run", "--few_shot", "2", "--label_mode", mode)
    assert report["labels_used"] == 6
    assert all((weight == 1).sum() >= 6 for weight in state["divisions"]["weights"])


def test_a_persons_own_labels(small_store, tmp_path, capsys):
    own = tmp_path / "mine.csv"
    own.write_text("path,label\ntrain/a/0.png,b\ntrain/b/1.png,b\n")
    _, report = small_run(small_store, tmp_path / "run", "--labels", str(own))
    assert report["labels_used"] == 2
    assert sorted((tmp_path / "run" / "known_labels.csv").read_text().splitlines()) == sorted(own.read_text().splitlines())
    own.write_text("path,label\ntrain/a/0.png,a\ntrain/b/1.png,b\n")
    arguments = ["--annotations", str(small_store), "--output_dir", str(tmp_path / "run"), *SMALL_JOB, "--labels", str(own)]
    assert "known_labels was" in refused(capsys, train_coreg.main, *arguments)
    own.write_text("path,label\ntest/a/0.png,a\n")
    assert "labels test images" in refused(capsys, train_coreg.main, *arguments)


def test_print_config_shows_preset_below_recipe_below_command_line(capsys):
    train_coreg.main(["--preset", "paper", "--recipe", "digits", "--history", "3", "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["preset"] == "paper" and settings["alignment"] == "none"  # the preset's
    assert settings["contrast_after"] == 4  # the recipe's
    assert settings["history"] == 3


def test_a_share_of_the_images(small_store, tmp_path, monkeypatch, capsys):
    """Training, refinement, labels to draw from and reports are about the images that were drawn; test images stay."""
    store = AnnotationStore.open(small_store)
    shutil.copytree(small_store, tmp_path / "ann")
    words = ["--annotations", str(tmp_path / "ann"), *SMALL_JOB, "--few_shot", "2", "--refine", "view", "--share"]
    train_coreg.main([*words, "0.25", "--output_dir", str(tmp_path / "a")])
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["images"] == {"train": 24, "test": 5} and report["part"] == {"asked": 0.25, "available": 97}
    assert "Trained on 24 of 97 training images." in capsys.readouterr().out
    rows = drawn_part(np.flatnonzero(store.split == 0), 24, 0)
    drawn = {store.paths[row] for row in rows}
    for name, n in (("labels.csv", 24), ("known_labels.csv", 6)):
        paths = [row["path"] for row in csv.DictReader((tmp_path / "a" / name).open())]
        assert len(paths) == n and set(paths) <= drawn
    # what was refined is what the drawn images alone give; the others keep their evidence
    refined = AnnotationStore.open(tmp_path / "a" / "refined")
    (folder,) = views_of(store := AnnotationStore.open(tmp_path / "ann"))
    features, test = View.open(folder, store).features(), np.flatnonzero(store.split == 1)
    both = np.concatenate([rows, test])
    record, places = refined.manifest["refined"], np.arange(len(both))
    expected = refine(features[both], store.probs()[both], places[:24], places[24:], record["prior"], record["weight"])
    np.testing.assert_array_equal(refined.probs()[both].argmax(axis=1), expected.probs.argmax(axis=1))
    assert record["part"]["images"] == 24
    left = np.setdiff1d(np.arange(len(store)), both)
    np.testing.assert_array_equal(refined.probs()[left], store.probs()[left])
    changed = record["changed"]["accuracy"]["after"]["train"]
    assert changed == pytest.approx((refined.probs()[rows].argmax(1) == store.labels[rows]).mean())
    # as many images, said as a number, are the same training; killed it goes on; another share is another job
    with killed_at(monkeypatch, 1):
        train_coreg.main([*words, "24", "--output_dir", str(tmp_path / "b")])
    train_coreg.main([*words, "24", "--output_dir", str(tmp_path / "b")])
    before, after = (final_state(tmp_path / name)["learners"][0] for name in "ab")
    assert all((before[key] == after[key]).all() for key in before)
    line = refused(capsys, train_coreg.main, *words, "0.5", "--output_dir", tmp_path / "a")
    assert "share was 0.25 and is 0.5" in line


@pytest.mark.parametrize(("share", "reason"), [
    ("0.01", "is 1 of the 97 readable"), ("98", "no more than there are"), ("2.5", "a whole number"), ("0", "--share"),
])  # fmt: skip
def test_shares_that_cannot_be_had(small_store, tmp_path, capsys, share, reason):
    words = ["--annotations", small_store, *SMALL_JOB, "--share", share, "--output_dir", tmp_path / "x"]
    assert reason in refused(capsys, train_coreg.main, *words)
    assert not (tmp_path / "x").exists()
