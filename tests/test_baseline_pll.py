"""baselines/pll.py through its own entry point and the real launcher: reports, resuming, refusals, processes."""

import copy
import csv
import dataclasses
import html
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import final_state, on_two_processes, refused, script, signalled_after, with_method

from coreg.data.decode import decode
from coreg.export.ensemble import Ensemble
from coreg.export.folder import load_export
from coreg.export.programs import as_program
from coreg.learn.partial import METHODS
from coreg.run.watch import EXIT_INTERRUPTED
from coreg.store.store import AnnotationStore

pll = script("pll")

# 97 images of three classes in batches of 13; every starting time is over after the first of three epochs
SMALL = [
    "--recipe", "digits", "--refine", "none",
    "--dtype", "float64", "--channels", "3", "--image_size", "12", "--backbone_args",
    '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}', "--epochs", "3", "--batch_size", "13",
    "--workers", "0", "--report_to", "none",
]  # fmt: skip
OWN = {
    "queue_size": 50,
    "projection_dim": 8,
    "correction_margin": 0,
    "noise_rate": 0.2,
    "plan_queue": 30,
    "estimation": 0.4,
}


TWO_HEADED = [
    "--backbone", "deit_tiny_distilled_patch16_224", "--image_size", "16",
    "--backbone_args", '{"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}',
]  # fmt: skip


def small_run(store, output, method, *more):
    pll.main(["--annotations", str(store), "--output_dir", str(output), *SMALL, *with_method(method, **OWN), *more])
    return final_state(output), json.loads((output / "report.json").read_text())


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k].nan_to_num(), theirs[k].nan_to_num()) for k in ours)


def test_two_epochs_on_the_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the script asks nothing of where it is started
    short = ["--epochs", "2", "--workers", "0"]
    pll.main(["--method", "proden", *short, "--output_dir", "proden"])  # annotates them first
    store = ["--annotations", "proden/annotations", "--recipe", "digits", "--refine", "none"]
    pll.main(["--method", "pico_plus", *store, *short, "--output_dir", "pico_plus"])
    for method in ("proden", "pico_plus"):
        report = json.loads(Path(method, "report.json").read_text())
        assert report["method"] == pll.NAMES[method] and report["preset"] == "matched" and report["labels_used"] == 0
        assert report["accuracy"]["test"]["n"] == 360
        assert report["accuracy"]["test"]["ensemble"] > 0.3
        files = {path.name for path in Path(method).iterdir()}
        assert {"job.json", "config.yaml", "labels.csv", "export", "checkpoints"} <= files
        assert len(final_state(Path(method))["learners"]) == 1


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_runs_to_its_report_and_the_same_command_again_does_nothing(small_store, tmp_path, method, capsys):
    state, report = small_run(small_store, tmp_path / "run", method)
    assert all(value.isfinite().all() for key, value in state["learners"][0].items() if "log_margin" not in key)
    assert report["method"] == pll.NAMES[method]
    assert report["labels_used"] == (97 if method == "supervised" else 0)
    assert report["annotator"]["mean_candidates"] > 1
    assert report.get("noise_rate", {}).get("source") == ("given" if method.startswith("alim") else None)
    table = state["learners"][0].get("confidence")
    if table is not None:
        torch.testing.assert_close(table.sum(1), torch.ones(97, dtype=torch.float64))
    capsys.readouterr()
    small_run(small_store, tmp_path / "run", method)
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["records", "htc"])
def test_an_export_predicts_as_the_method_does(small_store, tmp_path, method):
    """Not as its network does: what it was judged by, what the report has, and its export agree; the card says so."""
    state, report = small_run(small_store, tmp_path / "run", method, "--epochs", "2")
    (net,), settings = load_export(tmp_path / "run")
    store = AnnotationStore.open(small_store)
    rows = np.flatnonzero(store.split == 0)
    pixels = decode(store.images(), rows, 12, 3, 0, {})
    ensemble = Ensemble([net], settings).eval()
    with torch.no_grad():
        logits = ensemble(pixels)[0]
    if method == "htc":  # a module that programs have not met
        torch.testing.assert_close(as_program(ensemble, settings, "torch_export")[1](pixels), logits)
    labels = [row["label"] for row in csv.DictReader((tmp_path / "run" / "labels.csv").open())]
    assert [store.class_names[row] for row in logits.argmax(1)] == labels
    assert np.mean(store.labels[rows] == logits.argmax(1).numpy()) == pytest.approx(report["accuracy"]["train"]["ensemble"])
    weights = {key.removeprefix("net.backbone."): value.float() for key, value in state["learners"][0].items()}
    if method == "htc":
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, weights[key])
        confidence = state["learners"][0]["confidence"]
        torch.testing.assert_close(net.fc.prior, (confidence.sum(0) / confidence.sum()).float())
    else:
        prior = (weights["fc.weight"] @ weights["feature_mean"] + weights["fc.bias"]).softmax(0)
        torch.testing.assert_close(net.fc.bias, weights["fc.bias"] - (prior + 1e-9).log())
    assert report["prediction"] in html.unescape((tmp_path / "run" / "export" / "README.md").read_text().replace("\\", ""))


def test_what_a_method_judges_by_is_tested_reported_and_exported(small_store, tmp_path, monkeypatch):
    def certain_of_the_last_class(self):
        net = copy.deepcopy(self.net)
        net.backbone.fc.bias.data[-1] += 1000
        return net

    monkeypatch.setattr(METHODS["proden"], "judged", certain_of_the_last_class)
    state, report = small_run(small_store, tmp_path / "run", "proden")
    store = AnnotationStore.open(small_store)
    share = float((store.labels[store.split == 1] == 2).mean())
    assert [epoch["accuracy/test/ensemble"] for epoch in state["curves"]] == [pytest.approx(share)] * 3
    assert report["accuracy"]["test"]["ensemble"] == pytest.approx(share)
    rows = csv.DictReader((tmp_path / "run" / "labels.csv").open())
    assert {row["label"] for row in rows} == {store.class_names[2]}
    (net,), _ = load_export(tmp_path / "run")
    assert net.fc.bias[2].item() > 900 > state["learners"][0]["net.backbone.fc.bias"].max().item()


@pytest.mark.parametrize("method", ["proden", "cr_dpll", "pico", "lws"])
def test_the_authors_settings_train_too(small_store, tmp_path, method):
    state, report = small_run(small_store, tmp_path / "run", method, "--preset", "official", "--epochs", "1")
    assert report["preset"] == "official" and all(np.isfinite(list(curves.values())).all() for curves in state["curves"])


@pytest.mark.parametrize(
    "switch",
    [
        ["rc", "--gradient_accumulation_steps", "3"],
        ["pico_plus"],
        ["irnet"],
        ["alim_scale", "--few_shot", "2"],
        ["solar"],
        ["htc", "--few_shot", "2"],
        *(pytest.param([method], marks=pytest.mark.slow) for method in ("able", "idgp", "records")),
    ],
    ids=" ".join,
)
def test_stopped_at_any_step_it_goes_on_bit_for_bit(small_store, tmp_path, monkeypatch, capsys, switch):
    whole, _ = small_run(small_store, tmp_path / "whole", *switch)
    steps, stops = iter([3, 8, 2, 1000, 1000]), 0
    while not (tmp_path / "run" / "report.json").exists():
        try:
            with signalled_after(monkeypatch, next(steps)):
                state, _ = small_run(small_store, tmp_path / "run", *switch)
        except SystemExit as stopped:
            assert stopped.code == EXIT_INTERRUPTED
            stops += 1
    assert stops == 3
    assert same(whole["learners"][0], state["learners"][0]) and whole["curves"] == state["curves"]


def settings(*arguments):
    return pll.read_settings(["--annotations", "ann", *arguments])


# method: recipe: what its authors train with on that data set (papers and public code)
AUTHORS = {
    "able": {"cifar10": {"lr": 0.01, "weight_decay": 1e-3, "epochs": 500, "batch_size": 64, "contrast_temperature": 0.1}},
    "idgp": {"cifar100": {"lr": 1e-3, "weight_decay": 1e-3, "epochs": 500, "batch_size": 256, "joint_start": 5 / 500}},
    "solar": {
        "cifar10": {"epochs": 1000, "estimation": 0.1, "selected": [0.2, 0.6], "prior_rate": [0.1, 0.01]},
        "cifar100": {"epochs": 1000, "estimation": 0.02, "selected": [0.2, 0.5], "prior_rate": [0.05, 0.01]},
    },
    "records": {"cifar10": {"lr": 0.01, "weight_decay": 1e-3, "epochs": 800, "batch_size": 256, "update_start": 1}},
    "htc": {"cifar10": {"lr": 0.01, "weight_decay": 1e-3, "epochs": 800, "batch_size": 256, "logit_adjustment": 2}},
    "pico": {
        "cifar10": {"lr": 0.01, "weight_decay": 1e-3, "epochs": 800, "batch_size": 256, "prototype_start": 1},
        "cifar100": {"lr": 0.01, "weight_decay": 1e-3, "epochs": 800, "batch_size": 256, "prototype_start": 1},
    },
    "pico_plus": {
        "cifar10": {"epochs": 800, "prototype_start": 5, "neighbours": 16, "neighbour_start": 100 / 800},
        "cifar100": {
            "epochs": 800,
            "batch_size": 256,
            "prototype_start": 50,
            "neighbours": 5,
            "neighbour_start": 100 / 800,
        },
    },
    "irnet": {  # the margin is tau C
        "cifar10": {"epochs": 1000, "batch_size": 128, "symmetric": True, "correction_margin": 0.02 * 10},
        "cifar100": {"epochs": 1000, "batch_size": 128, "symmetric": False, "correction_margin": 0.002 * 100},
    },
    "alim_scale": {
        "cifar10": {"epochs": 1000, "batch_size": 128, "correction_start": 80 / 1000, "mixup_alpha": 4},
        "cifar100": {"epochs": 1000, "batch_size": 128, "correction_start": 80 / 1000, "mixup_alpha": 4},
    },
    "cr_dpll": {
        "cifar10": {"lr": 0.1, "batch_size": 64, "epochs": 200, "weak_view": "cr_weak", "strong_view": "cr_strong"},
        "cifar100": {"lr": 0.1, "batch_size": 64, "epochs": 200, "weak_view": "cr_weak", "strong_view": "cr_strong"},
        "svhn": {"lr": 0.1, "batch_size": 64, "epochs": 200, "weak_view": "plain", "strong_view": "cr_strong_svhn"},
        "fashion_mnist": {"lr": 0.1, "batch_size": 64, "epochs": 200, "weak_view": "cr_weak", "strong_view": "strong"},
    },
}


@pytest.mark.parametrize("method", AUTHORS)
def test_the_authors_settings_are_those_for_the_data_set_that_the_recipe_names(method):
    for recipe, values in AUTHORS[method].items():
        groups = settings("--recipe", recipe, "--method", method, "--preset", "official")
        options = {name: value for group in groups for name, value in vars(group).items()}
        for name, value in values.items():
            assert options[name] == (value if isinstance(value, str) else pytest.approx(value)), (recipe, name)
    assert (
        settings("--recipe", "cifar100_synthetic", "--method", method, "--preset", "official")[2]
        == (settings("--recipe", "cifar100", "--method", method, "--preset", "official")[2])
    )


def test_a_recipe_of_ones_own_names_its_data_set_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("dataset: cifar100\nimage_size: 64\n")
    official = ["--method", "pico_plus", "--preset", "official", "--recipe", str(recipe)]
    _, image_options, method = settings(*official)
    assert (image_options.image_size, method.prototype_start, method.neighbours) == (64, 50, 5)
    assert settings(*official, "--neighbours", "7")[2].neighbours == 7
    assert settings(*official, "--dataset", "cifar10")[2].prototype_start == 5
    matched = settings("--method", "pico_plus", "--recipe", str(recipe))[2]
    assert (matched.prototype_start, matched.neighbours) == (1, 16)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["pico_plus"], "no official values of PiCO+ for digits; those for cifar10"),
        (
            ["lws", "--dataset", "cifar100"],
            "no official values of LWS for cifar100; those for cifar10",
        ),
        (["pico_plus", "--dataset", "cifar100"], None),
        (["pico_plus", "--preset", "matched"], None),
    ],
)
def test_one_line_where_the_authors_give_no_values(small_store, tmp_path, capsys, more, line):
    _, report = small_run(small_store, tmp_path / "run", more[0], "--preset", "official", "--epochs", "1", *more[1:])
    notes = [text for text in capsys.readouterr().out.splitlines() if "official values" in text]
    assert len(notes) == (line is not None) and all(line in note for note in notes)
    assert report.get("official_for") == (None if "matched" in more else "cifar100" if line is None else "cifar10")


def test_the_authors_settings_win_over_the_recipe_and_the_command_line_over_both():
    job, _, method = settings("--recipe", "cifar10", "--method", "alim_scale")
    assert (job.epochs, job.batch_size, job.weight_decay, method.weak_view) == (800, 256, 5e-4, "weak")
    job, image_options, method = settings(
        "--recipe", "cifar10", "--method", "alim_scale", "--preset", "official", "--batch_size", "64"
    )
    assert (job.epochs, job.batch_size, job.weight_decay) == (1000, 64, 1e-3)
    assert (method.weak_view, method.strong_view, method.correction_start) == ("pico_weak", "pico_strong", 0.08)
    assert image_options.mean == [0.4914, 0.4822, 0.4465]  # what belongs to the data stays the recipe's
    for name in METHODS:
        job, _, method = settings("--recipe", "folder", "--method", name, "--preset", "official")
        assert job.optimizer == "sgd"  # their learning rates would be far too large for the recipe's


def test_learning_rates():
    job, *_ = settings("--epochs", "200", "--lr", "0.1", "--lr_floor", "0")
    rates = {
        name: [pll.learning_rate(job, name, e) for e in (0, 40, 99, 100, 150)] for name in ("cosine", "halving", "steps")
    }
    assert rates["cosine"] == pytest.approx([0.1, *(0.05 * (1 + np.cos(np.pi * e / 200)) for e in (40, 99, 100, 150))])
    assert rates["halving"] == pytest.approx([0.1, 0.05, 0.1 * 0.5**2.475, 0.1 * 0.5**2.5, 0.1 * 0.5**3.75])
    assert rates["steps"] == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "prodenn"], "prodenn"),
        (["--method", "pico_plus", "--pure_ratio", "0"], "--pure_ratio is 0.0"),
        (["--method", "pico", "--confidence_momentum", "0.9"], "two numbers"),
        (["--method", "alim_scale", "--noise_rate", "1.5"], "--noise_rate is 1.5"),
        (["--method", "irnet", "--correction_start", "80"], "give a number from 0 to 1"),
        (
            ["--queue_size", "5"],
            "--queue_size is no option of --method proden; these have it: pico, pico_plus, irnet, alim",
        ),
        (["--method", "cc", "--pure_ratio", "1"], "--pure_ratio is no option of --method cc; these have it: pico_plus"),
        (["--contrast_after", "3"], "--contrast_after"),
        (["--method", "htc", "--selected", "0.5"], "--selected is 0.5; give two numbers"),
        (["--method", "records", *TWO_HEADED], "needs a classifier that is one linear layer"),
        (["--method", "htc", *TWO_HEADED], "needs a classifier that is one linear layer"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(small_store, tmp_path, capsys, arguments, message):
    line = refused(capsys, pll.main, "--annotations", small_store, "--output_dir", tmp_path / "run", *SMALL, *arguments)
    assert message in line and not (tmp_path / "run").exists()


def with_other_store(monkeypatch, change):
    """Let every store that is opened be another one."""
    opened = AnnotationStore.open
    monkeypatch.setattr(AnnotationStore, "open", lambda path: change(opened(path)))


def test_supervised_training_needs_labels(small_store, tmp_path, monkeypatch, capsys):
    with_other_store(monkeypatch, lambda store: dataclasses.replace(store, labels=None))
    with pytest.raises(SystemExit):
        small_run(small_store, tmp_path / "run", "supervised")
    assert "needs true labels" in capsys.readouterr().err


def test_images_that_no_template_could_name_are_left_out(small_annotated, tmp_path, monkeypatch):
    votes = AnnotationStore.votes

    def abstained(self):
        changed = votes(self).copy()
        changed[:10] = -1
        return changed

    monkeypatch.setattr(AnnotationStore, "votes", abstained)
    state, report = small_run(small_annotated, tmp_path / "run", "proden")
    store = AnnotationStore.open(small_annotated)
    silent = int((store.split[:10] == 0).sum())
    assert silent and state["images_seen"] == 3 * (97 - silent)
    confidence = state["learners"][0]["confidence"]
    assert int((confidence == 1 / 3).all(1).sum()) == silent  # nothing was learned about them
    assert report["images"]["train"] == 97


def test_the_noise_rate_is_counted_on_labelled_images(small_annotated, tmp_path):
    more = ["alim_scale", "--few_shot", "8", "--noise_rate", "-1"]
    _, report = small_run(small_annotated, tmp_path / "run", *more)
    store = AnnotationStore.open(small_annotated)
    drawn = [line.rsplit(",", 1)[0] for line in (tmp_path / "run" / "known_labels.csv").read_text().splitlines()[1:]]
    rows = [store.paths.index(path) for path in drawn]
    missed = sum(store.labels[row] not in store.votes()[row].tolist() for row in rows)
    assert report["noise_rate"] == {"value": pytest.approx(missed / 24), "source": "counted on 24 labelled images"}
    _, report = small_run(small_annotated, tmp_path / "unknown", "alim_scale", "--noise_rate", "-1")
    assert report["noise_rate"] == {"value": -1, "source": "unknown; classes outside the sets weigh 0.4"}


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "method", ["pico_plus", "alim_scale", "irnet", "rc", "cr_dpll", "able", "idgp", "solar", "records", "htc"]
)
def test_two_processes_train_like_one(small_store, tmp_path, method):
    small = ["--annotations", str(small_store), *with_method(method, **OWN), *SMALL]
    pll.main([*small, "--output_dir", str(tmp_path / "one")])
    on_two_processes(pll.main, *small, "--output_dir", tmp_path / "two")
    ours, theirs = (final_state(tmp_path / name)["learners"][0] for name in ("one", "two"))
    if method == "irnet":  # it had something to correct
        offered = json.loads((tmp_path / "one" / "report.json").read_text())["annotator"]["mean_candidates"]
        assert ours["candidates"].sum() > 97 * offered + 5
    assert ours.keys() == theirs.keys()
    for name in ours:
        if ours[name].is_floating_point():
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-10, equal_nan=True)
        else:
            assert torch.equal(ours[name], theirs[name]), name
