"""Views of a store: the features that a network gives by itself, block by block, whatever happens on the way."""

import io
import shutil
import tarfile
import threading

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from runs import on_two_processes, refused, write_store

from coreg.annotate import tools
from coreg.annotate import view as module
from coreg.annotate.settings import ViewConfig
from coreg.annotate.view import View, main, make_view, pixels_of, views_of
from coreg.config import recipe_path
from coreg.data.decode import decode
from coreg.data.sources import open_images
from coreg.errors import UserError
from coreg.nets.model import create_backbone
from coreg.store.store import AnnotationStore

NAMES = ["cat", "dog"]
TINY = {
    "backbone": "preact_resnet_tiny",
    "pretrained": False,
    "image_size": 12,
    "batch_size": 3,
    "block_size": 4,
    "workers": 0,
}
WORDS = ["--backbone", "preact_resnet_tiny", "--pretrained", "false", "--image_size", "12", "--workers", "0"]


def annotated(spec, root):
    """A store of the images of `spec`, with some evidence."""
    images = open_images(str(spec), NAMES)
    tensors = {"votes": np.zeros((len(images), 1), np.int16), "probs": np.full((len(images), 2), 0.5, np.float16)}
    return write_store(root, images, NAMES, ["{}"], tensors, block_size=8)


def photos(root, count=11):
    generator = np.random.default_rng(0)
    for number in range(count):
        path = root / NAMES[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (14, 10, 3), dtype=np.uint8)).save(path)
    (root / "dog" / "05.png").write_bytes(b"no image")
    return root


@pytest.fixture
def store(tmp_path):
    return annotated(photos(tmp_path / "photos"), tmp_path / "ann")


def network(channels=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create_backbone("preact_resnet_tiny", 0, channels, {}, False).eval()


@torch.no_grad()
def by_hand(images, channels, mean, std, mirror=True):
    """Image by image: decoded as for training, normalised, pooled; what cannot be read is zero."""
    failed = {}
    pixels = decode(images, np.arange(len(images)), 12, channels, 1, failed)
    net, rows = network(channels), []
    for row in range(len(images)):
        x = (pixels[row : row + 1].float() / 255 - mean) / std
        h = [net.forward_head(net.forward_features(v), pre_logits=True)[0] for v in ((x, x.flip(3)) if mirror else (x,))]
        rows.append(torch.zeros_like(h[0]) if row in failed else sum(h) / len(h))
    return torch.stack(rows).numpy(), sorted(failed)


@pytest.mark.parametrize("mirror", [True, False])
def test_features_are_those_of_the_network_image_by_image(store, mirror):
    view = make_view(store, ViewConfig(**TINY, mean=[0.4], std=[0.3], mirror=mirror))
    expected, failed = by_hand(store.images(), 3, 0.4, 0.3, mirror)
    assert view.root == store.root / "views" / "preact_resnet_tiny-12" and views_of(store) == [view.root]
    assert len(failed) == 1 and np.flatnonzero(view.unreadable).tolist() == failed
    stored = view.features()
    assert stored.dtype == np.float16 and (stored[failed] == 0).all() and stored.shape == expected.shape
    np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=1e-3)


def test_grey_digits_and_tar_shards(tmp_path):
    digits = annotated("builtin:digits", tmp_path / "digits")
    view = make_view(digits, ViewConfig(**TINY | {"batch_size": 500}, channels=1, mean=[0.5], std=[0.5]))
    images, rows = digits.images(), [0, 700, 1796]
    pixels = decode(images, np.array(rows), 12, 1, 1)
    net = network(1)
    with torch.no_grad():
        x = (pixels.float() / 255 - 0.5) / 0.5
        h = sum(net.forward_head(net.forward_features(v), pre_logits=True) for v in (x, x.flip(3))) / 2
    np.testing.assert_allclose(view.features()[rows], h.numpy(), rtol=2e-3, atol=1e-3)

    folder = photos(tmp_path / "photos")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(folder.rglob("*.png")):
            content = path.read_bytes()
            member = tarfile.TarInfo(str(path.relative_to(folder)))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    shards = make_view(annotated(tmp_path / "x.tar", tmp_path / "shards"), ViewConfig(**TINY))
    files = make_view(annotated(folder, tmp_path / "files"), ViewConfig(**TINY))
    np.testing.assert_array_equal(shards.features(), files.features())


def test_what_was_stopped_or_damaged_goes_on_to_the_same_bytes(store, monkeypatch):
    whole = make_view(store, ViewConfig(**TINY))
    before = {path.name: path.read_bytes() for path in whole.root.rglob("*") if path.is_file()}
    (whole.root / "blocks" / "00001.safetensors").unlink()
    content = bytearray((whole.root / "blocks" / "00002.safetensors").read_bytes())
    content[-1] ^= 1
    (whole.root / "blocks" / "00002.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is unfinished \\(1 of 3 blocks missing\\); run the same command again"):
        View.open(whole.root, store)
    encoded, plain = [], module.Encoder.annotate
    monkeypatch.setattr(module.Encoder, "annotate", lambda self, batch: (encoded.append(len(batch)), plain(self, batch))[1])
    again = make_view(store, ViewConfig(**TINY))
    assert sum(encoded) == 1 + 4 + 3  # to see what it gives; of 11 images those of two blocks
    assert {path.name: path.read_bytes() for path in again.root.rglob("*") if path.is_file()} == before
    make_view(store, ViewConfig(**TINY))
    assert sum(encoded) == 8 + 1  # finished: no image is encoded


def saved_network(folder, seed):
    """A network in a folder, as `--backbone` takes it."""
    torch.manual_seed(seed)
    timm.models.save_for_hf(timm.create_model("preact_resnet_tiny", num_classes=2), str(folder), safe_serialization=True)
    return f"local-dir:{folder}"


def test_several_that_share_the_folder_make_what_one_makes(store, tmp_path):
    config = ViewConfig(**TINY | {"backbone": saved_network(tmp_path / "net", 0)})
    one = make_view(store, config)
    alone = one.hash
    shutil.rmtree(one.root)
    threads = [threading.Thread(target=make_view, args=(store, config)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert View.open(one.root, store).hash == alone and not (one.root / "claims").exists()


def test_views_lie_side_by_side_and_leave_the_store_as_it_was(store, tmp_path):
    small, large = make_view(store, ViewConfig(**TINY)), make_view(store, ViewConfig(**TINY | {"image_size": 16}))
    assert {path.name for path in views_of(store)} == {"preact_resnet_tiny-12", "preact_resnet_tiny-16"}
    assert small.hash != large.hash and AnnotationStore.open(store.root).hash == store.hash
    # a folder of weights; other weights in a folder of the same name are another view
    first, second = (saved_network(tmp_path / str(seed) / "net", seed) for seed in (1, 2))
    make_view(store, ViewConfig(**TINY | {"backbone": first}))
    with pytest.raises(UserError, match=r"net-12 holds another view: network weights .*; remove that folder"):
        make_view(store, ViewConfig(**TINY | {"backbone": second}))


def test_features_that_are_no_numbers_are_refused(store, monkeypatch):
    monkeypatch.setattr(module.Encoder, "_pooled", lambda self, pixels: torch.full((len(pixels), 3), 1e6))
    with pytest.raises(UserError, match="features that are no numbers in float16"):
        make_view(store, ViewConfig(**TINY))
    with pytest.raises(UserError, match="is unfinished"):
        View.open(store.root / "views" / "preact_resnet_tiny-12", store)


def test_other_images_and_odd_folders_are_refused(store, tmp_path):
    view = make_view(store, ViewConfig(**TINY))
    other = annotated(photos(tmp_path / "more", 12), tmp_path / "other")
    shutil.copytree(view.root, other.root / "views" / view.root.name)
    with pytest.raises(UserError, match="shows other images"):
        View.open(other.root / "views" / view.root.name, other)
    (view.root / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"is no view of an annotation store: manifest\.json: there is no 'schema'"):
        View.open(view.root, store)


def test_the_command_line(store, capsys):
    assert main([str(store.root), *WORDS]) == 0
    assert "features of 11 images, 1 of them unreadable" in capsys.readouterr().out
    assert "folder of one annotation store" in refused(capsys, main, *WORDS)
    assert "did you mean" in refused(capsys, main, store.root, "--backbone", "preact_resnet_tyni")
    assert "--channels is 2" in refused(capsys, main, store.root, "--channels", "2")
    assert "--std has 2 numbers" in refused(capsys, main, store.root, "--std", "0.2", "0.3")
    assert "--batch_size" in refused(capsys, main, store.root, "--batch_size", "0")
    assert "does not exist" in refused(capsys, main, store.root / "nowhere")


def test_without_options_it_is_what_the_recipe_for_folders_trains():
    recipe = yaml.safe_load(recipe_path("folder").read_text())
    config = ViewConfig()
    assert {key: getattr(config, key) for key in ("backbone", "pretrained", "image_size", "channels")} == {
        key: recipe[key] for key in ("backbone", "pretrained", "image_size", "channels")
    }
    # pixels are those that the weights were trained with
    assert pixels_of(config) == (recipe["mean"] * 3, recipe["std"] * 3)
    assert pixels_of(ViewConfig(backbone="resnet18", channels=1)) == ([0.449], [pytest.approx(0.226)])


def test_networks_of_one_input_size_are_made_for_the_pixels_that_are_asked_for():
    config = ViewConfig(backbone="vit_tiny_patch16_224", pretrained=False, image_size=32)
    features = module.Encoder(config, "cpu").annotate(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))["features"]
    assert features.shape == (2, 192)
    config = ViewConfig(backbone="vit_tiny_patch16_224", pretrained=False, image_size=8)
    with pytest.raises(UserError, match=r"--image_size|could not be loaded"):
        module.Encoder(config, "cpu")


@pytest.mark.multiprocess
def test_two_processes_make_the_view_and_the_refined_store_that_one_makes(digits, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(digits.root, tmp_path / name)
        words = ["refine", tmp_path / name, *WORDS, "--channels", "1", "--output_dir", tmp_path / f"refined-{name}"]
        if name == "one":
            assert tools.main([str(word) for word in words]) == 0
        else:
            assert on_two_processes(tools.main, *words).count("refined by preact_resnet_tiny-12") == 1
    one, two = (AnnotationStore.open(tmp_path / f"refined-{name}") for name in ("one", "two"))
    assert one.hash == two.hash
    views = [
        View.open(views_of(store)[0], store) for store in map(AnnotationStore.open, (tmp_path / "one", tmp_path / "two"))
    ]
    assert views[0].hash == views[1].hash
