"""Tiles: features of parts of images in a store."""

import numpy as np
import pytest
import torch
from PIL import Image
from runs import refused
from safetensors.numpy import load_file

import annotate_vlm
from coreg.annotate.annotators import load_towers
from coreg.annotate.models import resolve
from coreg.annotate.settings import GLYPH_CLIP, AnnotateConfig
from coreg.annotate.tiles import tiles_of
from coreg.annotate.tools import main as tools
from coreg.errors import UserError
from coreg.process import build_accelerator
from coreg.store.store import AnnotationStore
from coreg.store.writer import StoreWriter

SHAPES = [(15, 15), (20, 31), (7, 2), (1, 1), (40, 12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images of different shapes, one file that is none, and names of classes."""
    root, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    (root / "images").mkdir()
    for number, shape in enumerate(SHAPES):
        Image.fromarray(rng.integers(0, 255, shape).astype(np.uint8)).save(root / "images" / f"{number}.png")
    (root / "images" / "5.png").write_text("no image")
    (root / "classes.txt").write_text("one\ntwo\nseven\n")
    return root


def options(folder, output, *tiles, **more):
    places = {"images": str(folder / "images"), "classes": str(folder / "classes.txt"), "output_dir": str(output)}
    return AnnotateConfig(**places, tiles=list(tiles) or None, block_size=2, batch_size=2, workers=0, **more)


@pytest.fixture(scope="module")
def store(folder):
    return annotate_vlm.annotate(options(folder, folder / "tiled", 3, 2))


def test_parts_cover_an_image_once_row_after_row():
    pixels = np.arange(7 * 5, dtype=np.uint8).reshape(7, 5)
    four = [np.asarray(part) for part in tiles_of(Image.fromarray(pixels), [2])]
    np.testing.assert_array_equal(np.block([four[:2], four[2:]]), pixels)
    assert [part.size for part in tiles_of(Image.fromarray(pixels), [2, 3])][4] == (1, 2)
    assert len(tiles_of(Image.fromarray(pixels), [2, 3])) == 13
    # of one pixel every part is that pixel
    assert {part.size for part in tiles_of(Image.new("L", (1, 1)), [3])} == {(1, 1)}


def test_features_are_those_of_the_parts_as_images(folder, store):
    towers = load_towers(resolve(GLYPH_CLIP), torch.device("cpu"), "fp32")
    assert store.manifest["tiles"] == [2, 3] and store.tiles().shape == (6, 13, store.features().shape[1])
    for number in range(len(SHAPES)):
        image = Image.open(folder / "images" / f"{number}.png")
        width, height = image.size
        for place, (side, row, column) in {0: (2, 0, 0), 3: (2, 1, 1), 6: (3, 0, 2), 11: (3, 2, 1)}.items():
            left, top = column * width // side, row * height // side
            right, bottom = max(left + 1, (column + 1) * width // side), max(top + 1, (row + 1) * height // side)
            with torch.no_grad():
                (h,) = towers.image(towers.preprocess(image.crop((left, top, right, bottom)))[None])
            np.testing.assert_allclose(store.tiles()[number, place], h / h.norm(), atol=1e-3)
    # an unreadable image has none, as it has no features
    assert store.unreadable.tolist() == [False] * 5 + [True] and not store.tiles()[5].any()


def test_what_is_kept_of_whole_images_is_the_same_without_tiles(folder, store):
    plain = annotate_vlm.annotate(options(folder, folder / "plain"))
    for name in ("votes", "probs", "features"):
        np.testing.assert_array_equal(getattr(store, name)(), getattr(plain, name)())
    assert plain.tiles() is None and "tiles" not in plain.manifest


def test_a_store_without_tiles_does_not_go_on_with_them(folder, store, capsys):
    root = folder / "tiled"
    with pytest.raises(UserError, match=r"another job: tiles \(3 there, 4 asked for\)"):
        annotate_vlm.annotate(options(folder, root, 2, 4))
    with pytest.raises(UserError, match=r"tiles \(\[2, 3\] there, None asked for\)"):
        annotate_vlm.annotate(options(folder, root))
    for wrong in (["1"], ["2", "2"]):
        places = ["--images", str(folder / "images"), "--classes", str(folder / "classes.txt")]
        line = refused(capsys, annotate_vlm.main, *places, "--tiles", *wrong)
        assert "different numbers from 2 on" in line
    line = refused(capsys, annotate_vlm.main, "--rescore", str(root), "--tiles", "2", "--output_dir", str(folder / "no"))
    assert "--rescore opens none" in line


def test_what_was_stopped_goes_on_with_the_same_bytes(folder, store, tmp_path, monkeypatch):
    written = StoreWriter.write

    def once(self, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        written(self, index, *rest)

    monkeypatch.setattr(StoreWriter, "write", once)
    with pytest.raises(KeyboardInterrupt):
        annotate_vlm.annotate(options(folder, tmp_path / "ann", 2, 3), build_accelerator())
    monkeypatch.undo()
    again = annotate_vlm.annotate(options(folder, tmp_path / "ann", 2, 3))
    assert again.hash == store.hash


def test_judging_again_and_merging_keep_tiles(folder, store, tmp_path, capsys):
    (tmp_path / "classes.txt").write_text("one\nfour\n")
    places = {"classes": str(tmp_path / "classes.txt"), "output_dir": str(tmp_path / "ann")}
    config = AnnotateConfig(rescore=str(store.root), **places)
    np.testing.assert_array_equal(annotate_vlm.annotate(config).tiles(), store.tiles())
    (tmp_path / "more").mkdir()
    Image.new("L", (9, 9), 77).save(tmp_path / "more" / "0.png")
    places = {"images": str(tmp_path / "more"), "classes": str(folder / "classes.txt")}
    others = {}
    for name, tiles in (("b", [2, 3]), ("c", None)):
        config = AnnotateConfig(**places, output_dir=str(tmp_path / name), tiles=tiles, block_size=2, workers=0)
        others[name] = annotate_vlm.annotate(config)
    tools(["merge", str(store.root), str(tmp_path / "b"), "--output_dir", str(tmp_path / "both")])
    both = AnnotationStore.open(tmp_path / "both")
    np.testing.assert_array_equal(both.tiles(), np.concatenate([store.tiles(), others["b"].tiles()]))
    line = refused(capsys, tools, "merge", str(store.root), str(tmp_path / "c"), "--output_dir", str(tmp_path / "no"))
    assert "another tiles" in line


def test_features_that_are_no_numbers_are_refused(store):
    block = load_file(store.root / "blocks" / "00000.safetensors")
    block["tiles"][1, 4, 0] = np.nan
    with pytest.raises(UserError, match="its features of tiles are not finite"):
        StoreWriter(store.root, store.manifest).write(0, block, {})
    del block["tiles"]
    with pytest.raises(UserError, match="expected features, probs, tiles, votes"):
        StoreWriter(store.root, store.manifest).write(0, block, {})
