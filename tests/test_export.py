"""Exports in every format against the run that they come from, on real images (scikit-learn's digits)."""

import csv
import json
import math
import re
import shutil
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import error_of, refused
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_digits

import train_coreg
from coreg.errors import UserError
from coreg.export import ensemble as exporting
from coreg.export import predict
from coreg.export.calibration import fit_temperature, fit_to_agreement, fit_to_labels, negative_log_likelihood
from coreg.export.card import escaped, model_card, public_name
from coreg.export.ensemble import Ensemble, agreement
from coreg.export.folder import load_export
from coreg.export.predict import load_classifier
from coreg.nets.model import on_the_hub

SHORT = "--recipe digits --refine none --epochs 3 --warmup_epochs 3 --queue_size 256 --workers 0 --report_to none --lr 0.1"
NAMES = "zero one two three four five six seven eight nine".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the digits: few epochs, but so many that predictions differ from image to image."""
    root = tmp_path_factory.mktemp("export") / "run"
    train_coreg.main(["--output_dir", str(root), *SHORT.split()])
    return root


@pytest.fixture(scope="module")
def programs(run):
    pytest.importorskip("onnxscript")
    for kind in ("onnx", "torch_export"):
        exporting.main(["--run", str(run), "--format", kind])
    return run / "export"


def purified(run):
    with (run / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def predictions(model, tmp_path, images="builtin:digits"):
    output = tmp_path / "predictions.csv"
    predict.main(["--model", str(model), "--images", images, "--output", str(output), "--batch_size", "500"])
    with output.open(newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("model", [".", "export", "export/model.onnx"])
def test_predictions_are_the_runs_own(run, programs, tmp_path, model):
    predicted = predictions(run / model, tmp_path)
    mine = purified(run)
    assert len(mine) == 1437 and len(predicted) == 1797
    same = [predicted[row["path"]]["label"] == row["label"] for row in mine]
    # a tie in the last bit may fall either way; there is at most one such image here
    assert sum(same) >= len(mine) - 1
    for row in mine:
        assert float(predicted[row["path"]]["probability"]) == pytest.approx(float(row["probability"]), abs=2e-4)


def test_accuracy_of_an_export_is_the_one_in_the_report(run, tmp_path):
    report = json.loads((run / "report.json").read_text())
    predicted, target = predictions(run, tmp_path), load_digits().target
    split = {row["path"] for row in purified(run)}
    names = sorted(predicted)
    right = [predicted[path]["label"] == NAMES[target[int(re.search(r"\d+", path)[0])]] for path in names if path in split]
    assert np.mean(right) == pytest.approx(report["accuracy"]["train"]["ensemble"], abs=1e-3)


@pytest.mark.parametrize("n", [1, 3, 64])
def test_an_exported_program_computes_the_ensemble_for_any_batch(programs, n):
    nets, settings = load_export(programs)
    images = (load_digits().images[:n, None] * 15.9375).astype(np.uint8).repeat(2, 2).repeat(2, 3)
    x = (images / 255 - settings["mean"][0]) / settings["std"][0]
    with torch.no_grad():
        both = [net(torch.from_numpy(x).float()).double() for net in nets]
    logits = (both[0] + both[1]) / 2 / settings["temperature"]
    extra = {"coreg.json": ""}
    program = torch.export.load(str(programs / "model.pt2"), extra_files=extra)
    assert json.loads(extra["coreg.json"]) == {"class_names": NAMES, "image_size": 16, "channels": 1}
    for output, wanted in zip(program.module()(torch.from_numpy(images)), (logits, logits.softmax(1))):
        torch.testing.assert_close(output.double(), wanted, atol=1e-4, rtol=1e-4)


def test_what_was_compared_is_on_record(run, programs):
    settings = json.loads((programs / "coreg.json").read_text())
    for kind in ("timm", "onnx", "torch_export"):
        record = settings["agreement"][kind]
        assert record["images"] == 64 and 0 <= record["largest_difference"] <= record["allowed"] < 0.01
    assert settings["temperature"] == json.loads((run / "report.json").read_text())["temperature"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_program_that_differs_is_refused_and_not_kept(run, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(run / "export", tmp_path / "export", ignore=shutil.ignore_patterns("model.pt2"))
    before, make = contents(folder), exporting.as_program

    def wrong(*arguments):
        content, read_back = make(*arguments)
        return content, lambda images: read_back(images) + 0.01

    monkeypatch.setattr(exporting, "as_program", wrong)
    error = refused(capsys, exporting.main, "--run", folder, "--format", "torch_export", "--images", "builtin:digits")
    assert re.search(r"differ by 0\.01 .* is allowed; it was not kept", error) and contents(folder) == before


def test_a_damaged_export_is_written_again_as_its_error_says(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    weights = copy / "export" / "net1" / "model.safetensors"
    weights.write_bytes(b"x")
    with pytest.raises(UserError, match=r"model.safetensors does not agree .* delete report.json"):
        load_export(copy)
    (copy / "report.json").unlink()
    train_coreg.main(["--output_dir", str(copy), *SHORT.split()])
    assert weights.read_bytes() == (run / "export" / "net1" / "model.safetensors").read_bytes()
    load_export(copy)


def test_numbers_that_are_none_do_not_agree():
    with pytest.raises(UserError, match="differ by nan"):
        agreement(torch.tensor([[math.nan]]), torch.tensor([[0.0]]), "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--run is missing"),
        (["--run", "RUN"], "nothing to do"),
        (["--run", "nowhere", "--format", "onnx"], "nowhere is no exported model"),
        (["--run", "RUN", "--format", "pickle"], "--format"),
        (["--run", "RUN", "--format", "onnx", "--images", "nowhere"], "nowhere does not exist"),
        (["--run", "RUN", "--labels", "nowhere.csv"], "nowhere.csv does not exist"),
    ],
)
def test_bad_input_of_the_command_is_one_line(run, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        exporting.main([str(run) if word == "RUN" else word for word in words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_an_export_without_its_run_needs_images(run, tmp_path):
    (tmp_path / "moved").mkdir()
    with pytest.raises(UserError, match="name some with --images"):
        exporting.images_of_run(tmp_path / "moved", None)


def test_missing_onnx_packages_are_named(run, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(SystemExit):
        exporting.main(["--run", str(run), "--format", "onnx"])
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_pushing_offline_fails_at_once_in_one_line(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as stopped:
        exporting.main(["--run", str(run), "--push_to_hub", "someone/digits"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: someone/digits could not be uploaded")
    assert error.count("\n") == 1


def test_pushing_uploads_the_folder_as_a_private_model(run, monkeypatch, capsys):
    calls = []

    class Hub:
        def whoami(self):
            calls.append("whoami")

        def create_repo(self, name, private, exist_ok, repo_type):
            calls.append((name, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, repo_type, commit_message):
            calls.append((repo_id, folder_path, repo_type))
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    exporting.main(["--run", str(run), "--push_to_hub", "someone/digits"])
    assert calls == ["whoami", ("someone/digits", True, True), ("someone/digits", run / "export", "model")]
    assert capsys.readouterr().out == "address\n"


def test_the_card_names_the_starting_weights_that_are_on_the_hub(run):
    report, settings = json.loads((run / "report.json").read_text()), load_export(run)[1]
    assert on_the_hub("tf_efficientnet_lite0", True) == {"base_model": "timm/tf_efficientnet_lite0.in1k"}
    assert (
        on_the_hub("tf_efficientnet_lite0", False) == on_the_hub("local-dir:x", True) == on_the_hub("annotator", True) == {}
    )
    front = yaml.safe_load(model_card(report | {"base_model": "timm/x: y"}, settings).split("---")[1])
    assert front["base_model"] == "timm/x: y" and front["metrics"] == ["accuracy"] and "coreg" in front["tags"]
    assert "base_model" not in yaml.safe_load(model_card(report, settings).split("---")[1])


def test_a_model_of_the_hub_is_loaded_with_its_own_files_alone(run, monkeypatch):
    asked = []

    def snapshot(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(run / "export")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("coreg.hub.hub_answers", lambda: True)
    theirs, ours = load_classifier("hf-hub:someone/digits@v1"), load_classifier(run)
    assert theirs.class_names == ours.class_names
    ((name, revision, patterns),) = asked
    files = [path.relative_to(run / "export").as_posix() for path in (run / "export").rglob("*") if path.is_file()]
    taken = [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)]
    assert (name, revision) == ("someone/digits", "v1") and {"coreg.json", "net1/model.safetensors"} <= set(taken)
    assert not any(fnmatch(file, pattern) for pattern in patterns for file in ("model.py", "net1/model.bin", "x.pt2"))


def test_a_model_of_the_hub_without_network_is_one_line(monkeypatch):
    monkeypatch.setattr("coreg.hub.hub_answers", lambda: False)
    monkeypatch.setenv("HF_HUB_CACHE", "/nowhere")
    assert error_of(load_classifier, "hf-hub:nobody/nothing").startswith("hf-hub:nobody/nothing could not be loaded")


# ---- distances ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def far(run, tmp_path_factory):
    """A copy of the run whose export knows distances."""
    copy = tmp_path_factory.mktemp("far") / "run"
    shutil.copytree(run, copy)
    exporting.main(["--run", str(copy), "--distances"])
    return copy


def test_images_far_from_those_of_training_are_of_no_class(run, far, tmp_path, capsys):
    """95 % of the test images are kept, and pictures of noise are not; what else is predicted does not change."""
    settings, before = load_export(far)[1], load_export(run)[1]
    assert settings["distances"]["chosen_on"] == "360 test images" and "distances" not in before
    noise = tmp_path / "noise"
    noise.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(noise / f"{i}.png")
    rows = {}
    for images in ("builtin:digits", str(noise)):
        output = tmp_path / "out.csv"
        predict.main(["--model", str(far), "--images", images, "--output", str(output), "--max_distance", "auto"])
        with output.open(newline="") as file:
            rows |= {row["path"]: row for row in csv.DictReader(file)}
    assert "of none of these: the distance from the training images is above" in capsys.readouterr().out
    assert all(rows[f"{i}.png"]["label"] == "none of these" for i in range(4))
    plain, trained = predictions(run, tmp_path), {row["path"] for row in purified(run)}
    assert {path: row["label"] for path, row in plain.items()} == {path: rows[path]["best"] for path in plain}
    kept = [rows[path]["label"] != "none of these" for path in plain if path not in trained]
    assert len(kept) == 360 and sum(kept) == math.ceil(361 * 0.95)
    bound = settings["distances"]["farthest"]
    assert all((float(row["distance"]) > bound) == (row["label"] == "none of these") for row in rows.values()
               if abs(float(row["distance"]) - bound) > 0.01)  # fmt: skip


def test_a_damaged_file_of_distances_is_one_line(far, tmp_path):
    copy = tmp_path / "export"
    shutil.copytree(far / "export", copy)
    file = copy / "distances.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "does not agree with its checksum" in error_of(load_classifier, copy)
    file.unlink()
    assert "distances.safetensors is damaged" in error_of(load_classifier, copy)


def test_distances_need_the_images_of_the_run(far, tmp_path, capsys):
    Image.new("L", (16, 16)).save(tmp_path / "one.png")
    error = refused(capsys, exporting.main, "--run", str(far), "--distances", "--images", str(tmp_path))
    assert "0 of the 1437 training images" in error and "--images" in error


# ---- temperature ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_the_temperature_minimises_the_objective(scale):
    rng = np.random.default_rng(0)
    logits = scale * rng.normal(size=(300, 5))
    classes = np.where(rng.random(300) < 0.6, logits.argmax(axis=1), rng.integers(0, 5, 300))
    own = fit_temperature(logits, classes)

    def objective(t):
        return -np.mean([row[c] / t - np.log(sum(math.exp(z / t) for z in row)) for row, c in zip(logits, classes)])

    other = minimize_scalar(lambda log_t: objective(math.exp(log_t)), bounds=(-3, 3), method="bounded")
    assert own == pytest.approx(math.exp(other.x), rel=1e-3)
    assert negative_log_likelihood(logits, classes, own) == pytest.approx(objective(own), abs=1e-12)


def test_the_temperature_recovers_one_that_is_known():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(40_000, 3))
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    classes = (rng.random((len(p), 1)) > p.cumsum(axis=1)).sum(axis=1)
    assert fit_temperature(2.5 * z, classes) == pytest.approx(2.5, rel=0.05)


def test_the_temperature_stays_in_its_bounds():
    certain = np.eye(3) * 10
    assert fit_temperature(certain, np.arange(3)) == pytest.approx(0.05)
    assert fit_temperature(certain, np.array([1, 2, 0])) == pytest.approx(20)
    assert np.isfinite(fit_temperature(np.zeros((1, 2)), np.array([0])))
    huge = np.array([[1e4, -1e4], [1e4, -1e4]])
    assert np.isfinite(fit_temperature(huge, np.array([0, 1])))


def test_agreement_is_symmetric_and_uses_the_other_networks_class():
    rng = np.random.default_rng(2)
    nets = [rng.normal(size=(50, 4)), rng.normal(size=(50, 4))]
    nets[1][:30] = nets[0][:30] + 0.1 * rng.normal(size=(30, 4))
    fitted = fit_to_agreement(nets)
    grid = np.exp(np.linspace(math.log(0.1), math.log(10), 2000))

    def objective(t):
        each = []
        for one, other in ((0, 1), (1, 0)):
            p = np.exp(nets[one] / t) / np.exp(nets[one] / t).sum(axis=1, keepdims=True)
            each += [-math.log(p[i, nets[other][i].argmax()]) for i in range(50)]
        return np.mean(each)

    assert fitted["temperature"] == pytest.approx(grid[np.argmin([objective(t) for t in grid])], rel=5e-3)
    assert fitted["calibration"]["negative_log_likelihood"] == pytest.approx(objective(fitted["temperature"]))
    assert fit_to_agreement(nets[::-1])["temperature"] == pytest.approx(fitted["temperature"])
    assert fit_to_agreement(nets[:1])["temperature"] == 1.0


def save_digits(folder, rows):
    """Digits as PNG files that decode to what `builtin:digits` gives, and a CSV file with their labels."""
    folder.mkdir()
    bunch = load_digits()
    lines = ["path,label"]
    for row in rows:
        Image.fromarray((bunch.images[row] * 15.9375).astype(np.uint8)).save(folder / f"{row}.png")
        lines.append(f"{row}.png,{NAMES[bunch.target[row]]}")
    (folder / "checked.csv").write_text("\n".join(lines) + "\n")
    return folder / "checked.csv"


def test_labels_of_a_person_refit_the_temperature_and_the_programs(programs, tmp_path, capsys):
    folder = shutil.copytree(programs, tmp_path / "export", ignore=shutil.ignore_patterns("model.pt2"))
    before = load_export(folder)[1]["temperature"]
    checked = save_digits(tmp_path / "checked", range(40))
    exporting.main(["--run", str(folder), "--labels", str(checked), "--images", "builtin:digits"])
    nets, settings = load_export(folder)
    files = [Image.open(checked.parent / f"{i}.png").resize((16, 16), Image.Resampling.BILINEAR) for i in range(40)]
    pixels = torch.from_numpy(np.stack([np.array(file)[None] for file in files]))
    with torch.no_grad():
        raw = Ensemble(nets, settings | {"temperature": 1.0}).eval()(pixels)[0].numpy()
    wanted = fit_to_labels(raw, load_digits().target[:40], "checked.csv")
    assert settings["temperature"] == pytest.approx(wanted["temperature"], rel=1e-4) != before
    assert settings["calibration"]["fitted_to"] == "labels of checked.csv" and settings["calibration"]["images"] == 40
    # the ONNX file carries the new one
    capsys.readouterr()
    for model in (folder, folder / "model.onnx"):
        predict.main(["--model", str(model), "--images", str(checked.parent / "7.png"), "--top_k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[:2] == lines[2:]


def test_too_few_labels_are_refused(run, tmp_path):
    checked = save_digits(tmp_path / "few", range(5))
    nets, settings = load_export(run)
    with pytest.raises(UserError, match=r"has 5 readable images .* at least 20"):
        exporting.calibrate(nets, settings, str(checked))


# ---- the card -------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_report_says(run):
    text = (run / "export" / "README.md").read_text()
    report = json.loads((run / "report.json").read_text())
    accuracy = report["accuracy"]["test"]
    row = next(line for line in text.splitlines() if line.startswith("| test |"))
    low, high = accuracy["interval"]
    zero_shot = report["annotator"]["zero_shot_accuracy"]["test"]
    assert row == f"| test | {zero_shot:.1%} | {accuracy['ensemble']:.1%} | {low:.1%} to {high:.1%} | 360 |"
    assert all(f"| {name} |" in text for name in NAMES) and "No label was used" in text


def test_the_card_shows_hostile_names_letter_by_letter():
    report = {
        "method": "<i>m</i>",
        "dataset": "/home/alice/secret/[photos](http://x)",
        "labels_used": 3,
        "images": {"train": 5},
        "annotator": {"name": "local-dir:/home/alice/models/tiny", "mean_candidates": 1.5},
        "parameters": 1e6,
        "warnings": ["1 of 6 classes is hardly ever predicted (<script>)"],
        "versions": {"coreg": "1"},
    }
    names = ["<script>alert(1)</script>", "a|b\n# c", "![x](http://y)", "---", "\x1b[31mred", "`code`"]
    text = model_card(report, {"class_names": names, "nets": 1, "image_size": 8, "channels": 3})
    assert "<script>" not in text and "<i>" not in text and "alice" not in text and "\x1b" not in text
    assert "](http" not in text and r"a\|b \# c" in text and "3 labels that a person gave" in text
    assert r"1 of 6 classes is hardly ever predicted \(&lt;script&gt;\)" in text
    assert "No true labels are known" in text and "One network of 1.00 M" in text
    assert text.startswith("---\nlibrary_name: timm\n") and text.count("\n---\n") == 1


def test_names_that_are_no_paths_stay():
    assert public_name("ViT-B-32/openai") == "ViT-B-32/openai"
    assert public_name("hf-hub:ORG/NAME") == "hf-hub:ORG/NAME"
    assert public_name("/data/photos/") == "photos" and public_name("builtin:digits") == "builtin:digits"
    assert public_name('joined:["/a/b", "/c/d.csv"]') == 'joined:["b", "d.csv"]'
    assert escaped("plain name") == "plain name"


# ---- the epoch that was chosen without labels ------------------------------------------------------------------------


def test_the_chosen_epoch_is_exported_with_a_card_of_its_own(tmp_path, monkeypatch):
    # the last epoch loses, so that an earlier one is chosen
    monkeypatch.setattr("coreg.run.networks.consensus", lambda networks: -1.0)
    words = (
        "--recipe digits --refine none --epochs 2 --warmup_epochs 1 --queue_size 256 --workers 0 --report_to none --lr 0.1"
    )
    train_coreg.main(["--output_dir", str(tmp_path / "run"), *words.split()])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    chosen = report["chosen_epoch"]
    assert chosen["epoch"] == 1 and chosen["epochs"] == 2
    predicted = predictions(tmp_path / "run" / "export_chosen", tmp_path)
    target = load_digits().target
    trained_on = {row["path"] for row in purified(tmp_path / "run")}
    for split, n in (("train", 1437), ("test", 360)):
        paths = [path for path in predicted if (path in trained_on) == (split == "train")]
        right = np.mean([predicted[path]["label"] == NAMES[target[int(re.search(r"\d+", path)[0])]] for path in paths])
        assert len(paths) == n and right == pytest.approx(chosen["accuracy"][split], abs=1.5 / n)
    text = (tmp_path / "run" / "export_chosen" / "README.md").read_text()
    assert "the networks of epoch 1 of 2, which looked best without labels" in text
    row = next(line for line in text.splitlines() if line.startswith("| test |"))
    zero_shot = report["annotator"]["zero_shot_accuracy"]["test"]
    assert row.startswith(f"| test | {zero_shot:.1%} | {chosen['accuracy']['test']:.1%} | ")
    # recalls of the classes, weighted by their sizes, are the accuracy again
    shares = re.findall(r"^\| (?:{}) \| [\d–%]+ \| (\d+)% \| (\d+) \|$".format("|".join(NAMES)), text, flags=re.MULTILINE)
    mean = sum(int(share) * int(n) for share, n in shares) / 36000
    assert len(shares) == 10 and mean == pytest.approx(chosen["accuracy"]["test"], abs=0.006)
    assert "epoch" not in (tmp_path / "run" / "export" / "README.md").read_text()
