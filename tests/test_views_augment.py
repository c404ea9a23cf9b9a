"""Batched augmentation: every operation and every whole view against Pillow, image by image, and the laws of its draws."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from scipy import stats

from coreg.data.keyed import keyed_uniform
from coreg.views.augment import Augmentation
from coreg.views.augment_geometry import draw_boxes
from coreg.views.augment_ops import AFFINE_OPS, PIXEL_OPS, affine
from coreg.views.operations import RANDAUGMENT


def _affine(*coefficients):
    return lambda image, v: image.transform(
        image.size, Image.Transform.AFFINE, [c(v, image.size) if callable(c) else c for c in coefficients]
    )


PIL_OPS = {
    "auto_contrast": lambda image, v: ImageOps.autocontrast(image),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "equalize": lambda image, v: ImageOps.equalize(image),
    "identity": lambda image, v: image,
    "posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "rotate": lambda image, v: image.rotate(v),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "shear_x": _affine(1, lambda v, size: v, 0, 0, 1, 0),
    "shear_y": _affine(1, 0, 0, lambda v, size: v, 1, 0),
    "solarize": lambda image, v: ImageOps.solarize(image, v),
    "translate_x": _affine(1, 0, lambda v, size: v * size[0], 0, 1, 0),
    "translate_y": _affine(1, 0, 0, 0, 1, lambda v, size: v * size[1]),
}
RANGES = {
    "auto_contrast": None,
    "brightness": (0.05, 0.95),
    "color": (0.05, 0.95),
    "contrast": (0.05, 0.95),
    "equalize": None,
    "identity": None,
    "posterize": (4, 8),
    "rotate": (-30, 30),
    "sharpness": (0.05, 0.95),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "solarize": (0, 256),
    "translate_x": (-0.3, 0.3),
    "translate_y": (-0.3, 0.3),
}
# Share of pixels that may be off by one grey level. Everything is integer arithmetic, a table computed in float64 or a
# nearest neighbour, and has to be exact, but for the four blends: a compiler may fuse Pillow's float multiply and add.
TOLERANCE = dict.fromkeys(RANGES, 0.0) | dict.fromkeys(["brightness", "color", "contrast", "sharpness"], 1e-3)


def _apply(name, images, magnitudes):
    if name in PIXEL_OPS:
        return PIXEL_OPS[name](images, magnitudes)
    return affine(images, AFFINE_OPS[name](magnitudes, images.shape[-1]))


def _pil(image):
    return Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy() if len(image) == 1 else _hwc(image))


def _hwc(image):
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _tensor(image):
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _random_images(n, c, size, seed=0):
    """A third noise, a third noise of little contrast, a third smooth."""
    rng = np.random.default_rng((seed, n, c, size))
    images = rng.integers(0, 256, (n, c, size, size)).astype(float)
    third = n // 3
    low = rng.integers(0, 120, (third, c, 1, 1))
    images[:third] = low + images[:third] / 255 * rng.integers(1, 130, (third, c, 1, 1))
    y, x = np.mgrid[:size, :size] / size
    phase = rng.random((third, c, 1, 1, 2)) * 6
    images[third : 2 * third] = 127.5 + 127 * np.sin(phase[..., 0] + 5 * x) * np.cos(phase[..., 1] + 4 * y)
    return torch.from_numpy(images.astype(np.uint8))


def _aug(size=32, c=3, padding=4, flip=True, **fields):
    return Augmentation(size, padding, flip, mean=(0.0,) * c, std=(1 / 255,) * c, **fields)


def _grey(normalised):
    """Grey levels again, of the views of `_aug`."""
    levels = normalised.round()
    assert (normalised - levels).abs().max() < 1e-3
    return levels.to(torch.uint8)


@pytest.mark.parametrize("size", [16, 28, 32, 64])
@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("name", RANGES)
def test_operation_equals_pillow(name, c, size):
    images = _random_images(48, c, size)
    low, high = RANGES[name] or (0, 1)
    magnitudes = torch.from_numpy(np.random.default_rng(size).uniform(low, high, len(images)))
    magnitudes[0] = low  # the end that a draw can hit
    before = images.clone()
    got = _apply(name, images, magnitudes)
    expected = torch.stack([_tensor(PIL_OPS[name](_pil(i), v)) for i, v in zip(images, magnitudes.tolist())])
    assert got.dtype == torch.uint8 and torch.equal(images, before)
    difference = (got.int() - expected.int()).abs()
    assert difference.max() <= (1 if TOLERANCE[name] else 0)
    assert (difference > 0).float().mean() <= TOLERANCE[name]
    if name != "identity" and (name, c) != ("color", 1):
        assert (got != images).any()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", RANGES)
def test_operation_equals_pillow_on_tiny_and_constant_images(name, size):
    images = _random_images(12, 3, size)
    images[6:] = images[6:, :, :1, :1]
    images[-1], images[-2] = 0, 255
    low, high = RANGES[name] or (0, 1)
    magnitudes = torch.linspace(low, high, len(images), dtype=torch.float64)
    expected = torch.stack([_tensor(PIL_OPS[name](_pil(i), v)) for i, v in zip(images, magnitudes.tolist())])
    assert (_apply(name, images, magnitudes).int() - expected.int()).abs().max() <= (1 if TOLERANCE[name] else 0)


def test_constant_images_have_no_contrast_to_stretch():
    images = torch.arange(0, 256, 5, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 16, 16)
    for name in ("auto_contrast", "equalize", "contrast", "sharpness"):
        assert torch.equal(_apply(name, images, torch.full((len(images),), 0.5, dtype=torch.float64)), images), name


def test_color_of_a_grey_image_is_the_image():
    images = _random_images(9, 1, 16)
    assert torch.equal(_apply("color", images, torch.full((9,), 0.05, dtype=torch.float64)), images)


def _pil_crop(image, padding, flip, u):
    """torchvision's RandomCrop(size, padding) and RandomHorizontalFlip on the first three draws of a row."""
    size = image.size[0]
    top, left = int(u[0] * (2 * padding + 1)), int(u[1] * (2 * padding + 1))
    image = ImageOps.expand(image, padding, 0).crop((left, top, left + size, top + size))
    return ImageOps.mirror(image) if flip and u[2] >= 0.5 else image


def _pil_strong(image, aug, u):
    """The strong view of one image, from its row of uniform draws."""
    image = _pil_crop(image, aug.padding, aug.flip, u)
    size = image.size[0]
    names = sorted(aug.strong_ops, key=list(RANDAUGMENT).index)
    for column in range(8, 8 + 2 * aug.strong_count, 2):
        name = names[int(u[column] * len(names))]
        low, high = RANGES[name] or (0, 1)
        image = PIL_OPS[name](image, low + (high - low) * u[column + 1])
    side = u[3] * aug.cutout * size
    if side > 0:
        x, y = (int(max(0, u[column] * size - side / 2)) for column in (4, 5))
        colour = (125, 123, 114) if image.mode == "RGB" else Image.new("RGB", (1, 1), (125, 123, 114)).convert("L")
        colour = colour if isinstance(colour, tuple) else colour.getpixel((0, 0))
        ImageDraw.Draw(image).rectangle((x, y, min(size, x + side), min(size, y + side)), colour)
    pixels = np.array(image)
    if aug.cutout_fixed:
        x, y = (int(u[column] * size) - aug.cutout_fixed // 2 for column in (6, 7))
        pixels[max(y, 0) : max(y + aug.cutout_fixed, 0), max(x, 0) : max(x + aug.cutout_fixed, 0)] = 0
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("c", "size", "fields"),
    [
        (3, 32, {}),
        (3, 32, {"strong_count": 3}),
        (3, 64, {"padding": 8, "flip": False, "strong_count": 2, "cutout": 0.0}),
        (1, 28, {"strong_ops": (), "strong_count": 0, "cutout": 0.0, "cutout_fixed": 16}),
        (1, 28, {"strong_ops": ("rotate", "equalize", "shear_y"), "cutout": 1.0, "cutout_fixed": 5}),
        (3, 16, {"padding": 0, "strong_count": 4}),
        (3, 16, {"padding": 0, "flip": False, "strong_count": 0}),
    ],
)
def test_whole_views_equal_pillow(c, size, fields):
    aug = _aug(size, c, **fields)
    images = _random_images(300, c, size)
    rows = torch.from_numpy(np.random.default_rng(1).permutation(50_000)[:300])
    key = (5, "train", 2, "net1", "view")
    draws = keyed_uniform(key, rows, 8 + 2 * aug.strong_count).double().tolist()
    weak = torch.stack([_tensor(_pil_crop(_pil(i), aug.padding, aug.flip, u)) for i, u in zip(images, draws)])
    assert torch.equal(_grey(aug.weak(images, rows, key)), weak)
    strong = torch.stack([_tensor(_pil_strong(_pil(i), aug, u)) for i, u in zip(images, draws)])
    # A blend off by one level may be carried on by the operations after it, hence the share and no bound on the step.
    assert (_grey(aug.strong(images, rows, key)) != strong).float().mean() <= 2e-3
    assert torch.equal(_grey(aug.plain(images)), images)


@pytest.mark.parametrize("c", [1, 3])
def test_normalisation(c):
    mean, std = (0.4914, 0.4822, 0.4465)[:c], (0.2023, 0.1994, 0.2010)[:c]
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, c, 1, 1)
    expected = (images.double() / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    aug = Augmentation(16, 0, False, strong_count=0, cutout=0.0, mean=mean, std=std)
    rows = torch.arange(2)
    for view in (aug.plain(images), aug.weak(images, rows, (0,)), aug.strong(images, rows, (0,))):
        assert view.dtype == torch.float32 and view.is_contiguous()
        torch.testing.assert_close(view.double(), expected, rtol=0, atol=2e-6)
    assert aug.plain(images.contiguous(memory_format=torch.channels_last)).is_contiguous()
    half = aug.strong(images, rows, (0,), torch.bfloat16)
    assert torch.equal(half, aug.plain(images).to(torch.bfloat16))


def test_padding_is_black_before_the_normalisation():
    aug = Augmentation(8, 2, False, mean=(0.5,), std=(0.25,))
    views = aug.weak(torch.full((500, 1, 8, 8), 255, dtype=torch.uint8), torch.arange(500), (0,))
    assert views.unique().tolist() == [-2.0, 2.0]


def test_crops_and_flips_are_uniform():
    size, padding, n = 16, 3, 30_000
    code = torch.arange(1, size * size // 2 + 1).repeat(2).view(1, size, size).to(torch.uint8)
    x = torch.arange(size).expand(1, size, size).to(torch.uint8)
    y = torch.arange(size).view(size, 1).expand(1, size, size).to(torch.uint8)
    image = torch.cat([x, y, code]).unsqueeze(0)
    views = _grey(_aug(size, 3, padding).weak(image.expand(n, -1, -1, -1), torch.arange(n), (1, "weak"))).int()
    mid = size // 2
    step = views[:, 0, mid, mid + 1] - views[:, 0, mid, mid]  # which way the columns run
    flipped = step < 0
    left = views[:, 0, mid, mid] - torch.where(flipped, size - 1 - mid, mid) + padding
    top = views[:, 1, mid, mid] - mid + padding
    table = torch.zeros(2, 2 * padding + 1, 2 * padding + 1)
    table.index_put_((flipped.long(), top.long(), left.long()), torch.ones(n), accumulate=True)
    assert stats.chisquare(table.flatten().numpy()).pvalue > 1e-4
    never = _grey(_aug(size, 3, padding, flip=False).weak(image.expand(99, -1, -1, -1), torch.arange(99), (1,))).int()
    assert (never[:, 0, mid, mid + 1] > never[:, 0, mid, mid]).all()


def test_operations_and_magnitudes_are_uniform(monkeypatch):
    drawn = {name: [] for name in RANDAUGMENT}
    for table in (PIXEL_OPS, AFFINE_OPS):
        for name, function in table.items():

            def record(first, second, name=name, function=function):
                drawn[name] += (second if name in PIXEL_OPS else first).tolist()
                return function(first, second)

            if name in drawn:
                monkeypatch.setitem(table, name, record)
    n = 14_000
    _aug(1, 1, 0, strong_count=2).strong(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n), (3, "strong"))
    assert stats.chisquare([len(values) for values in drawn.values()]).pvalue > 1e-4
    for name, limits in RANGES.items():
        if limits:
            assert min(drawn[name]) >= limits[0] and max(drawn[name]) < limits[1]
            assert stats.kstest(drawn[name], stats.uniform(limits[0], limits[1] - limits[0]).cdf).pvalue > 1e-4
    assert {int(bits) for bits in drawn["posterize"]} == {4, 5, 6, 7}


def test_parameters_are_independent_of_each_other():
    """Choice, magnitude, crop and hole come from columns of their own; two operations of one view, too."""
    columns = keyed_uniform((0, "strong"), torch.arange(40_000), 14).double().numpy()
    assert abs(np.corrcoef(columns, rowvar=False) - np.eye(14)).max() < 5 / math.sqrt(40_000)


def test_switching_one_thing_off_moves_nothing_else():
    images, rows, key = _random_images(60, 3, 32), torch.arange(60), (4, "v")
    bare = {"strong_count": 0, "cutout": 0.0}
    weak = _aug().weak(images, rows, key)
    assert torch.equal(_aug(**bare).strong(images, rows, key), weak)
    assert torch.equal(_aug(**bare | {"strong_count": 3, "strong_ops": ("identity",)}).strong(images, rows, key), weak)
    hole = _grey(_aug(**bare | {"cutout": 0.5}).strong(images, rows, key)) != _grey(weak)
    both = _aug(**bare | {"cutout": 0.5, "cutout_fixed": 4}).strong(images, rows, key)
    one = _aug(**bare | {"cutout_fixed": 4}).strong(images, rows, key)
    assert hole.any() and (both != one).any() and torch.equal(both[~hole], one[~hole])


def test_cutout_is_a_clipped_square_of_uniform_side_and_place():
    n, size = 20_000, 32
    aug = _aug(size, 3, 0, False, strong_count=0)
    views = _grey(aug.strong(torch.zeros(n, 3, size, size, dtype=torch.uint8), torch.arange(n), (8, "hole")))
    hole = views[:, 0] == 125
    assert torch.equal(views[:, 1] == 123, hole) and torch.equal(views[:, 2] == 114, hole)
    assert torch.equal(views.sum(1) > 0, hole)
    lines, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, lines.unsqueeze(2) & columns.unsqueeze(1))
    inner = ~(hole[:, 0].any(1) | hole[:, -1].any(1) | hole[:, :, 0].any(1) | hole[:, :, -1].any(1))
    assert torch.equal(lines.sum(1)[inner], columns.sum(1)[inner])
    # Centred in the middle 16 x 16 pixels a hole touches no edge: its side in pixels is then 1..16, equally often.
    y, x = (keyed_uniform((8, "hole"), torch.arange(n), 6)[:, [5, 4]].T * size).unbind(0)
    middle = (abs(y - 16) < 7.9) & (abs(x - 16) < 7.9)
    sides = torch.bincount(columns.sum(1)[middle], minlength=17)
    assert sides[0] == 0 and len(sides) == 17 and stats.chisquare(sides[1:].numpy()).pvalue > 1e-4
    # Where holes lie: symmetric in x and y, more of them in the middle than in the corners, none impossible anywhere.
    density = hole.float().mean(0)
    assert (density - density.T).abs().max() < 0.015 and density[16, 16] > 2 * density[0, 0] > 0


def test_fixed_cutout():
    n, size = 4000, 28
    ones = torch.full((n, 1, size, size), 255, dtype=torch.uint8)
    aug = _aug(size, 1, 0, False, strong_count=0, cutout=0.0, cutout_fixed=16)
    hole = _grey(aug.strong(ones, torch.arange(n), (1, "hole")))[:, 0] == 0
    lines, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, lines.unsqueeze(2) & columns.unsqueeze(1))
    for span in (lines, columns):
        length = span.sum(1)
        assert length.max() == 16 and length.min() == 8  # centred on a pixel of the image, half of it may hang over
        first = span.int().argmax(1)
        centre = torch.where(length == 16, first + 8, torch.where(first == 0, length - 8, first + 8))
        assert stats.chisquare(torch.bincount(centre, minlength=size).numpy()).pvalue > 1e-4


def test_no_side_no_hole():
    images, rows = _random_images(30, 3, 16), torch.arange(30)
    aug = _aug(16, strong_count=0)
    boxes, _ = aug._cutout_boxes(torch.zeros(30, 8, dtype=torch.float64))
    assert torch.equal(draw_boxes(images, boxes, (125, 123, 114)), images)
    nothing = _aug(16, strong_count=0, cutout=0.0)
    assert torch.equal(nothing.strong(images, rows, (0,)), nothing.weak(images, rows, (0,)))


@pytest.mark.parametrize("c", [1, 3])
def test_an_image_gets_the_same_pixels_in_any_batch(c):
    aug = _aug(28, c, strong_count=3, cutout_fixed=3)
    images, key = _random_images(120, c, 28), (0, "train", 1)
    rows = torch.arange(1000, 1120)
    order = torch.from_numpy(np.random.default_rng(0).permutation(120))
    for view in (aug.weak, aug.strong):
        whole = view(images, rows, key)
        assert torch.equal(view(images[order], rows[order], key), whole[order])
        assert torch.equal(torch.cat([view(images[i : i + 1], rows[i : i + 1], key) for i in range(40)]), whole[:40])
        halves = [view(images[part::2], rows[part::2], key) for part in (0, 1)]
        assert torch.equal(torch.stack(halves, 1).flatten(0, 1), whole)
        strided = images.contiguous(memory_format=torch.channels_last)
        assert torch.equal(view(strided, rows, key), whole)
        assert not torch.equal(view(images, rows, (0, "train", 2)), whole)
        assert not torch.equal(view(images, rows + 1, key), whole)


def test_the_order_of_the_operations_names_is_nothing():
    images, rows = _random_images(60, 3, 16), torch.arange(60)
    views = [_aug(16, strong_ops=ops).strong(images, rows, (0,)) for ops in (tuple(RANDAUGMENT), tuple(RANDAUGMENT)[::-1])]
    assert torch.equal(*views) and RANDAUGMENT == RANGES and len(RANDAUGMENT) == 14


def test_the_images_stay_as_they_are():
    images, rows = _random_images(40, 3, 16), torch.arange(40)
    before = images.clone()
    for fields in ({"padding": 0, "flip": False}, {"padding": 0, "flip": False, "strong_ops": ("identity",)}, {}):
        aug = _aug(**{"size": 16, "cutout_fixed": 4} | fields)
        aug.plain(images), aug.weak(images, rows, (0,)), aug.strong(images, rows, (0,))
        assert torch.equal(images, before)


@pytest.mark.parametrize("n", [0, 1])
def test_empty_and_single_batches(n):
    aug = _aug(16, 3, strong_count=2, cutout_fixed=4)
    images, rows = torch.full((n, 3, 16, 16), 7, dtype=torch.uint8), torch.arange(n)
    for view in (aug.plain(images), aug.weak(images, rows, (0,)), aug.strong(images, rows, (0,))):
        assert view.shape == (n, 3, 16, 16) and view.dtype == torch.float32


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 0},
        {"padding": -1},
        {"strong_ops": ("invert",)},
        {"strong_ops": ()},
        {"strong_count": -1},
        {"cutout": 1.5},
        {"cutout_fixed": -1},
    ],
)
def test_impossible_augmentations_are_refused(fields):
    with pytest.raises(ValueError):
        _aug(**fields)


def test_mean_and_std_belong_together():
    for mean, std in (((0.5,), (0.5, 0.5)), ((), ()), ((0.5,), (0.0,))):
        with pytest.raises(ValueError):
            Augmentation(8, 0, False, mean=mean, std=std)


def test_images_that_do_not_fit_are_refused():
    aug, rows = _aug(16), torch.arange(2)
    good = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    for images, numbers in (
        (good.float(), rows),
        (good[:, :1], rows),
        (good[..., :15], rows),
        (good[0], rows),
        (good, rows[:1]),
    ):
        for view in (aug.weak, aug.strong):
            with pytest.raises(ValueError):
                view(images, numbers, (0,))
    with pytest.raises(ValueError, match="channels"):
        _aug(16, 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_pixels_on_a_gpu_without_waiting_for_it():
    aug, images, rows = _aug(strong_count=3, cutout_fixed=4), _random_images(200, 3, 32), torch.arange(200)
    on_gpu = images.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weak, strong = aug.weak(on_gpu, rows, (0,)), aug.strong(on_gpu, rows, (0,))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(_grey(weak.cpu()), _grey(aug.weak(images, rows, (0,))))
    assert torch.equal(_grey(strong.cpu()), _grey(aug.strong(images, rows, (0,))))
