"""LoRA through its own entry point, on CLIP and on a tiny LLaVA: what is trained, resumed, saved and refused."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from peft import PeftModel
from runs import final_state, killed_at, on_two_processes, refused, same_curves, script
from safetensors.torch import save_file
from test_annotate_annotators import save_tiny_clip
from test_annotate_chat import NAMES, pictures, save_tiny_llava
from test_annotate_transformers import save_tiny

from coreg.annotate.annotators import ClipAnnotator
from coreg.annotate.chat import CHAT_TEMPLATES, ChatAnnotator
from coreg.annotate.models import resolve
from coreg.store.store import AnnotationStore

SHORT = ["--workers", "0", "--report_to", "none"]


lora = script("lora")


@pytest.fixture(scope="module")
def clip_store(small_store, tmp_path_factory):
    """97 small images, annotated by a tiny CLIP of random weights."""
    from annotate_vlm import AnnotateConfig, annotate

    root = tmp_path_factory.mktemp("clip")
    clip, images = save_tiny_clip(root / "clip"), Path(AnnotationStore.open(small_store).images_spec)
    options = {"images": str(images), "classes": str(images.parent / "classes.txt"), "vlm": f"local-dir:{clip}"}
    return annotate(AnnotateConfig(**options, output_dir=str(root / "store"), workers=0))


@pytest.fixture(scope="module")
def chat_store(tmp_path_factory):
    """18 images of one main colour, annotated by a tiny LLaVA of random weights."""
    from annotate_vlm import AnnotateConfig, annotate

    root = tmp_path_factory.mktemp("chat")
    save_tiny_llava(root / "llava")
    for split, count in (("train", 12), ("test", 6)):
        for number, (image, index) in enumerate(zip(*pictures(count, seed=count))):
            folder = root / "photos" / split / NAMES[index]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(NAMES[:3]))
    options = {"images": str(root / "photos"), "classes": str(root / "classes.txt"), "vlm": f"chat:{root / 'llava'}"}
    return annotate(AnnotateConfig(**options, output_dir=str(root / "store"), workers=0))


def run(store, output, *more):
    lora.main(["--annotations", str(store.root), "--output_dir", str(output), *SHORT, *more])
    return json.loads((output / "report.json").read_text())


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def interrupted(store, output, monkeypatch, epoch, *options):
    """Killed right after the checkpoint of an epoch, then started again."""
    with killed_at(monkeypatch, epoch):
        run(store, output, *options)
    return run(store, output, *options)


# ---- CLIP -----------------------------------------------------------------------------------------------------------

TRAINING = ("--shots", "4", "--epochs", "15", "--lr", "0.02", "--rank", "4", "--crop", "0.8")


@pytest.fixture(scope="module")
def finished(clip_store, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, run(clip_store, output, *TRAINING)


def test_the_report_says_what_was_trained(finished):
    output, report = finished
    assert report["method"] == "LoRA (4 shots)" and report["labels_used"] == 12 and report["rank"] == 4
    # one layer of width 16 in each tower: A is (4, 16), B is (48, 4)
    assert report["trainable_parameters"] == 2 * (4 * 16 + 48 * 4)
    state = final_state(output)
    assert len(state["learners"][0]) == 4 and all("lora_" in name for name in state["learners"][0])
    assert state["curves"][-1]["loss/net1/total"] < 0.7 * state["curves"][0]["loss/net1/total"]
    assert report["accuracy"]["train"]["ensemble"] > report["annotator"]["zero_shot_accuracy"]["train"]
    assert sum(file.stat().st_size for file in output.glob("checkpoints/*/state.pt")) < 100_000


def test_the_saved_adapter_gives_the_reported_accuracy(finished, clip_store):
    output, report = finished
    annotator = ClipAnnotator(
        resolve(clip_store.manifest["model"]["spec"]), clip_store.templates[:1], clip_store.class_names
    )
    PeftModel.from_pretrained(annotator.towers.network, str(output / "adapter"))
    texts = [clip_store.templates[0].replace("{}", name) for name in clip_store.class_names]
    text = torch.nn.functional.normalize(annotator.towers.text(annotator.towers.tokenize(texts)), dim=-1)
    images, rows = clip_store.images(), np.flatnonzero(clip_store.split == 0)
    pixels = torch.stack([annotator.towers.preprocess(images.load(int(row))) for row in rows])
    with torch.no_grad():
        named = (annotator.towers.image(pixels) @ text.T).argmax(dim=1).numpy()
    assert (named == clip_store.labels[rows]).mean() == pytest.approx(report["accuracy"]["train"]["ensemble"], abs=0.011)


def test_a_killed_run_goes_on_bit_for_bit(finished, clip_store, tmp_path, monkeypatch, capsys):
    interrupted(clip_store, tmp_path / "run", monkeypatch, 6, *TRAINING)
    assert "after epoch 6" in capsys.readouterr().out
    expected, actual = final_state(finished[0]), final_state(tmp_path / "run")
    assert same(expected["learners"][0], actual["learners"][0]) and expected["curves"] == actual["curves"]
    run(clip_store, tmp_path / "run", *TRAINING)
    assert "finished" in capsys.readouterr().out


def test_one_tower_at_a_time(clip_store, tmp_path):
    """The text side alone needs no image where features are in the store; a shot of a class is enough."""
    for tower, prefix in (("image", ".visual."), ("text", ".transformer.resblocks")):
        options = ("--shots", "1", "--epochs", "2", "--towers", tower, "--crop", "1", "--flip", "false")
        report = run(clip_store, tmp_path / tower, *options)
        names = final_state(tmp_path / tower)["learners"][0]
        assert len(names) == 2 and all(prefix in name for name in names)
        assert report["labels_used"] == 3 and report["trainable_parameters"] == 2 * 16 + 48 * 2


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_models_of_transformers(clip_store, tmp_path, family):
    """SigLIP's pooling packs its projections, so that its adapters cannot have dropout; CLIP keeps all of them apart."""
    folder = save_tiny(tmp_path / family, family)
    options = ("--vlm", f"transformers:{folder}", "--shots", "2", "--epochs", "4", "--lr", "0.02", "--rank", "3")
    report = run(clip_store, tmp_path / "run", *options, *(("--dropout", "0.1") if family == "clip" else ()))
    layers = 2 * 2 * 3 * (32 + 32) + (32 + 96) * (family == "siglip")
    assert report["trainable_parameters"] == 3 * layers
    curves = final_state(tmp_path / "run")["curves"]
    assert min(row["loss/net1/total"] for row in curves[1:]) < curves[0]["loss/net1/total"]


def test_what_cannot_work_is_one_line(clip_store, tmp_path, capsys):
    options = ["--annotations", str(clip_store.root), "--output_dir", str(tmp_path / "run"), *SHORT]
    assert "--rank is 0" in refused(capsys, lora.main, *options, "--rank", "0")
    assert "--template 'a cat' needs exactly one {}" in refused(capsys, lora.main, *options, "--template", "a cat")
    assert "--dropout is 0.2, and" in refused(capsys, lora.main, *options, "--dropout", "0.2")
    assert "--views keeps features" in refused(capsys, lora.main, *options, "--views", "2")
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    network = open_clip.CLIP(8, vision, text)
    save_file(network.state_dict(), (folder := save_tiny_clip(tmp_path / "rn")) / "open_clip_model.safetensors")
    shape = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    line = refused(capsys, lora.main, *options, "--vlm", f"local-dir:{folder}")
    assert "the image tower of" in line and "--towers text" in line
    assert not (tmp_path / "run").exists()


def test_adapters_that_never_act_stop_the_job(clip_store, tmp_path, monkeypatch, capsys):
    """As if the output projections were taken for layers that work."""
    monkeypatch.setattr(lora, "attention_targets", lambda *_: (["visual.transformer.resblocks.0.attn.out_proj"], []))
    options = ["--annotations", str(clip_store.root), "--output_dir", str(tmp_path / "run"), *SHORT]
    assert "2 of 2 adapter weights change nothing" in refused(capsys, lora.main, *options)


def test_steps_and_schedule(clip_store, capsys):
    lora.main(["--annotations", str(clip_store.root), "--shots", "16", "--print_config"])
    shown = capsys.readouterr().out  # 48 images in two batches of 32, 500 steps a shot
    assert all(line in shown for line in ("preset: clip", "epochs: 4000", "rank: 2", "lr: 0.0002", "rslora: true"))
    job, method = lora.TuningJob(epochs=10, lr=1.0), lora.LoraOptions(warmup=0.2, lr_floor=0.1)
    wanted = {0: 0, 1: 0.5, 2: 1.0, 6: 0.55, 10: 0.1}
    assert {epoch: pytest.approx(lora.rate(job, method, epoch)) for epoch in wanted} == wanted


# ---- chat models ----------------------------------------------------------------------------------------------------

TALKING = ("--shots", "4", "--epochs", "12", "--lr", "0.005", "--batch_size", "5")


@pytest.fixture(scope="module")
def talked(chat_store, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, run(chat_store, output, *TALKING)


def test_a_chat_model_learns_to_answer(talked, chat_store):
    output, report = talked
    assert report["method"] == "LoRA (4 shots)" and report["labels_used"] == 12
    # seven linear layers in each of two blocks, rank 16: widths 48 (24 for keys and values) and 96
    per_block = 2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 96)
    assert report["trainable_parameters"] == 2 * 16 * per_block
    state = final_state(output)
    assert state["curves"][-1]["loss/net1/total"] < 0.7 * state["curves"][0]["loss/net1/total"]
    assert "dropout: 0.05" in (output / "config.yaml").read_text()


@pytest.mark.parametrize("mode", ["likelihood", "generate"])
def test_the_saved_adapter_gives_the_same_answers(talked, chat_store, tmp_path, mode):
    output, report = talked
    if mode == "generate":
        report = run(chat_store, tmp_path / "generate", *TALKING, "--chat_mode", "generate")
        output = tmp_path / "generate"
    model = resolve(chat_store.manifest["model"]["spec"])
    annotator = ChatAnnotator(model, CHAT_TEMPLATES[:1], chat_store.class_names, mode=mode)
    PeftModel.from_pretrained(annotator.network, str(output / "adapter"))
    images, rows = chat_store.images(), np.flatnonzero(chat_store.split == 1)
    votes = annotator.annotate([annotator.preprocess(images.load(int(row))) for row in rows])["votes"][:, 0].numpy()
    assert (votes == chat_store.labels[rows]).mean() == pytest.approx(report["accuracy"]["test"]["ensemble"])


def test_a_killed_conversation_goes_on_bit_for_bit(talked, chat_store, tmp_path, monkeypatch):
    """Dropout included."""
    interrupted(chat_store, tmp_path / "run", monkeypatch, 5, *TALKING)
    expected, actual = final_state(talked[0]), final_state(tmp_path / "run")
    assert same(expected["learners"][0], actual["learners"][0]) and expected["curves"] == actual["curves"]


def test_a_chat_store_can_be_learnt_by_a_clip_model_and_the_other_way_round(chat_store, clip_store, tmp_path):
    clip = clip_store.manifest["model"]["spec"]
    report = run(chat_store, tmp_path / "clip", "--vlm", clip, "--shots", "1", "--epochs", "1")
    assert report["tuned_model"] == clip and report["annotator"]["name"].startswith("chat:")
    llava = chat_store.manifest["model"]["spec"]
    report = run(clip_store, tmp_path / "chat", "--vlm", llava, "--shots", "1", "--epochs", "1")
    assert report["tuned_model"] == llava and report["accuracy"]["train"]["n"] == 97


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", ["clip", "chat"])
def test_two_processes_train_like_one(clip_store, chat_store, tmp_path, kind):
    """Batches of four of 21 or 9 images: the last batch is one image, and one process has none of it."""
    store, shots = (clip_store, "7") if kind == "clip" else (chat_store, "3")
    options = ["--annotations", str(store.root), "--shots", shots, "--batch_size", "4", "--dtype", "float64",
               "--lr", "0.01", "--epochs", "2", "--dropout", "0", *SHORT]  # fmt: skip
    lora.main([*options, "--output_dir", str(tmp_path / "1")])
    on_two_processes(lora.main, *options, "--output_dir", tmp_path / "2")
    one, two = (final_state(tmp_path / count) for count in "12")
    # transformers takes some softmaxes in float32, whatever the weights are
    rtol, atol = (1e-9, 1e-11) if kind == "clip" else (1e-3, 1e-4)
    for name, weight in one["learners"][0].items():
        torch.testing.assert_close(weight, two["learners"][0][name], rtol=rtol, atol=atol)
    same_curves(one, two, 1e-10 if kind == "clip" else 1e-3)
    reports = [json.loads((tmp_path / count / "report.json").read_text()) for count in "12"]
    assert reports[0]["accuracy"] == reports[1]["accuracy"] and reports[1]["processes"] == 2
