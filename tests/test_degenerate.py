"""Odd data through the whole job: it ends, in finite numbers, and the report says what there was."""

import json
import math

import numpy as np
import pytest
from conftest import SMALL_JOB
from PIL import Image

import train_coreg
from coreg.annotate import synthetic
from coreg.run import checkpoint


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """Stores of 9 training and 2 test images of two classes, by the share of wrong candidates."""
    root, rng = tmp_path_factory.mktemp("two"), np.random.default_rng(0)
    for i in range(11):
        folder = root / "images" / ("train" if i < 9 else "test") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 120, (12, 12, 3)).astype(np.uint8) + np.uint8(100 * (i % 2))).save(
            folder / f"{i}.png"
        )
    (root / "classes.txt").write_text("a\nb\n")

    def store(q):
        place = root / f"store{q}"
        images = ["--images", str(root / "images"), "--classes", str(root / "classes.txt")]
        synthetic.main([*images, "--rule", "flip", "--q", q, "--eta", "0", "--output_dir", str(place)])
        return place

    return {q: store(q) for q in ("0", "1")}


def train(store, output, *more):
    """Curves and report of a job with batches of 4 and 8 of 9 images: the last batch of warm-up is one image."""
    words = [*SMALL_JOB, "--batch_size", "4", "--report_to", "none", *more]
    train_coreg.main(["--annotations", str(store), "--output_dir", str(output), *words])
    curves = checkpoint.load(output / "checkpoints", checkpoint.latest(output / "checkpoints"))["curves"]
    assert len(curves) == 3 and all(math.isfinite(value) for epoch in curves for value in epoch.values())
    return curves, json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_two_classes_and_a_last_batch_of_one_image(two_classes, tmp_path, norm):
    backbone = f'{{"norm": "{norm}", "widths": [8, 16], "depths": [1, 1]}}'
    _, report = train(two_classes["0"], tmp_path / "run", "--backbone_args", backbone, "--queue_size", "1000")
    assert report["classes"] == 2 and report["images"] == {"train": 9, "test": 2}
    assert report["annotator"]["partial_accuracy"] == 1.0
    assert "zero_shot_accuracy" not in report["annotator"]  # nobody annotated: the sets were drawn from the truth
    assert "annotator" not in report["per_class_accuracy"]["a"]


def test_nothing_is_distrusted(two_classes, tmp_path):
    curves, _ = train(two_classes["0"], tmp_path / "run", "--threshold", "1e-300")
    assert curves[-1]["division/trusted"] == 1.0
    assert curves[-1]["loss/net1/distrusted"] == 0  # there is no U to learn from


def test_hardly_anything_is_trusted(two_classes, tmp_path):
    curves, _ = train(two_classes["0"], tmp_path / "run", "--threshold", "0.9999999999999999")
    assert curves[-1]["division/trusted"] >= 4 / 9  # filled up to one batch


def test_every_class_is_a_candidate(two_classes, tmp_path):
    curves, report = train(two_classes["1"], tmp_path / "run")
    assert report["annotator"]["mean_candidates"] == 2.0
    assert curves[0]["loss/net1/partial"] == 0  # such sets carry no information


def test_one_image_of_a_class_is_given_where_five_are_asked_for(two_classes, tmp_path):
    _, report = train(two_classes["0"], tmp_path / "run", "--few_shot", "5")
    assert report["labels_used"] == 9
    assert report["warnings"][0] == "5 labels a class were asked for, and there are only 4 of b"
