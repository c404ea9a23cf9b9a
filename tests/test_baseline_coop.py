"""CoOp through its own entry point: which images it learns from, resuming, what it leaves, what it refuses."""

import json

import numpy as np
import pytest
import torch
from runs import final_state, killed_at, on_two_processes, refused, same_curves, script
from safetensors import safe_open
from test_annotate_annotators import save_tiny_clip
from test_annotate_chat import save_tiny_llava

from coreg.annotate.annotators import open_clip_towers
from coreg.annotate.models import resolve
from coreg.data.labels import few_shot_draw, read_labels
from coreg.nets.tuners.prompts import PromptLearner, lay_out, token_embedding
from coreg.store.store import AnnotationStore

SHORT = ["--epochs", "3", "--workers", "0", "--report_to", "none"]


coop = script("coop")


def run(store, output, *more):
    coop.main(["--annotations", str(store), "--output_dir", str(output), *SHORT, *more])
    return json.loads((output / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, run(digits.root, output, "--shots", "4", "--epochs", "12", "--lr", "0.02")


def test_the_report_has_the_fields_of_every_method(finished, digits):
    output, report = finished
    assert report["method"] == "CoOp (4 shots)" and report["labels_used"] == 40 and report["schema"] == 1
    assert report["trainable_parameters"] == 4 * 64 and report["parameters"] > 3_000_000
    assert report["tuned_model"] == "builtin:glyph-clip" and report["context_tokens"] == 4
    assert {split: report["accuracy"][split]["n"] for split in ("train", "test")} == {"train": 1437, "test": 360}
    assert set(report["annotator"]["zero_shot_accuracy"]) == {"train", "test"}
    for key in ("images_per_second", "wall_seconds", "training_seconds", "peak_memory_mb", "command", "versions"):
        assert report[key] not in (None, "", {})
    assert len((output / "labels.csv").read_text().splitlines()) == 1438
    assert "CoOp (4 shots)" in (output / "report.html").read_text()
    state = final_state(output)
    assert set(state["learners"][0]) == {"context"}
    assert sum(file.stat().st_size for file in output.glob("checkpoints/*/state.pt")) < 200_000
    assert state["curves"][-1]["loss/net1/total"] < state["curves"][0]["loss/net1/total"]


def test_it_learns_from_the_images_that_coreg_would_be_given(finished, digits):
    output, _ = finished
    known = few_shot_draw(digits.labels, np.flatnonzero(digits.split == 0), 4, 10, 0)
    rows, classes = read_labels(str(output / "known_labels.csv"), digits.paths, digits.class_names)
    assert np.array_equal(rows, known) and np.array_equal(classes, digits.labels[known])


def test_the_saved_prompt_gives_the_reported_accuracy(finished, digits):
    output, report = finished
    with safe_open(output / "prompt" / "prompt.safetensors", framework="pt") as file:
        context, description = file.get_tensor("context"), json.loads(file.metadata()["coreg"])
    towers = open_clip_towers(resolve(description["model"]), torch.device("cpu"), "fp32")
    prompts = lay_out(towers.tokenize, description["class_names"], len(context), description["class_position"])
    table = token_embedding(towers.network, towers.text, prompts.tokens)
    with torch.no_grad():
        text = PromptLearner(prompts, context, table, towers.text)().numpy()
    test = digits.split == 1
    named = (digits.features()[test].astype(np.float32) @ text.T).argmax(axis=1)
    assert (named == digits.labels[test]).mean() == pytest.approx(report["accuracy"]["test"]["ensemble"], abs=0.003)


def test_a_killed_run_goes_on_bit_for_bit(digits, finished, tmp_path, monkeypatch, capsys):
    options = ("--shots", "4", "--epochs", "12", "--lr", "0.02")
    with killed_at(monkeypatch, 5):
        run(digits.root, tmp_path / "run", *options)
    run(digits.root, tmp_path / "run", *options)
    assert "after epoch 5" in capsys.readouterr().out
    expected, resumed = final_state(finished[0]), final_state(tmp_path / "run")
    assert torch.equal(expected["learners"][0]["context"], resumed["learners"][0]["context"])
    assert expected["curves"] == resumed["curves"]
    run(digits.root, tmp_path / "run", *options)
    assert "finished" in capsys.readouterr().out
    assert "holds another job (seed was 0 and is 1)" in refused(
        capsys,
        coop.main,
        "--annotations",
        str(digits.root),
        "--output_dir",
        str(tmp_path / "run"),
        *SHORT,
        *options,
        "--seed",
        "1",
    )


def test_with_a_templates_words_and_no_step_it_is_zero_shot(digits, tmp_path):
    """With one epoch of warming up and no more, at a learning rate of nothing, the words stay what they are."""
    words = ("--context_init", "a photo of the number", "--warmup_lr", "1e-30", "--weight_decay", "0", "--epochs", "1")
    named = {}
    for context in ("shared", "per_class"):
        report = run(digits.root, tmp_path / context, "--shots", "1", "--context", context, *words)
        named[context] = report["accuracy"]["test"]["ensemble"]
        assert report["trainable_parameters"] == (10 if context == "per_class" else 1) * 5 * 64
    towers = open_clip_towers(resolve("builtin:glyph-clip"), torch.device("cpu"), "fp32")
    text = towers.text(towers.tokenize([f"a photo of the number {name}." for name in digits.class_names])).numpy()
    test = digits.split == 1
    wanted = (digits.features()[test].astype(np.float32) @ (text / np.linalg.norm(text, axis=1, keepdims=True)).T).argmax(1)
    assert named["shared"] == named["per_class"] == pytest.approx((wanted == digits.labels[test]).mean(), abs=0.003)


def test_features_that_are_kept_are_those_that_are_computed_anew(digits, tmp_path):
    """Two views that are used in turn: epochs 0 and 2 see what epoch 0 sees without keeping."""
    fresh = run(digits.root, tmp_path / "fresh", "--shots", "2", "--epochs", "2")
    kept = run(digits.root, tmp_path / "kept", "--shots", "2", "--epochs", "2", "--views", "2")
    assert fresh["last_epoch"]["loss/net1/total"] == pytest.approx(kept["last_epoch"]["loss/net1/total"], rel=1e-4)
    whole = run(digits.root, tmp_path / "whole", "--shots", "2", "--crop", "1")  # features from the store, no image is read
    assert whole["accuracy"]["test"]["n"] == 360


def test_a_class_without_images_is_no_obstacle(small_store, tmp_path, capsys):
    """One image of every class, of which one has none."""
    from annotate_vlm import AnnotateConfig, annotate

    (tmp_path / "classes.txt").write_text("a\nb\nnobody\nc\n")
    options = {"images": AnnotationStore.open(small_store).images_spec, "classes": str(tmp_path / "classes.txt")}
    clip = save_tiny_clip(tmp_path / "clip")
    annotate(AnnotateConfig(**options, vlm=f"local-dir:{clip}", output_dir=str(tmp_path / "store"), workers=0))
    report = run(tmp_path / "store", tmp_path / "run", "--context_tokens", "2", "--shots", "1", "--context", "per_class")
    assert "1 classes have no labelled image, such as 'nobody'" in capsys.readouterr().out
    assert report["method"] == "CoOp (1 shot)" and report["labels_used"] == 3
    assert report["trainable_parameters"] == 4 * 2 * 16


def test_labels_of_ones_own_on_another_model_than_the_annotator(small_store, tmp_path, capsys):
    """97 images of three classes, and labels of two of them; the store was not made by a model at all."""
    store = AnnotationStore.open(small_store)
    lines = [f"{store.paths[row]},{store.class_names[store.labels[row]]}" for row in range(len(store))
             if store.split[row] == 0 and store.labels[row] < 2]  # fmt: skip
    (tmp_path / "labels.csv").write_text("path,label\n" + "\n".join(lines[:2] + lines[-1:]) + "\n")
    clip = save_tiny_clip(tmp_path / "clip")
    options = ["--vlm", f"local-dir:{clip}", "--context_tokens", "2", "--labels", str(tmp_path / "labels.csv")]
    report = run(small_store, tmp_path / "run", *options)
    assert "1 classes have no labelled image, such as 'c'" in capsys.readouterr().out
    assert report["method"] == "CoOp (3 labels)" and report["labels_used"] == 3
    assert report["accuracy"]["train"]["n"] == 97 and report["tuned_model"] == f"local-dir:{clip}"


def test_what_cannot_work_is_one_line(digits, small_store, tmp_path, capsys):
    options = ["--annotations", str(digits.root), "--output_dir", str(tmp_path / "run"), *SHORT]
    assert "give --context_tokens 12 or less" in refused(capsys, coop.main, *options, "--context_tokens", "16")
    assert "--shots is 0" in refused(capsys, coop.main, *options, "--shots", "0")
    assert "--context_tokens is 0" in refused(capsys, coop.main, *options, "--context_tokens", "0")
    assert "--crop is 2.0" in refused(capsys, coop.main, *options, "--crop", "2")
    llava = save_tiny_llava(tmp_path / "llava")
    assert "is a chat model" in refused(capsys, coop.main, *options, "--vlm", f"chat:{llava}")
    options[1] = str(small_store)
    assert "name the model to tune with --vlm" in refused(capsys, coop.main, *options)
    assert not (tmp_path / "run").exists()


def test_defaults_follow_the_data(digits, small_store, capsys):
    coop.main(["--annotations", str(small_store), "--shots", "1", "--print_config"])
    paper = capsys.readouterr().out
    assert all(line in paper for line in ("preset: paper", "epochs: 50", "context_tokens: 16", "flip: true", "crop: 0.08"))
    coop.main(["--annotations", str(digits.root), "--shots", "4", "--crop", "0.9", "--print_config"])
    own = capsys.readouterr().out
    assert all(line in own for line in ("preset: digits", "epochs: 100", "context_tokens: 4", "flip: false", "crop: 0.9"))


@pytest.mark.parametrize(("epoch", "wanted"), [(0.5, 1e-5), (1, 0.0019510565), (5.9, 0.001), (9, 4.8943e-5)])
def test_the_schedule(epoch, wanted):
    job = coop.TuningJob(epochs=10)
    assert coop.rate(job, coop.CoOpOptions(), epoch) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.multiprocess
def test_two_processes_train_like_one(small_store, tmp_path):
    """Seven images a class in batches of four: the last batch is one image, and one process has none of it."""
    clip = save_tiny_clip(tmp_path / "clip")
    options = ["--annotations", str(small_store), "--vlm", f"local-dir:{clip}", "--context_tokens", "2", "--shots", "7",
               "--batch_size", "4", "--dtype", "float64", "--lr", "0.1", *SHORT]  # fmt: skip
    coop.main([*options, "--output_dir", str(tmp_path / "1")])
    on_two_processes(coop.main, *options, "--output_dir", tmp_path / "2")
    one, two = (final_state(tmp_path / str(count)) for count in (1, 2))
    torch.testing.assert_close(one["learners"][0]["context"], two["learners"][0]["context"], rtol=1e-10, atol=1e-12)
    same_curves(one, two)
    reports = [json.loads((tmp_path / str(count) / "report.json").read_text()) for count in (1, 2)]
    assert reports[0]["accuracy"] == reports[1]["accuracy"] and reports[1]["processes"] == 2
