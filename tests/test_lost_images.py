"""Images that were readable when they were annotated and are not when they are trained on: one line from every script."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import in_processes, refused, script
from test_annotate_annotators import save_tiny_clip

import train_coreg
from annotate_vlm import AnnotateConfig, annotate

SHORT = ["--workers", "0", "--report_to", "none", "--epochs", "2"]
NETWORK = [
    "--recipe", "digits", "--refine", "none", "--image_size", "12", "--batch_size", "5",
    "--backbone_args", '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}',
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """12 training and 4 test images of two classes; one could not be read even when they were annotated."""
    root, rng = tmp_path_factory.mktemp("lost"), np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 4)):
        for i in range(n):
            folder = root / "photos" / split / ("red", "blue")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (root / "photos" / "train" / "red" / "never.png").write_bytes(b"")
    (root / "classes.txt").write_text("red\nblue\n")
    settings = {"vlm": f"local-dir:{save_tiny_clip(root / 'clip')}", "classes": str(root / "classes.txt"), "workers": 0}
    return annotate(AnnotateConfig(images=str(root / "photos"), output_dir=str(root / "ann"), **settings))


@pytest.fixture
def losing(store):
    """Empties images for the length of a test."""
    kept = {}

    def lose(*names):
        for name in names:
            path = Path(store.images_spec) / name
            kept[path] = path.read_bytes()
            path.write_bytes(b"")

    yield lose
    for path, content in kept.items():
        path.write_bytes(content)


def names_the_loss(line, count, name):
    return (
        line.startswith(f"error: {count} of the 17 images in ")
        and f"{name!r} could be read when it was annotated, and cannot be now (empty file)" in line
        and line.endswith("back, or annotate the images anew")
    )


SCRIPTS = {
    "train_coreg": (lambda: train_coreg.main, [*NETWORK, "--warmup_epochs", "1"]),
    "pll": (lambda: script("pll").main, [*NETWORK, "--method", "proden"]),
    "dividemix": (lambda: script("dividemix").main, [*NETWORK, "--warmup_epochs", "1"]),
    "distill": (lambda: script("distill").main, NETWORK),
    "coop": (lambda: script("coop").main, ["--shots", "6"]),
    "lora": (lambda: script("lora").main, ["--shots", "6"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_that_reads_images_refuses_before_it_claims_a_folder(store, losing, tmp_path, capsys, name):
    main, options = SCRIPTS[name]
    losing("train/blue/01.png", "train/red/02.png")
    line = refused(capsys, main(), "--annotations", store.root, "--output_dir", tmp_path / "run", *SHORT, *options)
    assert names_the_loss(line, 2, "train/blue/01.png"), line
    assert not (tmp_path / "run" / "job.json").exists()


def test_test_images_too(store, losing, tmp_path, capsys):
    losing("test/red/00.png")
    for name in ("train_coreg", "lora"):
        main, options = SCRIPTS[name]
        line = refused(capsys, main(), "--annotations", store.root, "--output_dir", tmp_path / name, *SHORT, *options)
        assert names_the_loss(line, 1, "test/red/00.png"), line


def test_zero_shot_needs_no_image(store, losing, tmp_path, capsys):
    losing("test/red/00.png")
    script("zero_shot").main(["--annotations", str(store.root), "--output_dir", str(tmp_path), "--variant", "averaged"])
    assert json.loads((tmp_path / "averaged" / "report.json").read_text())["labelled"] == {"train": 12, "test": 4}


@pytest.mark.multiprocess
def test_where_one_process_meets_it_all_end_with_one_line(store, losing, tmp_path):
    losing("train/red/10.png")  # of the 12 labelled images the second process reads the latter half
    words = ["--annotations", store.root, "--output_dir", tmp_path / "run", "--shots", "6", *SHORT]
    ended = in_processes(2, script("lora").main, *words)
    assert ended.codes == [2, 2], ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert names_the_loss(line, 1, "train/red/10.png"), line
