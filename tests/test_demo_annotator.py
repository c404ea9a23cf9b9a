"""The shipped annotator, through open_clip's ordinary doors."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode

from coreg.data.digits import DIGIT_NAMES, load_digits_images
from coreg.demo.annotator import (
    COMPACT_FILE,
    CONFIG_FILE,
    FULL_FILE,
    SHIPPED,
    default_cache_dir,
    demo_templates,
    load_compact,
    local_dir,
    save_compact,
)
from coreg.demo.glyphs import SOURCES
from coreg.demo.pretrain import CONFIG, CompactTokenizer, compact_model
from coreg.errors import UserError


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    name = "local-dir:" + local_dir(cache_dir=tmp_path_factory.mktemp("cache"))
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def test_shipped_weights_are_small():
    assert (SHIPPED / COMPACT_FILE).stat().st_size <= 1_000_000
    assert json.loads((SHIPPED / CONFIG_FILE).read_text()) == CONFIG


def test_templates_are_distinct_english_prompts():
    templates = demo_templates()
    assert 8 <= len(templates) <= 16 and len(set(templates)) == len(templates)
    assert all(template.count("{}") == 1 and template == template.strip() for template in templates)
    # One wording of each source that the annotator was trained on.
    assert [sum(t in source.captions for t in templates) for source in SOURCES.values()] == [1] * len(templates)


def test_open_clip_reads_configuration(loaded):
    _, preprocess, tokenizer = loaded
    assert tokenizer.context_length == 16
    resize, normalise = preprocess.transforms[0], preprocess.transforms[-1]
    assert tuple(resize.size) == (32, 32) and resize.interpolation == InterpolationMode.BILINEAR
    assert tuple(normalise.mean) == (0.3,) * 3 and tuple(normalise.std) == (0.35,) * 3
    # Squash: a wide image is not cropped.
    assert preprocess(Image.fromarray(np.eye(8, 20, dtype=np.uint8) * 255)).shape == (3, 32, 32)


def test_full_text_features_equal_compact_ones(loaded):
    model, _, tokenizer = loaded
    _, state, token_ids = load_compact(SHIPPED)
    compact = compact_model(len(token_ids)).eval()
    compact.load_state_dict(state)
    texts = [template.format(name) for template in demo_templates() for name in DIGIT_NAMES]
    ids = tokenizer(texts)
    rows = torch.tensor([[token_ids.tolist().index(i) for i in text] for text in ids.tolist()])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), compact.encode_text(rows), rtol=1e-5, atol=1e-6)
        noise = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(model.encode_image(noise), compact.encode_image(noise), rtol=1e-5, atol=1e-6)
    assert torch.equal(model.token_embedding.weight[token_ids], state["token_embedding.weight"])
    assert model.token_embedding.weight.shape == (49408, 64)
    assert model.token_embedding.weight.abs().sum(1).count_nonzero() == len(token_ids)


def test_compact_tokenizer_renumbers_clips_tokens():
    texts = ["a handwritten seven", "the number one", "a seven"]
    compact, full = CompactTokenizer(texts), open_clip.tokenizer.SimpleTokenizer(context_length=16)
    assert torch.equal(compact.token_ids[compact(texts)], full(texts))
    assert compact.token_ids.tolist() == sorted({i for text in full(texts).tolist() for i in text})


def test_shipped_annotator_reads_digits(loaded):
    model, preprocess, tokenizer = loaded
    images, labels, split = load_digits_images()
    images, labels = images[split == 0], labels[split == 0]
    votes, probabilities = [], []
    with torch.no_grad():
        features = model.encode_image(torch.stack([preprocess(Image.fromarray(i)) for i in images]), normalize=True)
        for template in demo_templates():
            text = model.encode_text(tokenizer([template.format(name) for name in DIGIT_NAMES]), normalize=True)
            probabilities.append((features @ text.T * model.logit_scale.exp()).softmax(-1))
            votes.append(probabilities[-1].argmax(-1).numpy())
    accuracy = (torch.stack(probabilities).mean(0).argmax(-1).numpy() == labels).mean()
    # Chance is 0.1. Loose on purpose, on both sides: a demo of label noise needs a noisy annotator.
    assert 0.5 < accuracy < 0.9
    in_union = (np.stack(votes) == labels).any(0)
    assert in_union.mean() > accuracy + 0.04
    assert min(in_union[labels == digit].mean() for digit in range(10)) > 0.3
    assert 1.1 < np.mean([len(set(column)) for column in np.stack(votes).T]) < 3


def test_unpacking_happens_once(tmp_path):
    first = Path(local_dir(cache_dir=tmp_path / "new" / "cache"))
    stamp = (first / FULL_FILE).stat().st_mtime_ns
    assert first == Path(local_dir(cache_dir=tmp_path / "new" / "cache"))
    assert (first / FULL_FILE).stat().st_mtime_ns == stamp
    assert first.is_absolute() and [p.name for p in first.parent.iterdir()] == [first.name]
    assert sorted(p.name for p in first.iterdir()) == [CONFIG_FILE, FULL_FILE]


def _unpack(cache, results):
    results.put(local_dir(cache_dir=cache))


@pytest.mark.multiprocess
def test_several_processes_unpack_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_unpack, args=(tmp_path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    folders = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 1 and all(process.exitcode == 0 for process in processes)
    assert [p.name for p in tmp_path.iterdir()] == [Path(folders.pop()).name]


def test_other_weights_get_another_folder(tmp_path):
    config, state, token_ids = load_compact(SHIPPED)
    state["logit_scale"] = state["logit_scale"] + 1
    changed = tmp_path / "changed"
    changed.mkdir()
    save_compact(changed, config, state, token_ids)
    assert local_dir(changed, tmp_path) != local_dir(cache_dir=tmp_path)


def test_round_trip_is_exact_in_half_precision(tmp_path):
    config, state, token_ids = load_compact(SHIPPED)
    save_compact(tmp_path, config, state, token_ids)
    again_config, again_state, again_ids = load_compact(tmp_path)
    assert again_config == config and torch.equal(again_ids, token_ids) and again_state.keys() == state.keys()
    assert all(torch.equal(again_state[name], value) for name, value in state.items())


def test_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "coreg"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "coreg"


def broken_folder(tmp_path, damage):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (CONFIG_FILE, COMPACT_FILE):
        (folder / name).write_bytes((SHIPPED / name).read_bytes())
    damage(folder)
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / COMPACT_FILE).unlink(),
        lambda f: (f / CONFIG_FILE).write_text("{"),
        lambda f: (f / CONFIG_FILE).write_text("[]"),
        lambda f: (f / COMPACT_FILE).write_bytes((f / COMPACT_FILE).read_bytes()[:1000]),
        lambda f: save_compact(f, CONFIG, {"token_embedding.weight": torch.ones(3, 64)}, torch.arange(2)),
    ],
    ids=["no weights", "no json", "other json", "truncated", "rows without ids"],
)
def test_broken_folders_are_one_line_errors(tmp_path, damage):
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"coreg\.demo\.pretrain") as caught:
        local_dir(broken_folder(tmp_path, damage), cache)
    assert "\n" not in str(caught.value) and not cache.exists()


def test_unwritable_cache_is_a_one_line_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="XDG_CACHE_HOME") as caught:
        local_dir(cache_dir=tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]
