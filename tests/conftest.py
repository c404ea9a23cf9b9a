"""A job that is small and odd enough to find mistakes quickly: 97 training images of three classes, float64."""

import signal

import numpy as np
import pytest
from PIL import Image

# a shell lets what it starts in the background ignore Ctrl-C, and whatever that starts
signal.signal(signal.SIGINT, signal.default_int_handler)

# batches of 13 of 97 images: uneven tails everywhere
SMALL_JOB = [
    "--recipe", "digits", "--refine", "none",
    "--dtype", "float64", "--channels", "3", "--image_size", "12", "--backbone_args",
    '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}', "--epochs", "3", "--warmup_epochs", "1",
    "--mixup_alpha", "4", "--contrast_after", "-1", "--batch_size", "13", "--queue_size", "50", "--projection_dim", "8",
    "--workers", "0",
]  # fmt: skip


@pytest.fixture(scope="session")
def small_store(tmp_path_factory):
    """97 training and 5 test images with candidate sets that were drawn from their labels."""
    from coreg.weak.__main__ import main

    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, n in (("train", 97), ("test", 5)):
        for i in range(n):
            folder = root / "images" / split / "abc"[i % 3]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (12, 12, 3)) // 2 + np.array([100, 60, 20])[[i % 3, (i + 1) % 3, (i + 2) % 3]]
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    (root / "classes.txt").write_text("a\nb\nc\n")
    main([
        "--images", str(root / "images"), "--classes", str(root / "classes.txt"), "--rule", "flip", "--q", "0.3",
        "--eta", "0.2", "--output_dir", str(root / "store"),
    ])  # fmt: skip
    return root / "store"


@pytest.fixture(scope="session")
def small_annotated(small_store, tmp_path_factory):
    """The same images and sets, as an annotator's votes."""
    from runs import as_votes

    return as_votes(small_store, tmp_path_factory.mktemp("annotated") / "store")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The built-in digits as the built-in annotator sees them, an annotation store; nobody writes into it."""
    from annotate_vlm import AnnotateConfig, annotate

    return annotate(AnnotateConfig(output_dir=str(tmp_path_factory.mktemp("digits") / "store"), workers=0))


@pytest.fixture(scope="session")
def fonts():
    """The fonts that glyphs are drawn in; matplotlib 3.11, which has them all, is for Python 3.11 and newer."""
    from coreg.demo.glyphs import font_bank
    from coreg.errors import UserError

    try:
        return font_bank()
    except UserError as error:
        pytest.skip(str(error))
