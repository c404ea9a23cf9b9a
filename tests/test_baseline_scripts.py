"""The scripts of baselines/ through their own entry points, and run_all.sh and flips.sh with a stand-in for Python."""

import dataclasses
import json
import os
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from runs import killed_at, refused, script, zero_shot_accuracy

import train_coreg
from coreg.annotate.textual import averaged_embedding_logits, single_template_probabilities, text_side
from coreg.demo.annotator import local_dir
from coreg.errors import UserError
from coreg.learn.two_nets import Verdict, co_train_batch
from coreg.report.compare import read_run
from coreg.run import checkpoint
from coreg.run.task import Task
from coreg.store.store import AnnotationStore
from coreg.views.augment import Augmentation
from coreg.views.resident import TrainingImages
from coreg.weak.labels import WeakLabels
from coreg.weak.rules import candidate_sets

ROOT = Path(__file__).parents[1]
# 97 images of three classes in batches of 13
SMALL = [
    "--recipe", "digits", "--refine", "none",
    "--dtype", "float64", "--channels", "3", "--image_size", "12", "--backbone_args",
    '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}', "--epochs", "2", "--batch_size", "13", "--workers", "0",
    "--report_to", "none",
]  # fmt: skip


names = ("zero_shot", "distill", "dividemix", "pll", "probe", "spml")
zero_shot, distill, dividemix, pll, probe, spml = (script(name) for name in names)


def small_run(module, store, output, *more):
    module.main(["--annotations", str(store), "--output_dir", str(output), *SMALL, *more])
    state = checkpoint.load(output / "checkpoints", checkpoint.latest(output / "checkpoints"))
    return state, json.loads((output / "report.json").read_text())


# ---- zero-shot and the text side -------------------------------------------------------------------------------------


def test_every_way_of_zero_shot_leaves_a_report(digits, tmp_path, capsys):
    arguments = ["--annotations", str(digits.root), "--output_dir", str(tmp_path / "z")]
    zero_shot.main(arguments)
    output = capsys.readouterr().out
    reports = {variant: read_run(tmp_path / "z" / variant / "report.json").report for variant in zero_shot.VARIANTS}
    assert all("Zero-shot" in report["method"] and report["labels_used"] == 0 for report in reports.values())
    for variant, alone in (("single", True), ("averaged", False)):
        for split, share in zero_shot_accuracy(digits, single_template=alone).items():
            assert reports[variant]["accuracy"][split]["ensemble"] == pytest.approx(share)
    assert reports["averaged"]["annotator"]["partial_accuracy"] > 0.9
    table = reports["single"]["templates"]
    assert list(table) == digits.templates and all(template in output for template in table)
    votes, test = digits.votes(), digits.split == 1
    for number, shares in enumerate(table.values()):
        assert shares["test"] == pytest.approx((votes[test, number] == digits.labels[test]).mean())
    assert reports["transductive"]["accuracy"]["test"]["ensemble"] > reports["averaged"]["accuracy"]["test"]["ensemble"]
    assert reports["neighbours"]["accuracy"]["test"]["ensemble"] > reports["averaged"]["accuracy"]["test"]["ensemble"]
    assert reports["refined"]["accuracy"]["test"]["ensemble"] > 0.91
    # scores without labels: of one template there are votes and no probabilities, and no variant has two networks
    scores = {variant: report["label_free"] for variant, report in reports.items()}
    assert set(scores["single"]) == {"covering_rate"}
    assert all(
        set(by_split) == {"covering_rate", "approximated_accuracy"} for name, by_split in scores.items() if name != "single"
    )
    sets, probs, named = candidate_sets(digits), digits.probs().astype(float), digits.probs().argmax(axis=1)
    sure = [probs[i, named[i]] / probs[i, sets[i]].sum() if sets[i, named[i]] else 0.0 for i in np.flatnonzero(test)]
    assert scores["averaged"]["approximated_accuracy"]["test"] == pytest.approx(np.mean(sure), abs=1e-5)
    files = sorted((tmp_path / "z").glob("*/report.json"))
    before = [file.stat().st_mtime_ns for file in files]
    zero_shot.main(arguments)
    assert [file.stat().st_mtime_ns for file in files] == before and capsys.readouterr().out == output


def test_one_template_alone_says_what_it_voted_and_all_together_what_is_stored(digits):
    annotator = text_side(digits, digits.templates)
    features = torch.from_numpy(digits.features()).float()
    text = annotator.text.view(len(digits.templates), len(digits.class_names), -1)
    every = [torch.softmax(annotator.scale * features @ one.T, dim=1).numpy() for one in text]
    single = single_template_probabilities(digits)
    assert single.dtype == np.float16 and (single.argmax(axis=1) == digits.votes()[:, 0]).mean() > 0.999
    np.testing.assert_allclose(single, every[0], atol=1e-3)
    np.testing.assert_allclose(np.mean(every, axis=0), digits.probs().astype(np.float32), atol=1e-3)


def test_averaged_embeddings_are_those_of_open_clip_itself(digits):
    folder = f"local-dir:{local_dir()}"
    network, tokenizer = open_clip.create_model(folder), open_clip.get_tokenizer(folder)
    with torch.no_grad():
        text = []
        for name in digits.class_names:
            each = network.encode_text(tokenizer([t.replace("{}", name) for t in digits.templates]), normalize=True)
            text.append(each.mean(dim=0) / each.mean(dim=0).norm())
        expected = (torch.from_numpy(digits.features()).float() @ torch.stack(text).T).argmax(dim=1)
    assert (averaged_embedding_logits(digits).argmax(axis=1) == expected.numpy()).mean() > 0.999


def test_what_a_store_does_not_tell_is_left_out_or_refused(small_annotated, tmp_path, capsys):
    arguments = ["--annotations", small_annotated, "--output_dir", tmp_path / "z"]
    zero_shot.main([str(word) for word in arguments])
    output = capsys.readouterr().out
    assert output.count("left out") == 4 and "keeps no features" in output
    assert sorted(path.parent.name for path in (tmp_path / "z").glob("*/report.json")) == ["averaged", "single"]
    assert not (tmp_path / "z" / "embeddings").exists()
    for variant in ("embeddings", "neighbours", "transductive", "refined"):
        assert "keeps no features" in refused(capsys, zero_shot.main, *arguments, "--variant", variant)
    # another store in the same folder
    (tmp_path / "y" / "averaged").mkdir(parents=True)
    (tmp_path / "y" / "averaged" / "job.json").write_text('{"schema": 1, "store": "other"}')
    arguments[-1] = tmp_path / "y"
    assert "another job" in refused(capsys, zero_shot.main, *arguments, "--variant", "averaged")
    assert "another job" in refused(capsys, zero_shot.main, *arguments)


def test_an_annotator_that_cannot_be_had_is_named(tmp_path):
    def store(spec, weights="w"):
        its_manifest = {"features": 4, "model": {"spec": spec, "weights": weights, "precision": "fp32"}}
        return SimpleNamespace(
            manifest=its_manifest,
            root=tmp_path,
            class_names=["a", "b"],
            templates=["{}"],
            descriptions=None,
            temperature=1.0,
            kept_texts=lambda: None,
            need_annotator=lambda: None,
            need_features=lambda: None,
        )

    with pytest.raises(UserError, match="does not exist"):
        text_side(store(f"local-dir:{tmp_path / 'gone'}"), ["{}"])
    with pytest.raises(UserError, match="its files changed"):
        text_side(store("builtin:glyph-clip"), ["{}"])
    with pytest.raises(UserError, match="unknown model"):
        text_side(store("models:clip"), ["{}"])


@pytest.mark.parametrize("module", [zero_shot, distill], ids=["zero_shot", "distill"])
def test_what_was_drawn_from_true_labels_has_no_annotator_to_judge_or_to_distil(small_store, tmp_path, capsys, module):
    network = ["--recipe", "digits", "--refine", "none"] if module is distill else []
    line = refused(capsys, module.main, "--annotations", small_store, "--output_dir", tmp_path / "run", *network)
    assert "holds candidate sets that were drawn from true labels" in line and "annotate_vlm.py" in line
    assert not list((tmp_path / "run").glob("**/report.json"))


# ---- distillation ----------------------------------------------------------------------------------------------------


def test_distillation_on_the_digits(digits, tmp_path):
    distill.main([
        "--annotations", str(digits.root), "--recipe", "digits", "--refine", "none",
        "--epochs", "2", "--workers", "0", "--teacher", "single",
        "--output_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["method"] == "KD, single template" and report["labels_used"] == 0
    assert "probabilities under the first template" in report["teacher"]
    assert report["accuracy"]["test"]["ensemble"] > 0.5
    # one network: no second opinion in report or export
    assert set(report["accuracy"]["test"]) == {"ensemble", "n", "interval"}
    assert (tmp_path / "run" / "export" / "net1").is_dir() and not (tmp_path / "run" / "export" / "net2").exists()


def teacher_of(store, teacher, known):
    task = SimpleNamespace(
        store=store,
        data=SimpleNamespace(samples=torch.arange(len(store))),
        method=SimpleNamespace(teacher=teacher),
        weak=SimpleNamespace(known=known, certain=known >= 0),
        accelerator=SimpleNamespace(device="cpu"),
    )
    return distill.teacher_of(task)


def test_teachers(digits, small_annotated):
    nobody = np.full(len(digits), -1)
    averaged, _ = teacher_of(digits, "averaged", nobody)
    np.testing.assert_array_equal(averaged, digits.probs())
    single, description = teacher_of(digits, "single", nobody)
    np.testing.assert_array_equal(single, single_template_probabilities(digits))
    # without features the first template's votes have to do, and no vote is no opinion
    small = AnnotationStore.open(small_annotated)
    votes, description = teacher_of(small, "single", np.full(len(small), -1))
    assert "votes of the first template, because" in description and "keeps no features" in description
    spoken = small.votes()[:, 0] >= 0
    assert (votes[spoken].argmax(axis=1) == small.votes()[spoken, 0]).all() and (votes.max(axis=1)[spoken] == 1).all()
    np.testing.assert_allclose(votes.sum(axis=1), 1)
    # what a person says stands in for either
    given = nobody.copy()
    given[5] = 7
    probs, _ = teacher_of(digits, "averaged", given)
    assert probs[5].tolist() == [0] * 7 + [1, 0, 0]


# ---- DivideMix -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switch",
    [
        (), ("--labels_from", "single", "--train_view", "weak", "--lr_schedule", "step"),
        ("--few_shot", "2", "--mixup_alpha", "0"), ("--few_shot", "2", "--label_mode", "extra_ce"),
        ("--warmup_epochs", "0"), ("--warmup_epochs", "2"),
    ],
    ids=str,
)  # fmt: skip
def test_dividemix_runs_to_its_report(small_store, tmp_path, switch):
    warm_up = () if "--warmup_epochs" in switch else ("--warmup_epochs", "1")
    state, report = small_run(dividemix, small_store, tmp_path / "run", *warm_up, *switch)
    assert len(state["learners"]) == 2 and state["epoch"] == 2
    assert all(value.isfinite().all() for learner in state["learners"] for value in learner.values())
    assert report["method"] == dividemix.NAMES["single" if "single" in switch else "averaged"]
    assert report["labels_used"] == (6 if "--few_shot" in switch else 0)
    assert set(report["accuracy"]["test"]) == {"ensemble", "net1", "net2", "n", "interval"}
    assert len(state["divisions"]["weights"]) == (0 if switch[-2:] == ("--warmup_epochs", "2") else 2)


def test_dividemix_takes_one_of_the_candidates_where_sets_were_drawn():
    sets = np.random.default_rng(0).random((20_000, 5)) < 0.5
    sets[~sets.any(axis=1), 0] = True
    weak = WeakLabels.from_truth(np.zeros(20_000, dtype=np.int64), 5, "flip", 0, q=0.0, eta=0.0)
    given = {
        "store": SimpleNamespace(drawn=True, class_names="abcde"),
        "data": SimpleNamespace(samples=torch.arange(20_000)),
        "weak": dataclasses.replace(weak, table=sets),
        "annotator": sets.argmax(axis=1),
        "job": SimpleNamespace(seed=1, prefilter="none"),
        "method": SimpleNamespace(labels_from="averaged"),
        "accelerator": SimpleNamespace(device="cpu"),
    }
    task = Task(**(dict.fromkeys(field.name for field in dataclasses.fields(Task)) | given))
    labels = dividemix.one_label_each(task).weak.table
    assert (labels.sum(axis=1) == 1).all() and not (labels & ~sets).any()
    # each candidate equally often
    assert np.allclose(labels.mean(axis=0), (sets / sets.sum(axis=1, keepdims=True)).mean(axis=0), atol=0.02)


def test_dividemix_on_the_digits(digits, tmp_path):
    dividemix.main([
        "--annotations", str(digits.root), "--recipe", "digits", "--refine", "none",
        "--epochs", "2", "--warmup_epochs", "1", "--workers", "0",
        "--output_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["method"] == "DivideMix, averaged" and report["preset"] == "matched"
    assert report["accuracy"]["test"]["ensemble"] > 0.2 and 0 < report["last_epoch"]["division/trusted"] < 1
    assert (tmp_path / "run" / "export" / "net2").is_dir()


def test_official_settings_win_over_the_recipe_and_the_command_line_over_both(capsys):
    def settings(*arguments):
        job, _, method = dividemix.read_settings(["--recipe", "digits", *arguments])
        return job.lr, job.epochs, job.batch_size, method.train_view, method.warmup_epochs, method.lr_schedule

    assert settings() == (0.03, 30, 64, "strong", 6, "cosine")
    assert settings("--preset", "official") == (0.02, 300, 64, "weak", 10, "step")
    # the authors warm up longer for a hundred classes
    assert settings("--preset", "official", "--recipe", "cifar100") == (0.02, 300, 64, "weak", 30, "step")
    ours, theirs = (dividemix.read_settings(["--recipe", "folder", *more])[0] for more in ([], ["--preset", "official"]))
    assert (ours.optimizer, ours.lr, theirs.optimizer, theirs.lr) == ("adamw", 0.001, "sgd", 0.02)
    assert settings("--preset=official", "--epochs", "40", "--train_view", "strong") == (0.02, 40, 64, "strong", 10, "step")
    assert "--warmup_epochs" in refused(capsys, dividemix.main, "--epochs", "2", "--warmup_epochs", "3")
    assert "--kd_temperature" in refused(capsys, distill.main, "--kd_temperature", "0")


def test_weak_views_train_on_what_was_guessed_from():
    images = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augmentation = Augmentation(8, 2, False, mean=(0.5,), std=(0.5,))
    data = TrainingImages(images, torch.arange(9), augmentation, torch.device("cpu"), seed=0)
    verdict = Verdict(torch.ones(9), torch.eye(3)[torch.arange(9) % 3], np.arange(9) < 6)
    made = co_train_batch(data, np.arange(6), np.arange(6, 9), verdict, (1, 0, 2), mixup_alpha=4.0, view="weak")
    assert torch.equal(made.strong, torch.cat([*made.x_weak, *made.u_weak]))
    assert not torch.equal(made.x_weak[0], made.x_weak[1])


@pytest.mark.parametrize(("module", "more"), [(dividemix, ("--warmup_epochs", "1")), (distill, ())], ids=["two", "one"])
def test_a_killed_run_goes_on_bit_for_bit(small_annotated, tmp_path, monkeypatch, module, more, capsys):
    """Killed at a checkpoint within the second epoch, then started again, and once more when it is finished."""
    more = (*more, "--checkpoint_minutes", "0")
    expected, _ = small_run(module, small_annotated, tmp_path / "whole", *more)
    with killed_at(monkeypatch, 1, 2):
        small_run(module, small_annotated, tmp_path / "run", *more)
    actual, _ = small_run(module, small_annotated, tmp_path / "run", *more)
    for ours, theirs in zip(expected["learners"], actual["learners"]):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert expected["curves"] == actual["curves"]
    capsys.readouterr()
    small_run(module, small_annotated, tmp_path / "run", *more)
    assert "finished" in capsys.readouterr().out


# ---- run_all.sh ------------------------------------------------------------------------------------------------------

STAND_IN = """#!/bin/sh
echo "$*" >> "$COMMANDS"
for word; do [ "$last" = --output_dir ] && folder=$word; last=$word; done
case "$*" in
*--print_config*) echo "epochs: 30"; echo "warmup_epochs: 6" ;;
*coreg.report* | *annotate_vlm*) ;;
*"$BROKEN"*) exit 1 ;;
*zero_shot_tags*) mkdir -p "$folder/image" && : > "$folder/image/report.json" ;;
*zero_shot*) mkdir -p "$folder/averaged" && : > "$folder/averaged/report.json" ;;
*) mkdir -p "$folder" && : > "$folder/report.json" ;;
esac
"""


STUDENTS = ("pll", "distill", "dividemix")


def run_all(tmp_path, *options, broken="nothing", script="run_all.sh"):
    """Exit code, what was said on stderr, and the modules that were started, with their arguments."""
    python, commands = tmp_path / "python", tmp_path / "commands"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    commands.write_text("")
    environment = os.environ | {"PYTHON": str(python), "COMMANDS": str(commands), "BROKEN": broken}
    done = subprocess.run(
        [str(ROOT / "baselines" / script), "--output_dir", str(tmp_path / "out"), *options],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    started = [shlex.split(line) for line in commands.read_text().splitlines()]
    assert all(words[0] == "-m" for words in started)
    return done.returncode, done.stderr, [words[1:] for words in started]


def test_run_all_starts_every_method_once_and_skips_what_is_finished(tmp_path):
    code, stderr, commands = run_all(tmp_path, "--seeds", "0 1", "--shots", "4", "--jobs", "4", "--compute_matched")
    assert code == 0 and stderr == ""
    jobs = [words for words in commands if "--seed" in words]
    folders = [words[words.index("--output_dir") + 1] for words in jobs]
    assert len(set(folders)) == len(folders) == 2 * (24 + 24 + 2 + 2 + 3)
    started = {(words[0], words[words.index("--epochs") + 1]) for words in jobs if "--epochs" in words}
    # as many passes as 30 epochs of Co-Reg: 360 of one network that goes forth and back
    assert ("coreg.baselines.distill", "360") in started and ("coreg.baselines.dividemix", "43") in started
    methods = {words[words.index("--method") + 1] for words in jobs if "--method" in words}
    assert methods == set(pll.NAMES)
    # every command is one that its script understands
    for words in jobs:
        own = [word for word in words[1:] if word != "--print_config"]
        if words[0] == "coreg.baselines.pll":
            pll.read_settings(own)
        elif words[0] == "coreg.baselines.dividemix":
            dividemix.read_settings(own)
        elif words[0] == "coreg.baselines.probe":
            probe.read_settings(own)
    code, stderr, again = run_all(tmp_path, "--seeds", "0 1", "--shots", "4", "--compute_matched")
    assert code == 0 and not [words for words in again if "--seed" in words]


def test_run_all_of_few_epochs_shortens_a_warm_up_that_is_longer(tmp_path):
    for epochs, wanted in (("2", "1"), ("6", "5"), ("7", None)):
        folder = tmp_path / epochs
        folder.mkdir()
        words = ["--seeds", "0", "--shots", "4", "--only", "coreg dividemix cc", "--epochs", epochs]
        code, stderr, commands = run_all(folder, *words)
        assert code == 0 and stderr == ""
        jobs = [job for job in commands if "--seed" in job]
        assert {job[0] for job in jobs} == {"train_coreg", "coreg.baselines.dividemix", "coreg.baselines.pll"}
        for job in jobs:
            longer = wanted is not None and job[0] != "coreg.baselines.pll"
            assert ("--warmup_epochs" in job) == longer and (not longer or wanted in job)
            if job[0] == "coreg.baselines.dividemix":
                assert dividemix.read_settings(job[1:])[2].warmup_epochs == int(wanted or 6)


def test_run_all_starts_every_method_of_several_labels(tmp_path):
    words = ["--task", "multi", "--seeds", "0 1", "--jobs", "4"]
    code, stderr, commands = run_all(tmp_path, *words)
    assert code == 0 and stderr == ""
    (store,) = [words for words in commands if words[0] == "annotate_vlm"]
    assert store[store.index("--images") + 1] == "builtin:digit-pictures" and "--tiles" in store
    jobs = [words for words in commands if words[0] == "coreg.baselines.spml"]
    folders = [words[words.index("--output_dir") + 1] for words in jobs]
    assert len(set(folders)) == len(folders) == 2 * (21 + 2 + 4)
    read = [spml.read_settings(words[1:]) for words in jobs]
    assert {method.method for _, _, method in read} == set(spml.NAMES)
    assert {job.positives for job, _, method in read if method.method == "soft"} == {0.0}
    assert len([words for words in commands if words[0] == "coreg.baselines.zero_shot_tags"]) == 1
    again = run_all(tmp_path, *words)[2]
    assert not [words for words in again if "coreg.baselines" in words[0]]
    own = ["--annotations", "ann", "--only", "vlpl_tiles zero", "--student", "--image_size 64", "--epochs", "3"]
    (tmp_path / "b").mkdir()
    commands = run_all(tmp_path / "b", *words, *own)[2]
    assert [words[0] for words in commands if "--annotations" in words].count("coreg.baselines.spml") == 2
    job, images, _ = spml.read_settings(next(words for words in commands if words[0] == "coreg.baselines.spml")[1:])
    assert (job.annotations, job.epochs, images.image_size) == ("ann", 3, 64)
    code, stderr, _ = run_all(tmp_path, "--task", "many")
    assert code == 2 and "--task is many" in stderr


def test_run_all_says_which_evidence_each_student_is_trained_on(tmp_path):
    def evidence(*options):
        jobs = run_all(tmp_path, "--seeds", "0", "--shots", "4", *options)[2]
        named = {Path(words[words.index("--output_dir") + 1]).name: words for words in jobs if "--seed" in words}
        return {name: words[words.index("--refine") + 1] if "--refine" in words else None for name, words in named.items()}

    raw = evidence()
    assert {raw.pop("coop_4-0"), raw.pop("lora_4-0")} == {None} and set(raw.values()) == {"none"}
    # what was trained on the evidence as it is stays; nothing but the students' runs is added, true labels are not refined
    assert evidence("--refine", "none own") == {f"{name}-own": "own" for name in raw if name != "supervised-0"}
    code, stderr, _ = run_all(tmp_path, "--refine", "own views")
    assert code == 2 and "--refine is views" in stderr


def test_run_all_hands_what_is_tuned_to_every_student(tmp_path):
    tuned = "--backbone annotator --tuner adaptformer lora --head cosine\n  --head_init text"
    words = ["--student", tuned, "--recipe", "annotator", "--annotations", "ann", "--shots", "", "--seeds", "0"]
    code, stderr, commands = run_all(tmp_path, *words)
    assert code == 0 and stderr == ""
    students = [
        words for words in commands if words[0] in ("train_coreg", *(f"coreg.baselines.{name}" for name in STUDENTS))
    ]
    students = [words for words in students if "--print_config" not in words]
    assert len(students) == 1 + len(pll.NAMES) + 2 + 2
    for words in students:
        at = words.index("--tuner")
        assert words[at - 2 : at + 7] == tuned.split()
    assert not [words for words in commands if words[0] == "coreg.baselines.probe"]


def test_run_all_names_what_failed_and_does_the_rest(tmp_path):
    code, stderr, commands = run_all(tmp_path, "--seeds", "0", "--shots", "", broken="--method pico ")
    assert code == 1 and "pico-0" in stderr and "cc-0" not in stderr
    assert len([words for words in commands if "--seed" in words]) == 24 + 2 + 2
    assert run_all(tmp_path, "--seed", "0")[0] == 2
    assert run_all(tmp_path, "--jobs")[0] == 2


def test_run_all_starts_only_what_is_named(tmp_path):
    some = ["--only", "zero_shot lora coreg_4-1 alim", "--tuning", "--lr 0.5 --preset digits"]
    code, stderr, commands = run_all(tmp_path, "--seeds", "0 1", "--shots", "4", "--annotations", "ann", *some)
    assert code == 0 and stderr == ""
    jobs = {Path(words[words.index("--output_dir") + 1]).name: words for words in commands if "--annotations" in words}
    assert set(jobs) == {
        "zero_shot", "lora_4-0", "lora_4-1", "coreg_4-1",
        "alim_onehot-0", "alim_onehot-1", "alim_scale-0", "alim_scale-1",
    }  # fmt: skip
    assert all(("0.5" in words) == name.startswith("lora") for name, words in jobs.items())
    code, stderr, commands = run_all(tmp_path, "--only", "alims")
    assert code == 2 and "alims" in stderr and not [words for words in commands if "--seed" in words]


def test_flips_trains_co_reg_its_parts_and_partial_cross_entropy(tmp_path):
    for split, n in (("train", 5), ("test", 2)):
        for name in ("a", "b c"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(n):
                (tmp_path / "images" / split / name / f"{i}.png").touch()
    (tmp_path / "classes.txt").write_text("a\nb c\n")
    given = ["--images", str(tmp_path / "images"), "--classes", str(tmp_path / "classes.txt"), "--backbone", "resnet18"]
    more = ["--per_class", "3", "--seeds", "4 5", "--epochs", "24", "--jobs", "3"]
    code, stderr, commands = run_all(tmp_path, *given, *more, script="flips.sh")
    assert code == 0 and stderr == ""
    copied = sorted(path.relative_to(tmp_path / "out/images").as_posix() for path in (tmp_path / "out").rglob("*.png"))
    assert copied == [
        f"{split}/{c}/{i}.png" for split, n in (("test", 2), ("train", 3)) for c in ("a", "b c") for i in range(n)
    ]
    stores = [words for words in commands if "coreg.weak" in words]
    assert [words[words.index("--seed") + 1] for words in stores] == ["4", "5"]
    jobs = {}
    for words in commands:
        if words[0] in ("train_coreg", "coreg.baselines.pll"):
            read = (pll if "pll" in words[0] else train_coreg).read_settings(words[1:])
            jobs[Path(read[0].output_dir).name] = read
    parts = "co u contrast prototypes alignment".split()
    assert set(jobs) == {
        *(f"{name}-{seed}" for name in ("coreg", "partial", "partial_longer", "supervised") for seed in (4, 5)),
        *(f"without_{part}-4" for part in parts), "with_mixup-4", "supervised_contrast-4", "fast-4",
    }  # fmt: skip
    for name, (job, image_options, *_) in jobs.items():
        assert job.annotations.endswith(f"store-{name[-1]}") and job.seed == int(name[-1])
        assert image_options.backbone == "resnet18"
    method = {name: read[-1] for name, read in jobs.items()}
    assert method["coreg-4"].warmup_epochs < 24 == method["partial-4"].warmup_epochs
    assert method["partial_longer-4"].warmup_epochs == jobs["partial_longer-4"][0].epochs == 120
    for part in [*(f"without_{part}" for part in parts), "with_mixup", "supervised_contrast", "fast"]:
        assert method[f"{part}-4"] != method["coreg-4"], part
    assert run_all(tmp_path, "--images", "x", "--classes", "y", script="flips.sh")[:2] == (
        2, "error: --backbone is missing; --help shows an example\n",
    )  # fmt: skip
