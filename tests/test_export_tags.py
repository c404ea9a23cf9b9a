"""Exports of networks that give images several labels: sigmoid inside, thresholds beside, tags from `coreg-predict`."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from runs import refused

from coreg import load_classifier
from coreg.annotate.exported import resolve_run
from coreg.errors import UserError
from coreg.export import ensemble as exporting
from coreg.export import predict
from coreg.export.ensemble import export
from coreg.export.folder import load_export, write_settings
from coreg.export.tagging import read_thresholds
from coreg.nets.model import create_backbone

NAMES = ["ant", "bee", "cow", "red fox"]
AT = [0.4, 0.9, 0.5, 1.5]  # the last is never reached
ABOUT = {"class_names": NAMES, "image_size": 16, "channels": 3, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """An export of an untrained network, the network, eight photos of one folder, and a file that is none."""
    root = tmp_path_factory.mktemp("tagger")
    torch.manual_seed(0)
    arguments = {"norm": "group"}
    net = create_backbone("preact_resnet_tiny", 4, 3, arguments, pretrained=False).eval()
    with torch.no_grad():
        # so that probabilities of noise lie on both sides of a half
        net.get_classifier().weight.mul_(30)
        net.get_classifier().bias.mul_(30).add_(torch.tensor([1.0, 8.7, 3.6, -2.5]))
    more = {"thresholds": AT, "thresholds_from": "predictions"}
    export(root / "export", [net], "preact_resnet_tiny", arguments, torch.randn(2, 3, 16, 16), **ABOUT, **more)
    rng = np.random.default_rng(0)
    (root / "photos").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / "photos" / f"{i}.png")
    (root / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return root, net


@pytest.fixture(scope="module")
def onnx(tagger):
    pytest.importorskip("onnxscript")
    for kind in ("onnx", "torch_export"):
        words = ["--run", str(tagger[0] / "export"), "--format", kind, "--images", str(tagger[0] / "photos")]
        exporting.main(words)
    return tagger[0] / "export" / "model.onnx"


def by_hand(tagger):
    """float64 (8, 4), the sigmoid of the network's logits, from the pixels."""
    root, net = tagger
    mean, std = (np.array(ABOUT[name]) for name in ("mean", "std"))
    pixels = np.stack([np.array(Image.open(root / "photos" / f"{i}.png")) for i in range(8)])
    with torch.no_grad():
        logits = net(torch.from_numpy((pixels / 255 - mean) / std).permute(0, 3, 1, 2).float()).double().numpy()
    return 1 / (1 + np.exp(-logits))


def predicted(root, model, *more):
    words = ["--model", str(model), "--images", str(root / "photos"), "--output", str(root / "p.csv"), *map(str, more)]
    predict.main(words)
    with (root / "p.csv").open(newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def check(rows, p, at):
    """Tags in the order of their probabilities, which stand beside them and, of all labels, in columns of their own."""
    for i, row in enumerate(p):
        line = rows[f"{i}.png"]
        wanted = sorted((c for c in range(4) if row[c] >= at[c]), key=lambda c: -row[c])
        assert line["labels"] == ";".join(NAMES[c] for c in wanted)
        np.testing.assert_allclose([float(x) for x in line["probabilities"].split(";") if x], row[wanted], atol=6e-5)
        np.testing.assert_allclose([float(line[f"p({name})"]) for name in NAMES], row, atol=6e-5)
    assert rows["broken.png"]["error"] and rows["broken.png"]["labels"] == rows["broken.png"]["p(ant)"] == ""


def test_an_image_gets_the_labels_that_reach_their_thresholds(tagger, capsys):
    p = by_hand(tagger)
    assert 0 < (p >= AT).sum() < p.size / 2
    check(predicted(tagger[0], tagger[0] / "export"), p, AT)
    assert "8 images named, 1 unreadable" in capsys.readouterr().out


def test_programs_have_the_sigmoid_inside(tagger, onnx):
    p, root = by_hand(tagger), tagger[0]
    check(predicted(root, onnx), p, AT)
    check(predicted(root, onnx, "--threshold", 0.4), p, [0.4] * 4)
    pixels = torch.from_numpy(np.stack([np.array(Image.open(root / "photos" / f"{i}.png")) for i in range(3)]))
    extra = {"coreg.json": ""}
    program = torch.export.load(str(onnx.with_name("model.pt2")), extra_files=extra)
    _, probabilities = program.module()(pixels.permute(0, 3, 1, 2).contiguous())
    np.testing.assert_allclose(probabilities.detach().numpy(), p[:3], atol=1e-5)
    assert json.loads(extra["coreg.json"])["thresholds"] == AT


def test_thresholds_of_ones_own(tagger, tmp_path):
    p, export_folder = by_hand(tagger), tagger[0] / "export"
    (tmp_path / "at.csv").write_text("label,threshold\nbee,0.1\nRed_Fox,0.25\n")
    (tmp_path / "at.json").write_text('{"cow": 0, "ant": 1}')
    for given, at in (("0.3", [0.3] * 4), ("at.csv", [0.4, 0.1, 0.5, 0.25]), ("at.json", [1.0, 0.9, 0.0, 1.5])):
        given = given if given == "0.3" else tmp_path / given
        check(predicted(tagger[0], export_folder, "--threshold", given), p, at)
        assert read_thresholds(str(given), NAMES, np.array(AT)).tolist() == at


@pytest.mark.parametrize(
    ("given", "content", "message"),
    [
        ("1.2", None, "--threshold is 1.2; give a number from 0 to 1"),
        ("nan", None, "--threshold is nan"),
        ("nothing", None, "cannot read nothing: No such file or directory; give a number"),
        ("a.csv", "label,threshold\nbe,0.1\n", "has the label 'be', which is none of the model's, did you mean 'bee'?"),
        ("a.csv", "label,threshold\nbee,high\n", "line 2 has the threshold 'high'"),
        ("a.csv", "path,labels\nbee,1\n", "has no column 'label': its first line is 'path,labels'"),
        ("a.json", '{"bee": "x"}', "bee is 'x', expected a number"),
        ("a.json", "[]", "expected an object"),
    ],
)
def test_thresholds_that_are_none_are_one_line(tagger, tmp_path, monkeypatch, given, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / given).write_text(content)
    with pytest.raises(UserError) as raised:
        read_thresholds(given, NAMES, np.array(AT))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_one_image_prints_its_labels_and_the_next_best(tagger, capsys):
    p = by_hand(tagger)
    for i in range(8):
        predict.main(["--model", str(tagger[0] / "export"), "--images", str(tagger[0] / "photos" / f"{i}.png")])
        lines = capsys.readouterr().out.splitlines()
        order = sorted(range(4), key=lambda c: -p[i, c])
        named = [f"{p[i, c]:.4f}  {NAMES[c]}" for c in order if p[i, c] >= AT[c]]
        others = [f"{p[i, c]:.4f}  ({NAMES[c]}: below {AT[c]:.4f})" for c in order if p[i, c] < AT[c]]
        assert lines == (named or ["no label reaches its threshold"]) + others[: 3 - len(named)]


def test_from_python(tagger):
    classifier = load_classifier(tagger[0] / "export")
    assert classifier.thresholds.tolist() == AT
    wanted = [[NAMES[c] for c in np.argsort(-row) if row[c] >= AT[c]] for row in by_hand(tagger)]
    assert classifier.tags(by_hand(tagger)) == wanted and [] in wanted
    classifier.thresholds = None
    with pytest.raises(UserError, match="names one class"):
        classifier.tags(by_hand(tagger))


def test_a_persons_labels_choose_thresholds(tagger, onnx, tmp_path, capsys):
    """Those of the largest F1 of each label; a label that no image has keeps its own. Programs are written anew."""
    root, p = tagger[0], by_hand(tagger)
    copy = shutil.copytree(root, tmp_path / "copy")
    # bee wherever its probability is above its median, cow by a coin, ant nowhere
    shown = {"bee": p[:, 1] > np.median(p[:, 1]), "cow": np.arange(8) % 2 == 0}
    lines = ["path,labels"] + [f"photos/{i}.png,{';'.join(n for n in shown if shown[n][i])}" for i in range(8)]
    (copy / "checked.csv").write_text("\n".join(lines))
    words = ["--run", copy / "export", "--images", copy / "photos", "--labels", copy / "checked.csv"]
    assert "has 8 readable images" in refused(capsys, exporting.main, *words)
    # as many as there have to be
    for i in range(8, 24):
        shutil.copy(copy / "photos" / f"{i % 8}.png", copy / "photos" / f"{i}.png")
        lines.append(f"photos/{i}.png,{lines[1 + i % 8].split(',')[1]}")
    (copy / "checked.csv").write_text("\n".join(lines))
    exporting.main(list(map(str, words)))
    assert "coreg.json: thresholds, fitted to" in capsys.readouterr().out
    settings = load_export(copy / "export")[1]
    at = settings["thresholds"]
    assert settings["thresholds_from"] == "labels of checked.csv" and at[0] == AT[0] and at[3] == AT[3]
    assert ((p[:, 1] >= at[1]) == shown["bee"]).all()

    def f1(t):
        return 2 * (shown["cow"] & (p[:, 2] >= t)).sum() / ((p[:, 2] >= t).sum() + 4)

    assert f1(at[2]) == pytest.approx(max(map(f1, p[:, 2])))
    assert load_classifier(copy / "export" / "model.onnx").thresholds.tolist() == at


def test_what_does_not_fit_is_refused(tagger, tmp_path, capsys):
    export_folder = tagger[0] / "export"
    _, settings = load_export(export_folder)
    copy = shutil.copytree(export_folder, tmp_path / "export")
    write_settings(copy, settings | {"thresholds": [0.5]})
    with pytest.raises(UserError, match="thresholds has 1 numbers for 4 labels"):
        load_export(copy)
    with pytest.raises(UserError, match="gives images several labels, and an annotator names one class"):
        resolve_run(str(tagger[0] / "export"))
    write_settings(copy, {name: value for name, value in settings.items() if name != "thresholds"})
    words = ["--model", copy, "--images", tagger[0] / "photos", "--output", tmp_path / "p.csv", "--threshold", "0.5"]
    assert "names one class an image and has no thresholds" in refused(capsys, predict.main, *words)
    words = ["--model", export_folder, *words[2:-2]]
    for more in (["--min_probability", "0.5"], ["--coverage", "0.9", "--calibrate", "checked.csv"]):
        assert "gives images several labels; --threshold says how sure" in refused(capsys, predict.main, *words, *more)
