"""Random views of single images against torchvision's, Pillow's, and the keys they are a function of."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from coreg.adapt.views import DRAWS, Photos, RandomView, crop_box
from coreg.data.sources import open_images
from coreg.errors import UserError


def draws(count, seed=0):
    return np.random.default_rng(seed).random((count, DRAWS))


def picture(width=60, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def by_torchvision(width, height, area, drawn, monkeypatch):
    """torchvision's own box when its generator gives what is in `drawn`."""
    numbers = iter(drawn.tolist())

    class Scalar:
        def __init__(self, value):
            self.value = value

        def uniform_(self, low, high):
            return torch.tensor(float(low) + float(high - low) * next(numbers), dtype=torch.float64)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", lambda _: Scalar(0))
        patched.setattr(torch, "randint", lambda low, high, size: torch.tensor([int(next(numbers) * high)]))
        top, left, h, w = RandomResizedCrop.get_params(Image.new("L", (width, height)), [area, 1.0], [3 / 4, 4 / 3])
    return left, top, w, h


@pytest.mark.parametrize(("width", "height"), [(60, 40), (8, 8), (224, 224)])
def test_boxes_are_torchvisions(width, height, monkeypatch):
    """Its tries draw two numbers each and the last one two more for the place; ours have four columns a try."""
    for drawn in draws(200):
        ours = crop_box(width, height, 0.08, drawn)
        flat = []
        for share, ratio, x, y in drawn[:-1].reshape(10, 4):
            target, r = width * height * (0.08 + 0.92 * share), math.exp(math.log(3 / 4) + math.log(16 / 9) * ratio)
            w, h = round(math.sqrt(target * r)), round(math.sqrt(target / r))
            flat += [share, ratio]
            if 0 < w <= width and 0 < h <= height:
                flat += [y, x]  # torchvision draws the row first
                break
        theirs = by_torchvision(width, height, 0.08, np.array(flat), monkeypatch)
        assert ours == theirs
        left, top, w, h = ours
        assert left >= 0 and top >= 0 and w > 0 and h > 0 and left + w <= width and top + h <= height


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (11, 10)])
def test_where_no_box_fits_it_is_the_largest_central_one(width, height, monkeypatch):
    drawn = draws(1)[0]
    drawn[:-1].reshape(10, 4)[:, 0] = 0.999  # nearly the whole area, at a ratio that the image does not have
    drawn[:-1].reshape(10, 4)[:, 1] = 0.0 if width > height else 1.0
    assert crop_box(width, height, 0.99, drawn) == by_torchvision(
        width, height, 0.99, drawn[:-1].reshape(10, 4)[:, :2].ravel(), monkeypatch
    )


def test_a_view_is_a_resized_crop_mirrored_or_not():
    view, image = RandomView(area=0.3, flip=True, size=24), picture()
    mirrored = 0
    for drawn in draws(40):
        left, top, w, h = crop_box(60, 40, 0.3, drawn)
        wanted = tv.resized_crop(image, top, left, h, w, [24, 24], tv.InterpolationMode.BICUBIC)
        mirrored += drawn[-1] >= 0.5
        wanted = tv.hflip(wanted) if drawn[-1] >= 0.5 else wanted
        assert np.array_equal(view(image, drawn), wanted)
    assert 10 < mirrored < 30
    still = RandomView(area=1.0, flip=False, size=24)
    assert still(image, draws(1)[0]) is image and not still.random and view.random
    assert RandomView(area=0.3, flip=False, size=None)(image, draws(1)[0]).size == crop_box(60, 40, 0.3, draws(1)[0])[2:]


@pytest.fixture
def photos(tmp_path):
    for number in range(6):
        picture(30 + number, 20, number).save(tmp_path / f"{number}.png")
    view = RandomView(0.1, True, 16)
    return Photos(open_images(str(tmp_path)), lambda image: torch.from_numpy(np.array(image)), view, seed=3, workers=3)


def test_a_view_depends_on_seed_number_and_row_alone(photos):
    rows = np.array([4, 1, 5, 0])
    views = photos.views(rows, 7)
    assert all(torch.equal(a, b) for a, b in zip(views[::-1], photos.views(rows[::-1].copy(), 7)))
    assert torch.equal(views[2], photos.views(rows[2:3], 7)[0])
    assert not torch.equal(views[0], photos.views(rows, 8)[0])
    photos.seed = 4
    assert not torch.equal(views[0], photos.views(rows, 7)[0])
    plain = photos.plain(rows)
    assert [tuple(image.shape) for image in plain] == [(20, 30 + row, 3) for row in rows]


def test_an_image_that_has_gone_since_ends_in_one_line(photos, tmp_path):
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(
        UserError,
        match=r"^1 of the 6 images in .*'2.png' could be read when it was annotated, and cannot be now \(empty file\)",
    ):
        photos.plain(np.arange(6))
