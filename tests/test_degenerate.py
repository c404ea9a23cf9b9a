"""Odd data through the whole job: it ends, in finite numbers, and the report says what there was."""

import json
import math

import numpy as np
import pytest
from conftest import SMALL_JOB
from PIL import Image
from runs import as_votes, final_state, on_two_processes, refused, same_curves, script, with_method

import train_coreg
from coreg.learn.division import Division
from coreg.learn.partial import METHODS
from coreg.run import checkpoint
from coreg.run import epoch as module
from coreg.store.store import AnnotationStore
from coreg.weak.__main__ import main as draw_sets


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """Stores of 9 training and 2 test images of two classes, by the share of wrong candidates."""
    root = tmp_path_factory.mktemp("two")
    return {q: made_store(root, 9, q) for q in ("0", "1")}


def made_store(root, n, q):
    """A store of `n` training and 2 test images of two classes, with a share `q` of wrong candidates."""
    rng = np.random.default_rng(0)
    for i in range(n + 2):
        folder = root / "images" / ("train" if i < n else "test") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 120, (12, 12, 3)).astype(np.uint8) + np.uint8(100 * (i % 2))).save(
            folder / f"{i}.png"
        )
    (root / "classes.txt").write_text("a\nb\n")
    images = ["--images", str(root / "images"), "--classes", str(root / "classes.txt")]
    draw_sets([*images, "--rule", "flip", "--q", q, "--eta", "0", "--output_dir", str(root / f"store{q}")])
    return root / f"store{q}"


def train(store, output, *more):
    """Curves and report of a job with batches of 4 and 8 of 9 images, of which one is left over in warm-up."""
    words = [*SMALL_JOB, "--batch_size", "4", "--report_to", "none", *more]
    train_coreg.main(["--annotations", str(store), "--output_dir", str(output), *words])
    curves = checkpoint.load(output / "checkpoints", checkpoint.latest(output / "checkpoints"))["curves"]
    assert len(curves) == 3 and all(math.isfinite(value) for epoch in curves for value in epoch.values())
    return curves, json.loads((output / "report.json").read_text())


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_two_classes_and_one_image_that_is_left_over(two_classes, tmp_path, norm):
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


# ---- one image that is left over, and a feature map of one pixel ----------------------------------------------------

DEEP = [  # a batch-normalised network whose last layers see one pixel of an image of 32
    "--recipe", "digits", "--refine", "none",
    "--channels", "3", "--image_size", "32", "--backbone", "test_efficientnet", "--backbone_args",
    "{}", "--batch_size", "64", "--epochs", "2", "--workers", "0", "--report_to", "none",
]  # fmt: skip
TWO = ["--warmup_epochs", "1"]
CONTRAST = ["--queue_size", "50", "--projection_dim", "8"]


@pytest.fixture(scope="module")
def sixty_five(tmp_path_factory):
    root = tmp_path_factory.mktemp("65")
    return as_votes(made_store(root, 65, "0.5"), root / "annotated")


def deep_run(name, store, output, *more):
    """The final state of a job whose curves are all finite."""
    main = train_coreg.main if name == "coreg" else script(name).main
    main(["--annotations", str(store), "--output_dir", str(output), *DEEP, *more])
    state = final_state(output)
    assert len(state["curves"]) == 2 and all(math.isfinite(value) for epoch in state["curves"] for value in epoch.values())
    return state


def divided_by_hand(monkeypatch, n_trusted):
    """Both networks trust the first images alone."""
    trusted = np.arange(65) < n_trusted
    monkeypatch.setattr(module, "divide", lambda *_: Division(trusted.astype(float), trusted.copy()))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("dividemix", TWO), ("distill", []), ("pll", with_method("pico_plus", queue_size=50, projection_dim=8)),
        *(
            pytest.param("pll", with_method(method, queue_size=50, projection_dim=8), marks=pytest.mark.slow)
            for method in METHODS if method != "pico_plus"
        ),
    ],
)  # fmt: skip
def test_65_images_in_batches_of_64_for_a_deep_network(sixty_five, tmp_path, name, more):
    state = deep_run(name, sixty_five, tmp_path / "run", *more)
    assert state["images_seen"] >= 2 * 65


@pytest.mark.parametrize(("n_trusted", "batch_size"), [(65, 32), (64, 64), (1, 64)])
def test_coreg_with_one_image_left_over_or_alone(sixty_five, tmp_path, monkeypatch, n_trusted, batch_size):
    """65 trusted in batches of 32, warm-up in batches of 64; U is one image; P is one image. One label that is known."""
    divided_by_hand(monkeypatch, n_trusted)
    store = AnnotationStore.open(sixty_five)
    path = store.paths[np.flatnonzero(store.split == 0)[0]]
    (tmp_path / "labels.csv").write_text(f"path,label\n{path},a\n")
    known = ["--labels", str(tmp_path / "labels.csv"), "--label_mode", "extra_ce"]
    more = [*TWO, *CONTRAST, "--contrast_after", "-1", "--batch_size", str(batch_size), *known]
    state = deep_run("coreg", sixty_five, tmp_path / "run", *more)
    assert "loss/net1/supervised" in state["curves"][1]


def test_batches_of_one_are_refused(sixty_five, tmp_path, capsys):
    for main in (train_coreg.main, *(script(name).main for name in ("pll", "dividemix", "distill"))):
        line = refused(capsys, main, "--annotations", sixty_five, "--output_dir", tmp_path / "run", "--batch_size", "1")
        assert "--batch_size is 1; give a number from 2" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.multiprocess
def test_two_processes_with_one_image_left_over_and_with_one_each(sixty_five, tmp_path):
    """Of batches of 63 two images are left over, one for each process; of batches of 64 one, and both train like one."""
    main, store = script("distill").main, ["--annotations", str(sixty_five)]
    on_two_processes(main, *store, *DEEP, "--batch_size", "63", "--output_dir", tmp_path / "each")
    one_left = [*store, *SMALL_JOB[: SMALL_JOB.index("--epochs")], *DEEP[DEEP.index("--batch_size") :]]
    main([*one_left, "--output_dir", str(tmp_path / "1")])
    on_two_processes(main, *one_left, "--output_dir", tmp_path / "2")
    assert all(math.isfinite(v) for epoch in final_state(tmp_path / "each")["curves"] for v in epoch.values())
    one, two = (final_state(tmp_path / count) for count in "12")
    assert one["images_seen"] == two["images_seen"] == 130 and one["updates"] == two["updates"] == 2
    same_curves(one, two)
