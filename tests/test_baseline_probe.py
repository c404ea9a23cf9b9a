"""The probe against scikit-learn, and as a run like any other."""

import json

import numpy as np
import pytest
import torch
from runs import refused, script
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from coreg.annotate.store import AnnotationStore
from coreg.export import load_export
from coreg.learn.probe import fit_probe, probe_loss
from coreg.report.compare import read_run

probe = script("probe")
JOB = [
    "--recipe", "digits", "--dtype", "float64", "--channels", "3", "--image_size", "12", "--backbone_args",
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


def test_settings_that_cannot_work(capsys):
    assert "--penalty" in refused(capsys, probe.read_settings, "--penalty", "0")
    assert "invalid choice" in refused(capsys, probe.read_settings, "--targets", "votes")
