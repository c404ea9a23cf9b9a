"""Exports through timm's own loader and `coreg-predict` against the networks they were made from."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from coreg import predict
from coreg.errors import UserError
from coreg.export import ensemble_logits, export, load_export
from coreg.nets.model import create_backbone

NAMES = ["ant", "bee", "<b>cat</b>"]


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(0)
    arguments = {"norm": "group"}
    nets = [create_backbone("preact_resnet_tiny", 3, 3, arguments, pretrained=False).eval() for _ in range(2)]
    settings = {"class_names": NAMES, "image_size": 16, "channels": 3, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    export(tmp_path / "export", nets, "preact_resnet_tiny", arguments, **settings)
    return tmp_path / "export", nets


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "photos" / "deep" / f"{i}.png")
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return tmp_path / "photos"


def test_an_export_gives_the_same_logits(exported):
    folder, nets = exported
    loaded, settings = load_export(folder)
    images = torch.randn(4, 3, 16, 16)
    assert settings["class_names"] == NAMES
    torch.testing.assert_close(ensemble_logits(loaded, images), nets[0](images) + nets[1](images))


def test_each_network_is_an_ordinary_timm_folder(exported):
    folder, nets = exported
    model = timm.create_model(f"local-dir:{folder}/net2", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(images), nets[1](images))
    config = json.loads((folder / "net2" / "config.json").read_text())
    assert config["label_names"] == NAMES
    assert timm.data.resolve_model_data_config(model)["mean"] == [0.4, 0.5, 0.6]
    assert {path.name for path in (folder / "net2").iterdir()} == {"config.json", "model.safetensors"}  # no pickle


def test_predictions_equal_the_networks_own(exported, photos, tmp_path, capsys):
    folder, nets = exported
    output = tmp_path / "predictions.csv"
    predict.main(
        ["--model", str(folder), "--images", str(photos), "--output", str(output), "--batch_size", "2", "--top_k", "2"]
    )
    rows = {row["path"]: row for row in csv.DictReader(output.open())}
    assert len(rows) == 6 and "5 images named, 1 unreadable" in capsys.readouterr().out
    assert rows["broken.png"]["label"] == "" and rows["broken.png"]["error"]
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    for i in range(5):
        pixels = torch.from_numpy(np.array(Image.open(photos / "deep" / f"{i}.png"))).permute(2, 0, 1) / 255
        image = ((pixels - mean) / std)[None]
        p = ((nets[0](image) + nets[1](image)) / 2).softmax(1)[0]
        row = rows[f"deep/{i}.png"]
        best = p.argsort(descending=True)
        assert (row["label"], row["label_2"]) == (NAMES[best[0]], NAMES[best[1]])
        assert float(row["probability"]) == pytest.approx(p.max().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--model": "nowhere"}, "no exported model"),
        ({"--images": "nowhere"}, "nowhere"),
        ({"--output": "missing/out.csv"}, "does not exist"),
        ({"--top_k": "x"}, "--top_k"),
    ],
)
def test_bad_input_is_one_line(exported, photos, tmp_path, capsys, monkeypatch, change, said):
    monkeypatch.chdir(tmp_path)
    arguments = {"--model": str(exported[0]), "--images": str(photos), "--output": "out.csv"} | change
    with pytest.raises(SystemExit) as stopped:
        predict.main([word for pair in arguments.items() for word in pair])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
    assert not list(tmp_path.glob("*out.csv*"))


def test_a_damaged_export_is_named(exported):
    folder, _ = exported
    (folder / "net1" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="net1 cannot be loaded"):
        load_export(folder)
