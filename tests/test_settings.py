"""The settings of every script: what `--help` lists, and that the settings of a run are a recipe that repeats it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from runs import final_state, script

import annotate_vlm
import train_coreg
from coreg.learn.partial_options import OFFICIAL, OPTIONS
from coreg.run.settings import official_notes

SCRIPTS = {"train_coreg": train_coreg, "annotate_vlm": annotate_vlm}
SCRIPTS |= {name: script(name) for name in ("coop", "distill", "dividemix", "lora", "pll", "probe", "zero_shot")}
METHODS = [["--method", method] for method in OPTIONS]
RUNS = [
    ["train_coreg"],
    ["train_coreg", "--preset", "paper", "--recipe", "cifar100", "--history", "3", "--lr", "0.02"],
    ["train_coreg", "--recipe", "folder", "--annotations", "ann", "--few_shot", "4", "--mean", "0.1", "0.2", "0.3"],
    ["distill", "--recipe", "svhn", "--kd_temperature", "2"],
    ["dividemix", "--preset", "official", "--recipe", "folder", "--batch_size", "48", "--rampup_epochs", "7"],
    ["dividemix", "--preset", "official", "--lr_schedule", "cosine", "--dataset", "cifar100"],
    ["probe", "--features", "own", "--head", "cosine", "--penalty", "3e-7"],
    *(["pll", *more, "--preset", "official", "--lr", "0.3", "--weak_view", "plain", "--dataset", "svhn"]
      for more in METHODS),
    ["pll", "--method", "alim_scale", "--confidence_momentum", "0.9", "0.7"],
    ["coop"],
    ["coop", "--preset", "paper", "--shots", "4", "--context_init", "a photo of a"],
    ["coop", "--vlm", "chat:x", "--lr", "1", "--labels", "some where.csv"],
    ["lora", "--epochs", "3", "--flip", "true"],
    ["lora", "--vlm", "chat:x", "--rank", "3", "--template", "{}?"],
]  # fmt: skip


def settings(name, *arguments):
    """The settings of a script, plain values by name."""
    return {key: value for group in SCRIPTS[name].read_settings(list(arguments)) for key, value in vars(group).items()}


@pytest.mark.parametrize("words", RUNS, ids=lambda words: " ".join(words)[:60])
def test_the_settings_of_a_run_are_a_recipe_that_repeats_it(words, tmp_path, monkeypatch, capsys):
    name, *arguments = words
    monkeypatch.setattr("sys.argv", [name])
    monkeypatch.chdir(tmp_path)
    SCRIPTS[name].main([*arguments, "--print_config"])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    again = settings(name, "--recipe", "config.yaml")
    assert again == settings(name, *arguments)
    # what is typed wins over it, and nothing else does
    assert settings(name, "--recipe", "config.yaml", "--seed", "9") == again | {"seed": 9}


def test_a_finished_run_with_a_preset_and_an_override_is_repeated_bit_for_bit(small_store, tmp_path):
    small = ["--image_size", "12", "--backbone_args", '{"widths": [8], "depths": [1]}', "--epochs", "1", "--workers", "0"]
    job = [
        "--annotations",
        str(small_store),
        "--recipe",
        "cifar10",
        "--method",
        "lws",
        "--preset",
        "official",
        "--lr",
        "0.2",
    ]
    SCRIPTS["pll"].main([*job, *small, "--output_dir", str(tmp_path / "a")])
    SCRIPTS["pll"].main(["--recipe", str(tmp_path / "a" / "config.yaml"), "--output_dir", str(tmp_path / "b")])
    one, two = (json.loads((tmp_path / name / "job.json").read_text()) for name in "ab")
    assert one == two and (one["lr"], one["schedule"], one["preset"]) == (0.2, "halving", "official")
    ours, theirs = (final_state(tmp_path / name)["learners"][0] for name in "ab")
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


def test_the_config_of_an_older_version_is_read_and_repeated():
    """It has the options of all methods, flat, as run folders had them before each method got its own."""
    file = Path(__file__).with_name("frozen_config.yaml")
    old, new = yaml.safe_load(file.read_text()), settings("pll", "--recipe", str(file))
    assert (new["method"], new["preset"], new["batch_size"], new["epochs"]) == ("irnet", "official", 48, 1000)
    assert {key: new[key] for key in old if key in new} == {key: old[key] for key in old if key in new}
    assert set(old) - set(new) == {
        "leverage", "consistency_weight", "consistency_ramp", "mixup_alpha", "pure_ratio", "neighbours", "neighbour_start",
        "noise_rate", "importance",
    }  # fmt: skip


@pytest.mark.parametrize("method", OFFICIAL)
def test_a_flat_recipe_wins_over_official_values_and_its_defaults_do_not(method, tmp_path):
    flat, layered = tmp_path / "flat.yaml", tmp_path / "layered.yaml"
    dataset = next(iter(OFFICIAL[method]))
    flat.write_text(f"dataset: {dataset}\nlr: 0.123\n")
    layered.write_text(f"dataset: {dataset}\ndefaults:\n  lr: 0.123\n  momentum: 0.4\n")
    official = ["--method", method, "--preset", "official", "--recipe"]
    assert settings("pll", *official, str(flat))["lr"] == 0.123
    job, _, options = SCRIPTS["pll"].read_settings([*official, str(flat), "--batch_size", "7"])
    note = official_notes(OFFICIAL[method], "It", job, options)
    kept = ["lr 0.123", "batch_size 7"] if method not in ("lws", "lwc") else ["batch_size 7", "lr 0.123"]
    assert note == f"note: --preset official but for {', '.join(kept)}, from recipe or command line"
    values = settings("pll", *official, str(layered))
    assert (values["lr"], values["momentum"]) == (OFFICIAL[method][dataset]["lr"], 0.4)
    assert settings("pll", "--method", method, "--recipe", str(layered))["lr"] == 0.123


def listed(name, capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[name].read_settings(list(arguments))
    assert stopped.value.code == 0
    return set(re.findall(r"^  (?:-h, )?--(\w+)", capsys.readouterr().out, flags=re.MULTILINE))


@pytest.mark.parametrize(
    ("name", "more"), [*((name, []) for name in SCRIPTS), *(("pll", more) for more in METHODS)], ids=str
)
def test_help_lists_at_most_thirty_options_and_help_all_every_one(name, more, capsys):
    few, every = listed(name, capsys, *more, "--help"), listed(name, capsys, *more, "--help_all")
    groups = SCRIPTS[name].read_settings(more)
    groups = groups if isinstance(groups, tuple) else (groups,)
    assert every == {f.name for group in groups for f in dataclasses.fields(group)} | {"help", "help_all", "recipe"}
    assert few <= every and len(few) <= 30


def test_help_of_a_method_lists_its_options_and_no_others(capsys):
    pico, cc = (listed("pll", capsys, "--method", method, "--help_all") for method in ("pico", "cc"))
    assert {"prototype_start", "queue_size", "contrast_weight"} <= pico - cc
    assert not {"pure_ratio", "noise_rate", "leverage", "symmetric", "consistency_weight"} & pico
