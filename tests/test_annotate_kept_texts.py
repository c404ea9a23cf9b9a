"""Texts that a store keeps: judged again, at another temperature, by descriptions, without the model that made it."""

import functools
import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from runs import error_of, refused
from test_annotate_annotators import save_tiny_clip

from annotate_vlm import main
from coreg.annotate.annotators import ClipAnnotator
from coreg.annotate.models import resolve
from coreg.annotate.prompts import read_descriptions
from coreg.annotate.scores import TextSide
from coreg.annotate.textual import (
    averaged_embedding_logits,
    evidence,
    label_similarities,
    single_template_probabilities,
    text_side,
)
from coreg.annotate.tools import main as tools
from coreg.store.store import AnnotationStore
from coreg.store.texts import TEXTS

NAMES, TEMPLATES = ["red thing", "green_thing", "blue thing"], ["a {}", "my {}", "the {} at night"]
DESCRIBED = {"red thing": ["fire", "blood"], "green_thing": ["grass"], "blue thing": ["the sea", "the sky", "ink"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Twenty images and one that cannot be read, annotated without and with descriptions; the model is gone since."""
    root = tmp_path_factory.mktemp("place")
    save_tiny_clip(root / "model")
    generator = np.random.default_rng(0)
    for number in range(20):
        folder = root / "photos" / NAMES[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (root / "photos" / "x.png").write_bytes(b"")
    texts = {"names": NAMES, "fewer": NAMES[::-1][:2], "templates": TEMPLATES, "two": TEMPLATES[:0:-1]}
    for name, lines in texts.items():
        (root / f"{name}.txt").write_text("\n".join(lines))
    (root / "names.json").write_text(json.dumps(DESCRIBED))
    images = ["--images", str(root / "photos"), "--vlm", f"local-dir:{root}/model", "--block_size", "8"]
    usual = [*images, "--classes", str(root / "names.txt"), "--templates", str(root / "templates.txt")]
    run(root, "ann", *usual)
    run(root, "fewer", *images, "--classes", str(root / "fewer.txt"), "--templates", str(root / "two.txt"))
    run(root, "described", *usual, "--descriptions", str(root / "names.json"))
    run(root, "judged", "--rescore", str(root / "ann"), "--descriptions", str(root / "names.json"))
    (root / "model").rename(root / "elsewhere")
    return root


def run(place, output, *options):
    main([*map(str, options), "--output_dir", str(place / output), "--batch_size", "3", "--workers", "0"])


@functools.cache
def open_clips(folder):
    """The model, and a function that encodes one text."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

    @functools.cache
    def encode(text):
        with torch.no_grad():
            return model.encode_text(tokenizer([text]), normalize=True)[0].double().numpy()

    return model, encode


def scores(place, store, row, described=None):
    """x_t (T, C) of an image in float64, from open_clip's own calls on every text."""
    model, encode = open_clips(str(place / "elsewhere"))
    seen, table = store.features()[row].astype(np.float64), np.empty((len(store.templates), len(store.class_names)))
    for t, template in enumerate(store.templates):
        for c, name in enumerate(store.class_names):
            text = encode(template.replace("{}", name))
            if described:
                mean = sum(encode(one) for one in described[name]) / len(described[name])
                text = text + mean / np.sqrt(mean @ mean)
            table[t, c] = model.logit_scale.exp().item() * seen @ text / np.sqrt(text @ text)
    return table


def softmax(x):
    return np.exp(x - x.max(axis=-1, keepdims=True)) / np.exp(x - x.max(axis=-1, keepdims=True)).sum(axis=-1, keepdims=True)


def test_fewer_classes_and_templates_are_judged_without_the_model(place):
    run(place, "again", "--rescore", place / "ann", "--classes", place / "fewer.txt", "--templates", place / "two.txt")
    again, anew = (AnnotationStore.open(place / name) for name in ("again", "fewer"))
    assert again.class_names == NAMES[::-1][:2] and again.manifest["preprocessing"] == anew.manifest["preprocessing"]
    np.testing.assert_array_equal(again.votes(), anew.votes())
    np.testing.assert_allclose(again.probs(), anew.probs(), atol=1e-3)
    # what was kept is kept on, though not asked for here
    run(
        place,
        "back",
        "--rescore",
        place / "again",
        "--classes",
        place / "names.txt",
        "--templates",
        place / "templates.txt",
    )
    np.testing.assert_array_equal(AnnotationStore.open(place / "back").votes(), AnnotationStore.open(place / "ann").votes())
    run(place, "copy", "--rescore", place / "ann")
    assert AnnotationStore.open(place / "copy").hash == AnnotationStore.open(place / "ann").hash


def test_other_texts_need_the_model(place, capsys):
    (place / "others.txt").write_text("stone\ncloud\n")
    line = refused(capsys, main, "--rescore", place / "ann", "--classes", place / "others.txt", "--output_dir", place / "n")
    assert "does not exist" in line and not (place / "n").exists()


def test_what_tools_read_is_what_the_model_says(place, tmp_path, monkeypatch):
    store = AnnotationStore.open(place / "ann")
    functions = (single_template_probabilities, averaged_embedding_logits, label_similarities)
    kept = [function(store) for function in functions]
    shutil.copytree(place / "ann", tmp_path / "old")
    (tmp_path / "old" / TEXTS).unlink()  # as in a store of an earlier version
    old = AnnotationStore.open(tmp_path / "old")
    assert old.hash == store.hash
    assert "does not exist" in error_of(text_side, old, old.templates)
    (place / "elsewhere").rename(place / "model")
    try:
        for mine, function in zip(kept, functions):
            np.testing.assert_allclose(mine, function(old), atol=1e-3)
    finally:
        (place / "model").rename(place / "elsewhere")


@pytest.mark.parametrize("damage", ["bytes", "annotator", "shape"])
def test_texts_that_are_damaged_or_not_the_annotators_count_as_not_there(place, tmp_path, damage, capsys):
    shutil.copytree(place / "ann", tmp_path / "ann")
    store = AnnotationStore.open(tmp_path / "ann")
    assert store.kept_texts() is not None
    manifest = store.manifest
    if damage == "bytes":
        content = bytearray((tmp_path / "ann" / TEXTS).read_bytes())
        content[-3] ^= 1
        (tmp_path / "ann" / TEXTS).write_bytes(content)
        assert tools(["verify", str(tmp_path / "ann")]) == 1
        assert "texts.safetensors is damaged: delete it" in capsys.readouterr().out
    elif damage == "annotator":
        manifest["model"] = manifest["model"] | {"weights": "sha256 0"}
    else:
        manifest["features"] = 9
    assert store.kept_texts() is None


def test_evidence_at_a_temperature_is_a_softmax_of_scores_divided_by_it(place):
    store = AnnotationStore.open(place / "ann")
    votes, probs = evidence(store)
    np.testing.assert_array_equal(votes, store.votes())
    np.testing.assert_array_equal(probs.astype(np.float16), store.probs())
    for temperature in (0.5, 4.0):
        votes, probs = evidence(store, temperature)
        np.testing.assert_array_equal(votes, store.votes())
        for row in (0, 7):
            wanted = softmax(scores(place, store, row) / temperature).mean(axis=0)
            np.testing.assert_allclose(probs[row], wanted, atol=1e-5)
    (bad,) = np.flatnonzero(store.unreadable)
    assert (votes[bad] == -1).all() and np.allclose(probs[bad], 1 / 3)


def test_a_store_of_another_temperature(place, capsys):
    run(place, "warm", "--rescore", place / "ann", "--temperature", "4")
    store, warm = (AnnotationStore.open(place / name) for name in ("ann", "warm"))
    assert warm.manifest["model"] == store.manifest["model"] | {"temperature": 4.0} and warm.hash != store.hash
    np.testing.assert_array_equal(warm.probs(), evidence(store, 4.0)[1].astype(np.float16))
    # its own temperature is kept until another one is asked for
    run(place, "warm2", "--rescore", place / "warm")
    assert AnnotationStore.open(place / "warm2").hash == warm.hash
    run(place, "cold", "--rescore", place / "warm", "--temperature", "1")
    assert AnnotationStore.open(place / "cold").hash == store.hash
    np.testing.assert_allclose(single_template_probabilities(warm)[3], softmax(scores(place, store, 3)[0] / 4), atol=1e-3)
    words = ["--rescore", place / "ann", "--output_dir", place / "warm", "--temperature", "3"]
    assert "model temperature (4.0 there, 3.0 asked for)" in refused(capsys, main, *words)


def test_a_sigmoid_model_at_a_temperature():
    text = torch.nn.functional.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    features = torch.nn.functional.normalize(torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    _, probs = TextSide(text, 4, 10.0, -3.0, 2.0).judge(features)
    for row, seen in enumerate(features.double()):
        roots = [(1 / (1 + np.exp(3 - 10 * float(seen @ one)))) ** 0.5 for one in text.double()]
        np.testing.assert_allclose(probs[row], np.array(roots) / sum(roots), atol=1e-6)


def test_names_and_descriptions_count_alike(place, capsys):
    judged, described = (AnnotationStore.open(place / name) for name in ("judged", "described"))
    assert judged.hash == described.hash != AnnotationStore.open(place / "ann").hash
    assert described.descriptions == DESCRIBED
    for name, wanted in (("described", "described  by 6 texts beside the names"), ("ann", "described  by names alone")):
        assert tools(["info", str(place / name)]) == 0 and wanted in capsys.readouterr().out
    changed, before = 0, AnnotationStore.open(place / "ann").votes()
    for row in np.flatnonzero(~described.unreadable):
        x = scores(place, described, row, DESCRIBED)
        np.testing.assert_array_equal(described.votes()[row], x.argmax(axis=1))
        np.testing.assert_allclose(described.probs()[row], softmax(x).mean(axis=0), atol=2e-3)
        changed += (x.argmax(axis=1) != before[row]).sum()
    assert changed  # they do something


def test_descriptions_are_a_part_of_the_job(place, tmp_path, capsys):
    other = DESCRIBED | {"green_thing": ["grass", "ink"]}
    (tmp_path / "other.json").write_text(json.dumps(other))
    words = ["--rescore", place / "described", "--output_dir", place / "judged"]
    line = refused(capsys, main, *words, "--descriptions", tmp_path / "other.json")
    assert "holds the annotations of another job: descriptions green_thing (1 there, 2 asked for)" in line
    assert "another job: descriptions" in refused(capsys, main, "--rescore", place / "ann", *words[2:])
    # texts known, an order of the file's own
    (tmp_path / "same.json").write_text(json.dumps(dict(reversed(DESCRIBED.items()))))
    run(place, "judged", *words[:2], "--descriptions", tmp_path / "same.json")
    assert "nothing to do" in capsys.readouterr().out
    # fewer classes keep their descriptions
    run(place, "few", "--rescore", place / "described", "--classes", place / "fewer.txt")
    few = AnnotationStore.open(place / "few")
    assert few.descriptions == {name: DESCRIBED[name] for name in NAMES[::-1][:2]}
    (tmp_path / "more.txt").write_text("red thing\nstone\n")
    line = refused(capsys, main, *words[:2], "--classes", tmp_path / "more.txt", "--output_dir", tmp_path / "x")
    assert "of which there is none for 'stone'" in line


def test_files_of_descriptions_that_are_none_are_one_line(tmp_path):
    def line_of(content):
        (tmp_path / "d.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return error_of(read_descriptions, str(tmp_path / "d.json"), NAMES)

    assert "no JSON" in line_of("red thing: fire")
    assert "its content is ['cat'], expected an object" in line_of(["cat"])
    assert "red thing is 'fire', expected a list" in line_of(DESCRIBED | {"red thing": "fire"})
    assert "red thing[0] is 1, expected a text" in line_of(DESCRIBED | {"red thing": [1]})
    assert "'green thing', which is no class name, did you mean green_thing?" in line_of(DESCRIBED | {"green thing": ["a"]})
    assert "does not describe 'red thing' and 1 more of the 3 classes" in line_of({"blue thing": ["ink"]})
    assert "no text for 'red thing'" in line_of(DESCRIBED | {"red thing": []})
    assert "an empty text for 'red thing'" in line_of(DESCRIBED | {"red thing": ["fire", " "]})
    assert "'red thing' twice" in line_of(DESCRIBED | {"red thing": ["fire", "fire"]})
    assert "No such file" in error_of(read_descriptions, str(tmp_path / "none.json"), NAMES)


def test_whoever_reads_no_texts_has_no_descriptions(place, capsys, tmp_path):
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "chat" / "model.safetensors").write_bytes(b"")
    words = ["--images", place / "photos", "--vlm", f"chat:{tmp_path / 'chat'}", "--output_dir", tmp_path / "out"]
    line = refused(capsys, main, *words, "--descriptions", place / "names.json")
    assert "--descriptions is for models of the CLIP family" in line and "is a chat model" in line
    assert "--temperature is for models" in refused(capsys, main, *words, "--temperature", "2")


def test_descriptions_that_a_model_does_not_read_to_the_end_are_remarked_on(place):
    described = DESCRIBED | {"green_thing": ["grass", "and so on " * 40]}
    model = resolve(f"local-dir:{place / 'elsewhere'}")
    (note,) = ClipAnnotator(model, ["{}"], NAMES, descriptions=described).notes
    assert "the texts of 1 of 3 classes ('green_thing')" in note
    assert ClipAnnotator(model, ["{}"], NAMES, descriptions=DESCRIBED).notes == []


def test_stores_of_one_annotator_that_are_merged_keep_the_texts(place, tmp_path, capsys):
    (place / "elsewhere").rename(place / "model")
    try:
        shutil.copytree(place / "photos", tmp_path / "more")
        (tmp_path / "more" / "red thing" / "0.png").rename(tmp_path / "more" / "red thing" / "new.png")
        names = ["--classes", place / "names.txt", "--templates", place / "templates.txt"]
        images = ["--images", tmp_path / "more", "--vlm", f"local-dir:{place}/model", *names, "--block_size", "8"]
        run(tmp_path, "plain", *images)
        run(tmp_path, "described", *images, "--descriptions", place / "names.json")
    finally:
        (place / "model").rename(place / "elsewhere")
    merge = ["merge", str(place / "described"), str(tmp_path / "described"), "--output_dir", str(tmp_path / "all")]
    assert tools(merge) == 0
    merged = AnnotationStore.open(tmp_path / "all")
    assert merged.descriptions == DESCRIBED and len(merged) == 42
    np.testing.assert_array_equal(evidence(merged)[0], merged.votes())
    merge[2] = str(tmp_path / "plain")
    assert "another descriptions" in refused(capsys, tools, *merge[:-1], str(tmp_path / "none"))
