"""The probe against scikit-learn, and as a run like any other."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import on_two_processes, refused, script
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from coreg.annotate.textual import averaged_embedding_logits
from coreg.annotate.view import main as make_view
from coreg.export.ensemble import load_export
from coreg.learn.probe import cosine_loss, fit_cosine, fit_probe, probe_loss
from coreg.report.compare import read_run
from coreg.store.store import AnnotationStore

probe = script("probe")
ROOT = Path(__file__).parents[1]
JOB = [
    "--recipe", "digits", "--refine", "none",
    "--dtype", "float64", "--channels", "3", "--image_size", "12", "--backbone_args",
    '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}', "--batch_size", "13", "--workers", "0", "--report_to", "none",
]  # fmt: skip


def data(n=80, classes=3, width=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return 3 + np.eye(classes, width)[labels] + 0.7 * rng.normal(size=(n, width)), labels


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_with_hard_labels_it_is_logistic_regression(penalty):
    features, labels = data()
    weight, bias, _ = fit_probe(torch.from_numpy(features), torch.from_numpy(np.eye(3)[labels]), penalty)
    scaled = StandardScaler().fit_transform(features)
    sklearn = LogisticRegression(C=1 / (penalty * len(labels)), tol=1e-10, max_iter=5000).fit(scaled, labels)
    ours = torch.softmax(torch.from_numpy(features) @ weight.T + bias, 1)
    np.testing.assert_allclose(ours, sklearn.predict_proba(scaled), atol=1e-4)
    # sets of one class are the same problem
    sets = torch.from_numpy(np.eye(3, dtype=bool)[labels])
    again, other, _ = fit_probe(torch.from_numpy(features), sets, penalty)
    np.testing.assert_allclose(torch.softmax(torch.from_numpy(features) @ again.T + other, 1), ours, atol=1e-4)


def test_the_loss_is_written_out_image_by_image():
    features, _ = data(n=6)
    rng = np.random.default_rng(1)
    weight, bias, x = (
        torch.from_numpy(rng.normal(size=(3, 5))),
        torch.from_numpy(rng.normal(size=3)),
        torch.from_numpy(features),
    )
    soft, sets = torch.from_numpy(rng.dirichlet(np.ones(3), 6)), torch.from_numpy(rng.random((6, 3)) < 0.6)
    sets[:, 1] = True
    p = [np.exp(row) / np.exp(row).sum() for row in (x @ weight.T + bias).numpy()]
    size = 0.2 / 2 * float((weight**2).sum())
    expected = -np.mean([sum(soft[i, c].item() * np.log(p[i][c]) for c in range(3)) for i in range(6)]) + size
    assert float(probe_loss(weight, bias, x, soft, 0.2)) == pytest.approx(expected)
    expected = -np.mean([np.log(sum(p[i][c] for c in range(3) if sets[i, c])) for i in range(6)]) + size
    assert float(probe_loss(weight, bias, x, sets, 0.2)) == pytest.approx(expected)


def test_features_that_do_not_vary_and_single_images():
    features, labels = data(n=20)
    x, t = torch.from_numpy(features), torch.from_numpy(np.eye(3)[labels])
    weight, _, loss = fit_probe(torch.cat([x, torch.full((20, 1), 7.0, dtype=x.dtype)], 1), t, 1e-3)
    assert (weight[:, -1] == 0).all() and np.isfinite(loss)
    weight, bias, _ = fit_probe(x[:1], t[:1], 1e-3)
    assert weight.isfinite().all() and (x[:1] @ weight.T + bias).argmax() == labels[0]


def cosine_by_hand(parameters, f, soft, start, penalty):
    """The loss of one vector of parameters, W row after row and then log s, image by image."""
    weight, total = parameters[:-1].reshape(start.shape), 0.0
    for i, target in enumerate(soft):
        e = [np.exp(np.exp(parameters[-1]) * f[i] @ w / np.sqrt(w @ w)) for w in weight]
        total -= sum(target[c] * np.log(e[c] / sum(e)) for c in range(len(e))) / len(f)
    return total + penalty / 2 * ((weight - start) ** 2).sum()


def test_the_cosine_head_is_the_minimum_of_its_loss():
    features, labels = data(n=30)
    rng = np.random.default_rng(1)
    soft, text = 0.7 * np.eye(3)[labels] + 0.1, rng.normal(size=(3, 5))
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    f = features / np.linalg.norm(features, axis=1, keepdims=True)
    as_tensors = [torch.from_numpy(x) for x in (features, soft, text)]
    head = fit_cosine(*as_tensors[:2], 0.05, as_tensors[2], 5.0)
    start = np.append(text.ravel(), np.log(5.0))
    minimum = minimize(cosine_by_hand, start, args=(f, soft, text, 0.05), options={"gtol": 1e-7})
    assert head.loss == pytest.approx(minimum.fun, abs=1e-6)
    weight = minimum.x[:-1].reshape(3, 5)
    expected = np.exp(minimum.x[-1]) * f @ (weight / np.linalg.norm(weight, axis=1, keepdims=True)).T
    np.testing.assert_allclose(head(as_tensors[0]).numpy(), expected, atol=1e-3)
    # sets of one class are hard labels
    hard = [fit_cosine(as_tensors[0], torch.from_numpy(np.eye(3)[labels].astype(kind)), 0.05) for kind in (bool, float)]
    torch.testing.assert_close(hard[0].weight, hard[1].weight)
    loss = cosine_loss(as_tensors[2], torch.tensor(5.0).log(), torch.from_numpy(f), as_tensors[1], as_tensors[2], 0.05)
    assert float(loss) == pytest.approx(cosine_by_hand(start, f, soft, text, 0.05), rel=1e-5)


def test_a_cosine_head_that_is_held_stays_where_it_began():
    features, labels = data(n=60)
    x, soft = torch.from_numpy(features), torch.from_numpy(np.eye(3)[labels])
    text = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 5)))
    held = fit_cosine(x, soft, 1e6, text)
    cosines = torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(text, dim=1).T
    torch.testing.assert_close(held(x) / held.scale, cosines, atol=1e-4, rtol=0)
    # without texts it begins with the classes' mean directions of centred features
    centred = torch.nn.functional.normalize(x - x.mean(dim=0), dim=1)
    means = torch.stack([centred[labels == c].mean(dim=0) for c in range(3)])
    held = fit_cosine(x, soft, 1e6)
    torch.testing.assert_close(held.weight, torch.nn.functional.normalize(means, dim=1), atol=1e-4, rtol=0)


def test_heads_on_the_annotators_own_features(digits, tmp_path, capsys):
    words = [
        "--annotations",
        str(digits.root),
        "--recipe",
        "digits",
        "--refine",
        "none",
        "--workers",
        "0",
        "--report_to",
        "none",
        "--features",
        "own",
    ]
    reports = {}
    for head in ("linear", "cosine"):
        probe.main([*words, "--head", head, "--output_dir", str(tmp_path / head)])
        assert "There is no export" in capsys.readouterr().out and not (tmp_path / head / "export").exists()
        reports[head] = read_run(tmp_path / head / "report.json").report
    assert reports["cosine"]["began_with"] == "texts" and reports["cosine"]["parameters"] == 10 * 64 + 1
    assert reports["linear"]["method"] == "Probe, soft labels, own features"
    # linear: the fit by itself; held to where it began, a cosine head is zero-shot with averaged embeddings
    train, test = digits.split == 0, digits.split == 1
    features, probs = torch.from_numpy(digits.features()), torch.from_numpy(digits.probs().astype(np.float64))
    weight, bias, _ = fit_probe(features[train], probs[train] / probs[train].sum(1, keepdim=True), 1e-3)
    right = ((features[test].double() @ weight.T + bias).argmax(1).numpy() == digits.labels[test]).mean()
    assert reports["linear"]["accuracy"]["test"]["ensemble"] == pytest.approx(right)
    probe.main([*words, "--head", "cosine", "--penalty", "1e6", "--output_dir", str(tmp_path / "held")])
    report = read_run(tmp_path / "held" / "report.json").report
    right = (averaged_embedding_logits(digits).argmax(axis=1) == digits.labels)[test].mean()
    assert report["accuracy"]["test"]["ensemble"] == pytest.approx(right, abs=0.01)


def test_heads_on_a_view_and_on_the_students_features(small_store, tmp_path, capsys):
    shutil.copytree(small_store, tmp_path / "ann")
    words = ["--annotations", str(tmp_path / "ann"), *JOB]
    assert "is no view of" in refused(capsys, probe.main, *words, "--features", "../x", "--output_dir", tmp_path / "x")
    assert "keeps no features" in refused(capsys, probe.main, *words, "--features", "own", "--output_dir", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    make_view(
        [
            str(tmp_path / "ann"),
            "--backbone",
            "preact_resnet_tiny",
            "--image_size",
            "12",
            "--workers",
            "0",
            "--pretrained",
            "false",
        ]
    )
    for name, more in {"view": ["--features", "preact_resnet_tiny-12"], "cosine": ["--head", "cosine"]}.items():
        probe.main([*words, *more, "--targets", "sets", "--share", "0.9", "--output_dir", str(tmp_path / name)])
        report = read_run(tmp_path / name / "report.json").report
        assert report["accuracy"]["train"]["ensemble"] > 0.6 and report["images"]["train"] == 87
        assert (tmp_path / name / "report.html").is_file() and (tmp_path / name / "export").exists() == (name == "cosine")
    # on the student's own features it is a layer of the network that is exported
    assert report["began_with"] == "class means" and report["method"] == "Probe, candidate sets, cosine"
    (net,), settings = load_export(tmp_path / "cosine")
    head, images = net.get_classifier(), torch.randn(4, 3, 12, 12)
    with torch.no_grad():
        h = net.forward_head(net.forward_features(images), pre_logits=True)
        h = torch.nn.functional.normalize(h + head.shift, dim=1)
        expected = settings["tuning"]["head_scale"] * h @ torch.nn.functional.normalize(head.weight, dim=1).T
        torch.testing.assert_close(net(images), expected)


@pytest.mark.parametrize("targets", ["probabilities", "sets"])
def test_a_run_like_any_other(small_store, tmp_path, capsys, targets):
    words = ["--annotations", str(small_store), "--output_dir", str(tmp_path / "a"), *JOB, "--targets", targets]
    probe.main(words)
    report = read_run(tmp_path / "a" / "report.json").report
    assert report["method"] == probe.NAMES[targets] and report["accuracy"]["train"]["ensemble"] > 0.6
    assert (tmp_path / "a" / "labels.csv").is_file()
    # export/ holds the frozen network with the classifier, checked against it
    nets, settings = load_export(tmp_path / "a")
    assert len(nets) == 1 and settings["agreement"]["timm"]["images"] > 0
    assert settings["class_names"] == AnnotationStore.open(small_store).class_names
    again = json.loads((tmp_path / "a" / "report.json").read_text())
    probe.main(words)
    assert "This run is finished" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "report.json").read_text()) == again


@pytest.mark.multiprocess
def test_two_processes_fit_the_head_that_one_fits(small_store, tmp_path):
    words = ["--annotations", str(small_store), *JOB, "--head", "cosine", "--share", "50", "--output_dir"]
    probe.main([*words, str(tmp_path / "one")])
    on_two_processes(probe.main, *words, tmp_path / "two")
    one, two = (read_run(tmp_path / name / "report.json").report for name in ("one", "two"))
    assert one["accuracy"] == two["accuracy"] and one["images"] == {"train": 50, "test": 5}
    assert one["last_epoch"]["loss/net1/total"] == pytest.approx(two["last_epoch"]["loss/net1/total"], abs=1e-9)


def test_settings_that_cannot_work(capsys):
    assert "--penalty" in refused(capsys, probe.read_settings, "--penalty", "0")
    assert "invalid choice" in refused(capsys, probe.read_settings, "--targets", "votes")
    assert "linear or cosine heads" in refused(capsys, probe.read_settings, "--head", "l2")
    for words in (["--tuner", "lora"], ["--blocks", "last:1"], ["--head_scale", "5"], ["--head_init", "class_mean"]):
        assert f"{words[0]} is for training" in refused(capsys, probe.read_settings, *words)
