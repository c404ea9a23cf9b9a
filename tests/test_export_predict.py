"""Exports through timm's own loader and `coreg-predict` against the networks they were made from."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from local_hub import local_hub
from PIL import Image
from runs import on_two_processes
from sklearn.covariance import LedoitWolf

from coreg.data.labels import NONE
from coreg.errors import UserError
from coreg.export import predict
from coreg.export.cutoff import CutOff, calibrated, calibration_line
from coreg.export.distance import as_bytes, fit_distances, from_bytes, largest
from coreg.export.ensemble import ensemble_logits, export
from coreg.export.ensemble import main as export_command
from coreg.export.folder import load_export, write_settings
from coreg.nets.model import create_backbone

NAMES = ["ant", "bee", "<b>cat</b>"]


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(0)
    arguments = {"norm": "group"}
    nets = [create_backbone("preact_resnet_tiny", 3, 3, arguments, pretrained=False).eval() for _ in range(2)]
    settings = {"class_names": NAMES, "image_size": 16, "channels": 3, "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    export(tmp_path / "export", nets, "preact_resnet_tiny", arguments, torch.randn(2, 3, 16, 16), **settings)
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
    ("change", "message"),
    [
        ({"--model": "nowhere"}, "no exported model"),
        ({"--images": "nowhere"}, "nowhere"),
        ({"--output": "missing/out.csv"}, "there is no folder"),
        ({"--output": "."}, "is a folder"),
        ({"--top_k": "x"}, "--top_k"),
    ],
)
def test_bad_input_is_one_line(exported, photos, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    arguments = {"--model": str(exported[0]), "--images": str(photos), "--output": "out.csv"} | change
    with pytest.raises(SystemExit) as stopped:
        predict.main([word for pair in arguments.items() for word in pair])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.glob("*out.csv*"))


def test_the_output_is_looked_at_before_the_model(exported, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "load_classifier", lambda path: pytest.fail("too early"))
    with pytest.raises(SystemExit):
        predict.main(["--model", str(exported[0]), "--images", str(photos), "--output", str(tmp_path)])


def test_predictions_go_through_links_and_into_devices(exported, photos, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    real, link = tmp_path / "elsewhere" / "real.csv", tmp_path / "link.csv"
    link.symlink_to(real)
    arguments = ["--model", str(exported[0]), "--images", str(photos), "--output"]
    predict.main([*arguments, str(link)])
    assert link.is_symlink() and len(real.read_text().splitlines()) == 7
    assert [path.name for path in real.parent.iterdir()] == ["real.csv"]
    predict.main([*arguments, os.devnull])
    assert Path(os.devnull).is_char_device()
    with pytest.raises(SystemExit) as stopped:  # a disk without space, met at the end
        predict.main([*arguments, "/dev/full"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and error.startswith("error: cannot write /dev/full (No space left on device)")


@pytest.mark.multiprocess
def test_two_at_once_and_one_that_writes_to_its_output(exported, photos, tmp_path):
    """The same output from two processes is one whole file; /dev/stdout is where the shell leads it."""
    words = ["--model", str(exported[0]), "--images", str(photos), "--output"]
    on_two_processes(predict.main, *words, tmp_path / "same.csv")
    whole = (tmp_path / "same.csv").read_text()
    assert len(whole.splitlines()) == 7 and not list(tmp_path.glob(".tmp*"))
    command = [sys.executable, "-m", "coreg.export.predict", *words, "/dev/stdout"]
    piped = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert piped.returncode == 0 and piped.stdout.startswith(whole)


def probabilities(nets, pixels):
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        return ((nets[0](images) + nets[1](images)) / 2).softmax(1).numpy()


def test_one_image_prints_its_best_classes_and_writes_nothing(exported, photos, tmp_path, capsys, monkeypatch):
    folder, nets = exported
    monkeypatch.chdir(tmp_path)
    image = photos / "deep" / "3.png"
    predict.main(["--model", str(folder), "--images", str(image), "--top_k", "5"])
    p = probabilities(nets, [np.array(Image.open(image))])[0]
    wanted = [f"{p[c]:.4f}  {NAMES[c]}" for c in sorted(range(3), key=lambda c: -p[c])]
    assert capsys.readouterr().out.splitlines() == wanted
    assert not (tmp_path / "predictions.csv").exists()
    predict.main(["--model", str(folder), "--images", str(image), "--output", "one.csv"])
    (row,) = csv.DictReader((tmp_path / "one.csv").open())
    assert row["path"] == "3.png" and f"{row['probability']}  {row['label']}" == wanted[0]


def test_odd_files_are_decoded_as_everywhere(exported, tmp_path, capsys):
    """Other sizes are squashed, EXIF rotation applied, palettes, 16-bit grey and transparency brought to 8-bit RGB."""
    folder, nets = exported
    rng, odd = np.random.default_rng(1), tmp_path / "odd"
    odd.mkdir()
    wide = Image.fromarray(rng.integers(0, 256, (40, 70, 3), dtype=np.uint8))
    wide.save(odd / "wide.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise by a quarter
    wide.save(odd / "turned.png", exif=turned)
    palette = wide.quantize(16)
    palette.save(odd / "palette.gif")
    deep = rng.integers(0, 65536, (20, 20), dtype=np.uint16)
    Image.fromarray(deep).save(odd / "deep.png")
    clear = Image.fromarray(rng.integers(0, 256, (16, 16, 4), dtype=np.uint8))
    clear.save(odd / "clear.png")
    output = tmp_path / "odd.csv"
    predict.main(["--model", str(folder), "--images", str(odd), "--output", str(output)])
    white = Image.new("RGBA", clear.size, "white")
    expected = {
        "wide.png": wide,
        "turned.png": wide.rotate(-90, expand=True),
        "palette.gif": palette.convert("RGB"),
        "deep.png": Image.fromarray((deep // 256).astype(np.uint8)).convert("RGB"),
        "clear.png": Image.alpha_composite(white, clear).convert("RGB"),
    }
    small = [np.array(image.resize((16, 16), Image.Resampling.BILINEAR)) for image in expected.values()]
    rows = {row["path"]: row for row in csv.DictReader(output.open())}
    for name, p in zip(expected, probabilities(nets, small)):
        assert rows[name]["label"] == NAMES[p.argmax()] and float(rows[name]["probability"]) == pytest.approx(
            p.max(), abs=1e-4
        )
    assert "5 images named, 0 unreadable" in capsys.readouterr().out


def test_the_temperature_flattens_and_the_order_stays(exported, photos, tmp_path, capsys):
    folder, nets = exported
    write_settings(folder, load_export(folder)[1] | {"temperature": 3.0})
    image = photos / "deep" / "0.png"
    predict.main(["--model", str(folder), "--images", str(image)])
    cold = probabilities(nets, [np.array(Image.open(image))])[0].astype(float)
    warm = cold ** (1 / 3) / (cold ** (1 / 3)).sum()
    wanted = [f"{warm[c]:.4f}  {NAMES[c]}" for c in np.argsort(-cold)]
    assert capsys.readouterr().out.splitlines() == wanted


def test_unreadable_files_are_listed_in_full_in_the_csv_and_a_few_on_the_terminal(exported, tmp_path, capsys):
    folder, _ = exported
    bad = tmp_path / "bad"
    bad.mkdir()
    Image.new("RGB", (16, 16)).save(bad / "good.png")
    for i in range(8):
        (bad / f"\x1b[31m{i}.png").write_bytes(b"no image")
    output = tmp_path / "out.csv"
    predict.main(["--model", str(folder), "--images", str(bad), "--output", str(output), "--batch_size", "4"])
    out = capsys.readouterr().out
    assert "1 images named, 8 unreadable" in out and out.count("  unreadable: ") == 5 and "and 3 more" in out
    assert "\x1b" not in out
    assert sum(row["error"] != "" for row in csv.DictReader(output.open())) == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.pt2", b"x", "could run code"),
        ("model.onnx", b"x", "no ONNX model"),
        ("folder.onnx", None, "cannot read"),
        ("fifo.onnx", None, "it is no file"),
        ("missing.onnx", None, "cannot read"),
    ],
)
def test_other_files_are_refused_in_one_line(photos, tmp_path, capsys, name, content, message):
    pytest.importorskip("onnxruntime")
    (tmp_path / "folder.onnx").mkdir()
    os.mkfifo(tmp_path / "fifo.onnx")
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        predict.main(["--model", str(tmp_path / name), "--images", str(photos)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_ties_go_to_the_first_class():
    assert predict.best(np.array([[0.2, 0.4, 0.4], [0.5, 0.0, 0.5]]), 2).tolist() == [[1, 2], [0, 2]]


# ---- how sure a class has to be -------------------------------------------------------------------------------------


def test_cut_offs_of_labelled_images_by_hand():
    """59 labelled images: ceil(60 x 0.95) = 57, so the 57th largest probability of the true class, and of the best one."""
    truth = np.linspace(0.02, 0.60, 59)  # of the true class, the second of three
    probs = np.stack([np.full(59, 0.3), truth, 0.7 - truth], axis=1).astype(np.float32)
    made = calibrated(NAMES, probs, np.ones(59, int), "labels.csv", None, 0.95, True)
    assert made.member == pytest.approx(np.sort(truth)[::-1][56])
    assert made.least == pytest.approx(sorted(max(0.3, p, 0.7 - p) for p in truth)[::-1][56])
    # images of no class do not move them
    more, classes = np.concatenate([probs, np.full((9, 3), 1 / 3)]), np.r_[np.ones(59, int), np.full(9, NONE)]
    assert calibrated(NAMES, more, classes, "labels.csv", None, 0.95, True).member == made.member


def test_conformal_sets_hold_the_class_as_often_as_was_asked():
    """Over many draws of 50 labelled and 50 new images of a bad, over-sure classifier; exactly 0.902 with these numbers."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):
        logits, classes = 3 * rng.normal(size=(100, 4)), rng.integers(0, 4, 100)
        logits[np.arange(100), classes] += rng.normal(size=100)
        probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        made = calibrated([*"abcd"], probs[:50], classes[:50], "labels.csv", None, 0.9, False)
        covered += ["abcd"[c] in made.prediction_set(row) for row, c in zip(probs[50:], classes[50:])]
    assert np.mean(covered) == pytest.approx(46 / 51, abs=0.01)


@pytest.mark.parametrize(("count", "coverage", "enough"), [(49, 0.95, 50), (0, None, 50), (98, 0.99, 99), (0, 0.8, 50)])
def test_too_few_labelled_images(count, coverage, enough):
    probs = np.full((count, 3), 1 / 3)
    with pytest.raises(UserError, match=f"labels.csv has {count} readable images .* at least {enough},"):
        calibrated(NAMES, probs, np.zeros(count, int), "labels.csv", None, coverage, True)
    calibrated(NAMES, np.full((enough, 3), 1 / 3), np.zeros(enough, int), "labels.csv", None, coverage, True)


def test_an_image_may_be_of_no_class_and_a_set_may_be_empty():
    cut = CutOff(NAMES, 0.5, 0.4, 0.95)
    rows = np.array([[0.5, 0.4, 0.1], [0.35, 0.34, 0.31], [0.1, 0.45, 0.45]])
    assert [cut.cells(row) for row in rows] == [["ant", "ant;bee"], ["ant", ""], ["bee", "bee;<b>cat</b>"]]
    assert [cut.is_none(row) for row in rows] == [False, True, True] and cut.none == 2
    assert "1.33 labels on average; 0 sets of one label, 1 of none" in cut.summary()[1]
    assert cut.called_none == "none of these" and CutOff(["ant", "None of these"]).called_none == ""


@pytest.fixture
def many(exported, tmp_path):
    """60 images, of which 55 have the label that the networks name, 4 have the next one and 1 is of no class."""
    rng, folder = np.random.default_rng(3), tmp_path / "many"
    folder.mkdir()
    pixels = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(60)]
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    p = probabilities(exported[1], pixels)
    classes = np.where(np.arange(60) < 55, p.argmax(axis=1), (p.argmax(axis=1) + 1) % 3)
    lines = [f"{i:02}.png,{NAMES[c] if i < 59 else 'none of these'}" for i, c in enumerate(classes)]
    (folder / "checked.csv").write_text("\n".join(["path,label", *lines]))
    return folder, p, classes


def test_predictions_with_a_cut_off(exported, many, tmp_path, capsys):
    folder, p, classes = many
    words = ["--model", str(exported[0]), "--images", str(folder), "--output", str(tmp_path / "out.csv")]
    least = float(np.sort(p.max(axis=1))[20:22].mean())
    predict.main([*words, "--min_probability", str(least)])
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["label"] == "none of these" for row in rows] == (p.max(axis=1) < least).tolist()
    assert [row["best"] for row in rows] == [NAMES[c] for c in p.argmax(axis=1)]
    assert all(float(row["probability"]) == pytest.approx(p[i].max(), abs=1e-4) for i, row in enumerate(rows))
    assert "21 of none of these" in capsys.readouterr().out

    predict.main([*words, "--coverage", "0.9", "--min_probability", "auto", "--calibrate", str(folder / "checked.csv")])
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    member = np.sort(p[np.arange(59), classes[:59]])[::-1][53]  # ceil(60 x 0.9) = 54
    best = np.sort(p[:59].max(axis=1))[::-1][53]
    for row, shares in zip(rows, p):
        # those that lie at the threshold itself are rounded one way or the other
        if not np.isclose(shares, member, atol=1e-5).any():
            assert row["prediction_set"] == ";".join(NAMES[c] for c in np.argsort(-shares) if shares[c] >= member)
        if not np.isclose(shares.max(), best, atol=1e-5):
            assert (row["label"] == "none of these") == (shares.max() < best)
    out = capsys.readouterr().out
    assert f"59 labelled images, {55 / 59:.1%} of them named rightly" in out and "of 1 labelled 'none of these'" in out
    predict.main([*words[:3], str(folder / "07.png"), *("--coverage", "0.9", "--calibrate", str(folder / "checked.csv"))])
    assert capsys.readouterr().out.splitlines()[-1].startswith("prediction set for 90.0% coverage: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coverage", "0.9"], "--calibrate is missing"),
        (["--min_probability", "auto"], "--calibrate is missing"),
        (["--min_probability", "sure"], "--min_probability is 'sure'; give a number from 0 to 1"),
        (["--min_probability", "1.5"], "--min_probability is '1.5'"),
        (["--min_probability", "0.5", "--calibrate", "few.csv"], "--calibrate needs --coverage 0.95"),
        (["--coverage", "0.9", "--calibrate", "few.csv"], "few.csv has 2 readable images"),
        (["--coverage", "0.9", "--calibrate", "none.csv"], "none.csv"),
        (["--coverage", "0.9", "--calibrate", "photos"], "photos has 0 readable images"),
    ],
)
def test_cut_offs_that_cannot_be_are_one_line(exported, photos, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.csv").write_text("path,label\ndeep/0.png,ant\ndeep/1.png,bee\nbroken.png,bee\n")
    with pytest.raises(SystemExit) as stopped:
        predict.main(["--model", str(exported[0]), "--images", "photos", "--output", "out.csv", *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out.csv").exists()


def test_labelled_images_may_lie_elsewhere(exported, many, photos, tmp_path, capsys):
    """A file beside its images, or a folder with a folder for each class."""
    folder = many[0]
    words = [
        "--model",
        str(exported[0]),
        "--images",
        str(photos),
        "--output",
        str(tmp_path / "out.csv"),
        "--coverage",
        "0.9",
    ]
    predict.main([*words, "--calibrate", str(folder / "checked.csv")])
    assert "59 labelled images" in capsys.readouterr().out
    for i, image in enumerate(sorted(folder.glob("*.png"))):
        place = tmp_path / "sorted" / NAMES[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.rename(place / image.name)
    predict.main([*words, "--calibrate", str(tmp_path / "sorted")])
    assert "60 labelled images" in capsys.readouterr().out


# ---- how far an image is from those of training ---------------------------------------------------------------------


def test_distances_are_those_of_the_formula():
    """Each network: root of (f - m)' P (f - m) to the nearest mean, P the precision; then the mean over the networks."""
    rng, classes = np.random.default_rng(0), np.arange(40) % 3
    features = [rng.normal(size=(40, d)).astype(np.float32) + classes[:, None] for d in (4, 6)]
    new = [rng.normal(size=(5, d)).astype(np.float32) for d in (4, 6)]
    wanted = np.zeros(5)
    for train, some in zip(features, new):
        means = [train[classes == c].mean(axis=0) for c in range(3)]
        precision = LedoitWolf().fit(train - np.stack(means)[classes]).precision_
        wanted += [min(np.sqrt((f - m) @ precision @ (f - m)) for m in means) / 2 for f in some]
    made = fit_distances(features, classes)
    got = made([torch.from_numpy(some) for some in new])
    assert got.numpy() == pytest.approx(wanted, rel=1e-4)
    again = from_bytes(as_bytes(made), 2)
    assert torch.equal(again([torch.from_numpy(some) for some in new]), got)
    with pytest.raises(UserError, match="do not differ within classes"):
        fit_distances([np.ones((9, 4), np.float32)], classes[:9])


def test_the_largest_distance_by_hand():
    """ceil(60 x 0.95) = 57: the 57th smallest of 59; with 18 there is none."""
    apart = np.random.default_rng(0).permutation(59).astype(np.float32)
    assert largest(apart, 0.95) == 56 and largest(apart[:18], 0.95) == np.inf
    probs, classes = np.full((62, 3), 1 / 3), np.r_[np.zeros(59, int), np.full(3, NONE)]
    cut = calibrated(NAMES, probs, classes, "labels.csv", None, None, False, np.r_[apart, 1, 90, 91])
    assert cut.farthest == 56 and cut.least is None and cut.columns == ["best", "distance"]
    assert [cut.is_none(probs[0], d) for d in (56, 56.5)] == [False, True]
    line = calibration_line(cut, probs, classes, "labels.csv", np.r_[apart, 1, 90, 91])
    assert line.endswith("2 of 3 labelled 'none of these' are recognised")


def test_an_export_without_distances_says_how_to_measure_them(exported, photos, tmp_path, capsys):
    for word in ("auto", "3"):
        words = ["--model", str(exported[0]), "--images", str(photos), "--output", str(tmp_path / "o.csv")]
        with pytest.raises(SystemExit):
            predict.main([*words, "--max_distance", word])
        error = capsys.readouterr().err
        assert "knows no distances; type: coreg-export --run runs/a --distances" in error and error.count("\n") == 1


def test_what_is_published_is_loaded_from_there(exported, tmp_path, monkeypatch, capsys):
    """By the hub's own client, both ways, from a hub on loopback."""
    with local_hub(tmp_path / "hub") as address:
        constants = "huggingface_hub.constants."
        monkeypatch.setattr(constants + "ENDPOINT", address)
        monkeypatch.setattr(constants + "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
        export_command(["--run", str(exported[0]), "--push_to_hub", "someone/insects"])
        assert capsys.readouterr().out.startswith(f"{address}/someone/insects")
        there = tmp_path / "hub" / "models" / "someone" / "insects"
        for file in exported[0].rglob("*"):
            assert not file.is_file() or (there / file.relative_to(exported[0])).read_bytes() == file.read_bytes()
        theirs, ours = (predict.load_classifier(path) for path in ("hf-hub:someone/insects", exported[0]))
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    assert theirs.class_names == NAMES and torch.equal(theirs.run(pixels), ours.run(pixels))
