"""Views of the baselines: every one against torchvision and Pillow, image by image, and the laws of their draws."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image
from scipy import stats
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode, RandomResizedCrop

from coreg.data.keyed import keyed_uniform
from coreg.views.augment import RESIZED_VIEWS, VIEWS, Augmentation
from coreg.views.augment_geometry import RESIZED_CROP_DRAWS, random_boxes, resized_crop
from coreg.views.augment_ops import PIXEL_OPS
from coreg.views.operations import RANDAUGMENT
from coreg.views.policies import auto_augment
from coreg.views.resident import TrainingImages

MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
# Everything below is exact, but for blends: a compiler may fuse Pillow's float multiply and add, which moves one pixel
# in a thousand by one grey level, and the operations after it carry that on.
BLENDED = 2e-3


def _pictures(n, c, size, seed=0):
    """Half noise, half smooth."""
    rng = np.random.default_rng((seed, n, c, size))
    images = rng.integers(0, 256, (n, c, size, size)).astype(float)
    y, x = np.mgrid[:size, :size] / size
    phase = rng.random((n - n // 2, c, 1, 1, 2)) * 6
    images[n // 2 :] = 127.5 + 127 * np.sin(phase[..., 0] + 5 * x) * np.cos(phase[..., 1] + 4 * y)
    return torch.from_numpy(images.astype(np.uint8))


def _augmentation(size=32, c=3, padding=4, flip=True, **fields):
    return Augmentation(size, padding, flip, mean=(0.0,) * c, std=(1 / 255,) * c, **fields)


def _view(augmentation, kind, images, samples, key):
    """Grey levels again, of a view of `_augmentation`."""
    normalised = augmentation.view(kind, images, samples, key)
    levels = normalised.round()
    assert normalised.is_contiguous() and (normalised - levels).abs().sum() < 1e-3 * max(1, levels.numel())
    return levels.to(torch.uint8)


def _one_by_one(images, make):
    """`make(pillow image, row)` of every image, uint8 (n, c, h, w)."""
    return torch.stack([F.pil_to_tensor(make(F.to_pil_image(image), i)) for i, image in enumerate(images)])


def _wrong(got, expected):
    assert got.dtype == torch.uint8 and got.shape == expected.shape
    return (got != expected).float().mean()


# --- crops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", MODES)
@pytest.mark.parametrize(
    ("side", "size", "c", "n"),
    [
        (32, 32, 3, 60),
        (28, 28, 1, 60),
        (64, 64, 3, 20),
        (32, 96, 3, 8),
        (7, 32, 1, 30),
        (1, 1, 3, 4),
        (2, 2, 3, 9),
        (1, 5, 1, 4),
    ],
)
def test_resized_crop_equals_torchvision(side, size, c, n, kernel):
    images, draws = _pictures(n, c, side), keyed_uniform((0, "crop"), torch.arange(n), RESIZED_CROP_DRAWS)
    boxes, mirrored = random_boxes(draws, side, (0.08, 1.0)), draws[:, -1] < 0.5
    boxes[-1] = torch.tensor([0, 0, side, side])
    before = images.clone()

    def make(image, i):
        image = F.resized_crop(image, *boxes[i].tolist(), [size, size], MODES[kernel])
        return F.hflip(image) if mirrored[i] else image

    assert torch.equal(resized_crop(images, boxes, mirrored, size, kernel), _one_by_one(images, make))
    assert torch.equal(images, before)


@pytest.mark.parametrize(("side", "size"), [(40, 32), (100, 32), (3, 2), (9, 1)])
@pytest.mark.parametrize("kernel", MODES)
def test_shrinking_is_antialiased_as_in_pillow(side, size, kernel):
    """Columns first, then rows. Pillow from version 13 on takes the other way round where that is faster."""
    images, draws = _pictures(40, 3, side), keyed_uniform((1, "crop"), torch.arange(40), RESIZED_CROP_DRAWS)
    boxes = random_boxes(draws, side, (0.3, 1.0))
    mode = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[kernel]

    def make(image, i):
        top, left, height, width = boxes[i].tolist()
        image = image.crop((left, top, left + width, top + height))
        return image.resize((size, height), mode).resize((size, size), mode)

    assert torch.equal(resized_crop(images, boxes, torch.zeros(40).bool(), size, kernel), _one_by_one(images, make))


@pytest.mark.parametrize(("side", "scale"), [(32, (0.2, 1.0)), (224, (0.08, 1.0))])
def test_boxes_are_distributed_as_in_torchvision(side, scale):
    n = 3000
    torch.manual_seed(0)
    blank = torch.empty(3, side, side)
    theirs = np.array([RandomResizedCrop.get_params(blank, scale, (3 / 4, 4 / 3)) for _ in range(n)])

    def p_values(scale):
        draws = keyed_uniform((2, "boxes"), torch.arange(n), RESIZED_CROP_DRAWS)
        ours = random_boxes(draws, side, scale).numpy()
        assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= side).all() and (ours[:, 2:] > 0).all()
        laws = (*range(4), lambda box: box[:, 2] * box[:, 3], lambda box: box[:, 2] / box[:, 3])
        pick = (lambda box, law=law: law(box) if callable(law) else box[:, law] for law in laws)
        return [stats.ks_2samp(of(ours), of(theirs)).pvalue for of in pick]

    assert min(p_values(scale)) > 1e-4
    assert min(p_values((scale[0] + 0.1, 1.0))) < 1e-4  # what a wrong law would give


def test_a_box_that_never_fits_is_the_whole_image():
    draws = keyed_uniform((3,), torch.arange(50), RESIZED_CROP_DRAWS)
    assert torch.equal(random_boxes(draws, 8, (3.0, 3.0)), torch.tensor([0, 0, 8, 8]).expand(50, 4))


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (5, 4), (16, 0), (2, 4), (1, 2)])
def test_cr_weak_equals_torchvision(size, padding):
    images, samples = _pictures(80, 3, size), torch.arange(500, 580)
    draws = keyed_uniform((4, "cr"), samples, 3).double().tolist()

    def make(image, i):
        top, left, mirrored = draws[i]
        image = F.pad(image, padding, padding_mode="reflect") if padding else image
        image = F.crop(image, int(top * (2 * padding + 1)), int(left * (2 * padding + 1)), size, size)
        return F.hflip(image) if mirrored >= 0.5 else image

    assert torch.equal(
        _view(_augmentation(size, 3, padding), "cr_weak", images, samples, (4, "cr")), _one_by_one(images, make)
    )


# --- colours ---------------------------------------------------------------------------------------------------------


def test_hue_equals_pillow():
    """One colour in nineteen, and every shift."""
    side = int(((1 << 24) / 19 / 102) ** 0.5)
    colours = (torch.arange(102 * side * side) * 19).view(102, 1, side, side)
    images = torch.cat([colours >> 16, colours >> 8 & 255, colours & 255], 1).to(torch.uint8)
    shifts = torch.linspace(-0.5, 0.5, len(images), dtype=torch.float64)
    expected = _one_by_one(images, lambda image, i: F.adjust_hue(image, shifts[i].item()))
    assert torch.equal(PIXEL_OPS["hue"](images, shifts), expected)
    grey = _pictures(4, 1, 8)
    assert torch.equal(PIXEL_OPS["hue"](grey, shifts[:4]), grey)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("brightness", F.adjust_brightness),
        ("contrast", F.adjust_contrast),
        ("color", F.adjust_saturation),
        ("sharpness", F.adjust_sharpness),
    ],
)
def test_blends_beyond_the_image_equal_torchvision(name, theirs, c):
    images, factors = _pictures(40, c, 16), torch.linspace(0.0, 2.0, 41, dtype=torch.float64)[:40]
    expected = _one_by_one(images, lambda image, i: theirs(image, factors[i].item()))
    got = PIXEL_OPS[name](images, factors)
    assert (got.int() - expected.int()).abs().max() <= 1 and _wrong(got, expected) <= 1e-3


@pytest.mark.parametrize("c", [1, 3])
def test_inversion_and_greying_equal_torchvision(c):
    images = _pictures(20, c, 16)
    theirs = {"invert": F.invert, "grey": lambda image: F.rgb_to_grayscale(image, c)}
    for name, make in theirs.items():
        expected = _one_by_one(images, lambda image, i, make=make: make(image))
        assert torch.equal(PIXEL_OPS[name](images, torch.zeros(20).double()), expected), name


def _jitter(image, u):
    """torchvision's RandomApply(ColorJitter(0.4, 0.4, 0.4, 0.1), 0.8) and RandomGrayscale(0.2) on the draws of a row."""
    change = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    for i in np.argsort(u[6:]) if u[0] < 0.8 else ():
        image = change[i](image, 0.6 + 0.8 * u[2 + i] if i < 3 else -0.1 + 0.2 * u[5])
    return F.rgb_to_grayscale(image, len(image.getbands())) if u[1] < 0.2 else image


@pytest.mark.parametrize(("c", "size", "side"), [(3, 32, 32), (1, 28, 28), (3, 24, 20)])
def test_pico_weak_equals_torchvision(c, size, side):
    images, samples, key = _pictures(200, c, side), torch.arange(3, 203), (5, "train", 2, "q")
    crops = keyed_uniform((*key, "resized crop"), samples, RESIZED_CROP_DRAWS)
    boxes, colours = random_boxes(crops, side, (0.2, 1.0)).tolist(), keyed_uniform((*key, "colour"), samples, 10).double()

    def make(image, i):
        image = F.resized_crop(image, *boxes[i], [size, size])
        return _jitter(F.hflip(image) if crops[i, -1] >= 0.5 else image, colours[i].numpy())

    assert _wrong(_view(_augmentation(size, c), "pico_weak", images, samples, key), _one_by_one(images, make)) <= BLENDED


def test_jitter_is_drawn_as_in_torchvision(monkeypatch):
    """Four of five images are jittered, one of five is grey, factors are uniform, all 24 orders are equally likely."""
    n, calls = 8000, []
    laws = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "color": (0.6, 1.4), "hue": (-0.1, 0.1), "grey": None}
    for name in laws:

        def record(images, magnitudes, name=name):
            calls.append((name, images[:, 0, 0, 0].tolist(), magnitudes.tolist()))
            return images

        monkeypatch.setitem(PIXEL_OPS, name, record)
    images = torch.arange(n).view(-1, 1, 1, 1).expand(n, 3, 1, 1) % 256
    numbers = torch.arange(n).split(256)  # so that a pixel tells the row
    orders = {}
    factors = {name: [] for name in laws}
    for block, rows in enumerate(numbers):
        calls.clear()
        _augmentation(1).view("pico_weak", images[rows].to(torch.uint8), rows, (6,))
        for name, pixels, magnitudes in calls:
            factors[name] += magnitudes
            for pixel in pixels if name != "grey" else ():
                orders[block, pixel] = (*orders.get((block, pixel), ()), name)
    assert stats.binomtest(len(orders), n, 0.8).pvalue > 1e-4
    assert stats.binomtest(len(factors["grey"]), n, 0.2).pvalue > 1e-4
    counts = [list(orders.values()).count(order) for order in itertools.permutations(list(laws)[:4])]
    assert sum(counts) == len(orders) and stats.chisquare(counts).pvalue > 1e-4
    for name, limits in laws.items():
        if limits:
            uniform = stats.uniform(limits[0], limits[1] - limits[0])
            assert stats.kstest(factors[name], uniform.cdf).pvalue > 1e-4, name


@pytest.mark.parametrize("c", [1, 3])
def test_pico_strong_is_a_resized_crop_with_three_operations_and_cutout(c):
    images, samples, key = _pictures(300, c, 32), torch.arange(300), (7, "k")
    augmentation = _augmentation(32, c)
    draws = keyed_uniform((*key, "resized crop"), samples, RESIZED_CROP_DRAWS)
    cropped = resized_crop(images, random_boxes(draws, 32, (0.2, 1.0)), draws[:, -1] >= 0.5, 32, "bilinear")
    expected = _view(_augmentation(32, c, 0, False, strong_count=3), "strong", cropped, samples, key)
    assert torch.equal(_view(augmentation, "pico_strong", images, samples, key), expected)
    bare = _augmentation(32, c, cutout=0.0, strong_ops=("identity",))
    assert torch.equal(_view(bare, "pico_strong", images, samples, key), cropped)


# --- AutoAugment -----------------------------------------------------------------------------------------------------


def _auto_augment(policy, u):
    """torchvision's transform with the parameters of a row of draws."""
    transform = AutoAugment(AutoAugmentPolicy(policy))
    drawn = int(u[0] * len(transform.policies)), torch.tensor(u[1:3]), torch.tensor([int(s >= 0.5) for s in u[3:5]])
    transform.get_params = lambda count: drawn
    return transform


@pytest.mark.parametrize("policy", ["cifar10", "svhn"])
@pytest.mark.parametrize(("c", "size"), [(3, 32), (1, 28), (3, 64), (3, 2), (3, 1)])
def test_auto_augment_equals_torchvision(policy, c, size):
    """Every sub-policy with every sign, both operations or as they are drawn."""
    least = [2.0**-24]  # happens, but for chances of 0, which torchvision lets happen once in 2 ** 24 times
    corners = [(k + 0.5) / 25 for k in range(25)], least, least, [0.2, 0.7], [0.2, 0.7]
    every = torch.tensor(list(itertools.product(*corners)), dtype=torch.float32)
    draws = torch.cat([every, keyed_uniform((8, policy), torch.arange(100), 5)])
    images = _pictures(len(draws), c, size)
    expected = _one_by_one(images, lambda image, i: _auto_augment(policy, draws[i].tolist())(image))
    assert _wrong(auto_augment(images, draws, policy), expected) <= (BLENDED if size > 2 else 0.02)


@pytest.mark.parametrize(
    ("kind", "policy", "size", "side"),
    [("cr_strong", "cifar10", 32, 16), ("cr_strong", "cifar10", 64, 32), ("cr_strong_svhn", "svhn", 32, 20)],
)
def test_cr_strong_equals_torchvision(kind, policy, size, side):
    images, samples, key = _pictures(100, 3, size), torch.arange(100), (9, "x1")
    augmentation = _augmentation(size)
    start = _view(augmentation, "cr_weak", images, samples, key) if kind == "cr_strong" else images
    holes = (keyed_uniform(key, samples, 8)[:, 6:].double() * size).long().tolist()
    draws = keyed_uniform((*key, "policy"), samples, 5).tolist()

    def make(image, i):
        pixels, (x, y) = np.array(image), holes[i]
        pixels[max(y - side // 2, 0) : y + side // 2, max(x - side // 2, 0) : x + side // 2] = 0
        return _auto_augment(policy, draws[i])(Image.fromarray(pixels))

    assert _wrong(_view(augmentation, kind, images, samples, key), _one_by_one(start, make)) <= BLENDED


@pytest.mark.parametrize(("side", "size"), [(48, 48), (32, 56)])
def test_clip_train_equals_torchvision(side, size):
    images, samples, key = _pictures(30, 3, side), torch.arange(30), (10, "clip")
    draws = keyed_uniform((*key, "resized crop"), samples, RESIZED_CROP_DRAWS)
    boxes = random_boxes(draws, side, (0.08, 1.0)).tolist()

    def make(image, i):
        image = F.resized_crop(image, *boxes[i], [size, size], InterpolationMode.BICUBIC)
        return F.hflip(image) if draws[i, -1] >= 0.5 else image

    assert torch.equal(_view(_augmentation(size), "clip_train", images, samples, key), _one_by_one(images, make))


# --- all kinds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("kind", VIEWS)
def test_a_view_is_a_function_of_image_sample_and_key(kind, c):
    augmentation, images, samples, key = (
        _augmentation(16, c, 2),
        _pictures(60, c, 16),
        torch.arange(1000, 1060),
        (0, "train", 1),
    )
    before, whole = images.clone(), _view(augmentation, kind, images, samples, key)
    order = torch.from_numpy(np.random.default_rng(0).permutation(60))
    assert torch.equal(_view(augmentation, kind, images[order], samples[order], key), whole[order])
    alone = [_view(augmentation, kind, images[i : i + 1], samples[i : i + 1], key) for i in range(0, 60, 12)]
    assert torch.equal(torch.cat(alone), whole[::12])
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(_view(augmentation, kind, strided, samples, key), whole)
    assert torch.equal(images, before)
    for other in (
        _view(augmentation, kind, images, samples, (0, "train", 2)),
        _view(augmentation, kind, images, samples + 1, key),
    ):
        assert torch.equal(other, whole) == (kind == "plain")


@pytest.mark.parametrize("n", [0, 1, 9])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", VIEWS)
def test_empty_batches_and_tiny_images(kind, size, n):
    augmentation = _augmentation(size, 3, 2, cutout_fixed=1)
    view = augmentation.view(kind, _pictures(n, 3, size), torch.arange(n), (0,), torch.bfloat16)
    assert view.shape == (n, 3, size, size) and view.dtype == torch.bfloat16 and view.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in VIEWS if kind not in ("plain", "cr_strong_svhn")])
def test_nothing_is_mirrored_without_flip(kind, monkeypatch):
    ramp = torch.arange(0, 240, 15, dtype=torch.uint8).expand(400, 3, 16, 16)
    fields = {"strong_ops": ("identity",), "cutout": 0.0}
    monkeypatch.setattr("coreg.views.augment.auto_augment", lambda images, draws, policy: images)
    monkeypatch.setattr("coreg.views.augment.colour_jitter", lambda images, draws: images)
    monkeypatch.setattr("coreg.views.augment.cut_out_square", lambda images, draws, side: images)
    for flip in (False, True):
        view = _view(_augmentation(16, 3, 2, flip, **fields), kind, ramp, torch.arange(400), (0,)).int()
        mirrored = view[:, 0, 8, 5] > view[:, 0, 8, 10]
        assert mirrored.any() == flip
    assert stats.binomtest(int(mirrored.sum()), 400, 0.5).pvalue > 1e-4


def test_views_that_do_not_exist_or_fit_are_refused():
    augmentation, rows = _augmentation(16), torch.arange(2)
    good = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="unknown view 'mixed'; the views are plain, weak, strong, pico_weak"):
        augmentation.view("mixed", good, rows, (0,))
    larger = torch.zeros(2, 3, 20, 20, dtype=torch.uint8)
    for kind in VIEWS:
        for images, samples in ((good.float(), rows), (good[:, :1], rows), (good[..., :15], rows), (good, rows[:1])):
            with pytest.raises(ValueError, match=r"expected uint8|sample indices"):
                augmentation.view(kind, images, samples, (0,))
        if kind in RESIZED_VIEWS:
            assert augmentation.view(kind, larger, rows, (0,)).shape == good.shape
        else:
            with pytest.raises(ValueError, match="expected uint8"):
                augmentation.view(kind, larger, rows, (0,))


def test_training_images_pass_the_kind_on():
    images, samples = _pictures(20, 3, 16), torch.arange(100, 120)
    augmentation = _augmentation(16, 3, 2)
    data = TrainingImages(images, samples, augmentation, torch.device("cpu"), seed=4)
    rows = np.array([7, 3, 3, 19])
    for kind in VIEWS:
        view = data.view(kind, rows, ("x", 1))
        assert torch.equal(view, augmentation.view(kind, images[rows], samples[rows], (4, "x", 1)))
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_no_range_of_randaugment_moved():
    """Seven operations draw no magnitude or one in [0.05, 0.95]; 4 to 7 bits; 30 degrees; three tenths; any threshold."""
    less = dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (0.05, 0.95))
    moves = dict.fromkeys(("shear_x", "shear_y", "translate_x", "translate_y"), (-0.3, 0.3))
    rest = {"posterize": (4, 8), "rotate": (-30, 30), "solarize": (0, 256)}
    assert dict(RANDAUGMENT) == dict.fromkeys(("auto_contrast", "equalize", "identity")) | less | moves | rest
    image, top = torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), 1 - 2.0**-24  # the largest draw there is
    assert PIXEL_OPS["posterize"](image, torch.tensor([4 + 4 * top], dtype=torch.float64)).item() == 0b11111110


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", VIEWS)
def test_same_pixels_on_a_gpu_without_waiting_for_it(kind):
    augmentation, images, samples = _augmentation(), _pictures(200, 3, 32), torch.arange(200)
    on_gpu = images.cuda()
    augmentation.view(kind, on_gpu, samples, (1,))  # tables that are made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        view = augmentation.view(kind, on_gpu, samples, (0,))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(view.cpu().round(), augmentation.view(kind, images, samples, (0,)).round())


def test_partners_that_another_process_holds_are_the_views_that_it_makes():
    """A process that holds a part of two blocks of views mixes with the same as one that holds all."""
    data = TrainingImages(
        _pictures(20, 3, 16), torch.arange(100, 120), _augmentation(16, 3, 2), torch.device("cpu"), seed=4
    )
    x, u = np.array([7, 3, 3, 19, 0]), np.array([1, 18, 4])
    blocks = [("weak", x, ("x", 1)), ("strong", u, ("u", 1))]
    whole = torch.cat([data.view(*block) for block in blocks])
    partner = np.random.default_rng(0).permutation(8)
    assert torch.equal(data.partners(whole, blocks, partner), whole[partner])
    mine = [0, 1, 5]
    assert torch.equal(data.partners(whole[mine], blocks, partner[mine]), whole[partner[mine]])
    assert data.partners(whole[:0], blocks, partner[:0]).shape == (0, 3, 16, 16)
