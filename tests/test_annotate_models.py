"""Spellings of --vlm are understood or corrected; model folders bring no code and no pipes, and nothing asks for either."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import error_of
from test_annotate_annotators import save_tiny_clip

from coreg.annotate.models import resolve

AUTO_MAP = '"auto\\u005fmap"'  # JSON for auto_map, without these bytes


@pytest.mark.parametrize(
    ("spec", "right"),
    [
        ("ViT-B/32", "write --vlm ViT-B-32/openai"),
        ("ViT-L/14@336px", "write --vlm ViT-L-14-336/openai"),
        ("vit-b-32", "write --vlm ViT-B-32/openai"),
        ("ViT-B-32", "write --vlm ViT-B-32/openai"),
        ("RN50", "write --vlm RN50/openai"),
        ("openai/clip-vit-base-patch32", "write --vlm ViT-B-32/openai"),
        ("openai/clip-vit-large-patch14-336", "write --vlm ViT-L-14-336/openai"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "write --vlm ViT-B-32/laion2b_s34b_b79k"),
        ("https://huggingface.co/timm/ViT-B-16-SigLIP", "write --vlm ViT-B-16-SigLIP/webli"),
    ],
)
def test_spellings_of_others_get_the_one_that_works(spec, right):
    assert right in error_of(resolve, spec)
    assert resolve(right.removeprefix("write --vlm ")).tag


@pytest.mark.parametrize("prefix", ["", "https://huggingface.co/"])
def test_models_of_the_hub_are_downloaded_first(prefix):
    line = error_of(resolve, f"{prefix}google/siglip-base-patch16-224")
    assert "hf download google/siglip-base-patch16-224 --local-dir siglip-base-patch16-224" in line
    assert "--vlm transformers:siglip-base-patch16-224" in line


def test_folders_get_the_prefix_that_fits_what_is_in_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_clip(tmp_path / "clip")
    for name, config in {
        "siglip": {"model_type": "siglip", "architectures": ["SiglipModel"]},
        "llava": {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]},
    }.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(config))
    Path("empty").mkdir()
    for spec, right in {
        "./clip": "write --vlm local-dir:clip",
        f"{tmp_path}/clip": f"write --vlm local-dir:{tmp_path}/clip",
        "siglip": "write --vlm transformers:siglip",
        "./llava": "write --vlm chat:llava",
        "empty": "a folder without a model",
        "./nowhere": "there is no such folder",
        "local-dir:llava": f"write --vlm chat:{tmp_path}/llava",
        "transformers:clip": f"write --vlm local-dir:{tmp_path}/clip",
    }.items():
        assert right in error_of(resolve, spec)
    assert resolve("local-dir:clip").kind == "open_clip"


# ---- code and pipes -------------------------------------------------------------------------------------------------


def bring_code(folder, marker):
    """Files that ask transformers to run `evil.py`, which makes `marker`, as every Auto class would read them."""
    code = f"open({str(marker)!r}, 'w').close()\n"
    for name in ("Tokenizer", "Processor", "Config", "Model"):
        code += f"class {name}: model_type = 'evil'\n"
    folder.mkdir(exist_ok=True)
    (folder / "evil.py").write_text(code)
    asks = {
        "tokenizer_config": '{"AutoTokenizer": ["evil.Tokenizer", null]}',
        "processor_config": '{"AutoProcessor": "evil.Processor"}',
        "preprocessor_config": '{"AutoImageProcessor": "evil.Processor"}',
        "config": '{"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForImageTextToText": "evil.Model"}',
    }
    for file, mapping in asks.items():
        (folder / f"{file}.json").write_text(f'{{"model_type": "evil", {AUTO_MAP}: {mapping}}}')


def change_text(folder, **changes):
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= changes
    path.write_text(json.dumps(config))


@pytest.fixture
def evil(tmp_path):
    """Folders that bring code, one for each way: their spellings of --vlm."""
    marker = tmp_path / "marker"
    bring_code(tmp_path / "plain", marker)
    (tmp_path / "plain" / "model.safetensors").write_bytes(b"")
    own = save_tiny_clip(tmp_path / "own")
    (own / "config.json").unlink(missing_ok=True)
    bring_code(own, marker)
    change_text(own, hf_tokenizer_name="own")
    other, beside = save_tiny_clip(tmp_path / "other"), save_tiny_clip(tmp_path / "beside")
    change_text(other, hf_model_name=str(tmp_path / "plain"), hf_tokenizer_name="plain")
    change_text(beside, hf_model_name="plain", hf_tokenizer_name="plain")
    asking = save_tiny_clip(tmp_path / "asking")
    bring_code(asking, marker)
    change_text(asking, hf_tokenizer_name="asking", tokenizer_kwargs={"trust_remote_code": True})
    return [
        f"transformers:{tmp_path}/plain",
        f"chat:{tmp_path}/plain",
        *(f"local-dir:{f}" for f in (own, other, beside, asking)),
    ]


def test_folders_that_bring_code_are_refused_however_it_is_written(evil, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec in evil:
        line = error_of(resolve, spec)
        assert "asks to run code of its own" in line or "may name models of the hub alone" in line


LOAD = """
import contextlib, os, sys
from coreg.annotate.annotators import load_annotator
from coreg.annotate.models import ModelSpec
from coreg.errors import UserError
marker, *specs = sys.argv[1:]
for spec in specs:  # as if nothing had been looked at before
    kind, _, folder = spec.partition(":")
    model = ModelSpec(spec, spec, None, "", "open_clip") if kind == "local-dir" else ModelSpec(spec, folder, None, "", kind)
    try:
        load_annotator(model, ["a {}"], ["cat", "dog"])
        print("loaded", spec)
    except UserError as error:
        print("refused", error)
    assert not os.path.exists(marker), spec
from transformers import AutoTokenizer
with contextlib.suppress(AttributeError):
    AutoTokenizer.from_pretrained(specs[0].partition(":")[2], trust_remote_code=True)
assert os.path.exists(marker)  # the trap works where code is run
"""


def test_code_is_neither_run_nor_asked_about_where_a_folder_was_not_checked(evil, tmp_path):
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "marker"), *evil]
    done = subprocess.run(
        command, input="y\n" * 50, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert done.stdout.count("refused") == len(evil)


def test_a_vocabulary_may_have_the_word_auto_map(tmp_path):
    folder = save_tiny_clip(tmp_path / "model")
    (folder / "vocab.json").write_text(json.dumps({"auto_map": 7, "trust_remote_code": 1}))
    assert resolve(f"local-dir:{folder}").kind == "open_clip"


@pytest.mark.parametrize(
    "name", ["open_clip_config.json", "tokenizer.json", "merges.txt", "weights.safetensors", "x/y.json"]
)
def test_pipes_and_broken_links_in_a_model_folder_are_refused_and_not_waited_for(tmp_path, name):
    folder = save_tiny_clip(tmp_path / "model")
    (folder / "x").mkdir()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    line = error_of(resolve, f"local-dir:{folder}")
    assert name in line and ("pipe" in line or "it is no file" in line)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "nowhere")
    line = error_of(resolve, f"local-dir:{folder}")
    assert name in line and ("broken link" in line or "does not exist" in line)


@pytest.mark.parametrize("kind", ["transformers", "chat"])
def test_a_pipe_in_the_place_of_config_json_is_no_configuration(tmp_path, kind):
    os.mkfifo(tmp_path / "config.json")
    assert "config.json is missing or not a transformers configuration (it is no file)" in error_of(
        resolve, f"{kind}:{tmp_path}"
    )


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"model_cfg": {"embed_dim": "8"}}', '{"model_cfg": 3}', "\xff", "{", "[]"]
)
def test_damaged_configurations_are_one_line(tmp_path, content):
    folder = save_tiny_clip(tmp_path / "model")
    (folder / "open_clip_config.json").write_text(content, encoding="latin-1")
    assert "is not an open_clip configuration" in error_of(resolve, f"local-dir:{folder}")
