"""Stroke skeletons against splines, distances and boxes written out one by one."""

import math

import numpy as np
import pytest
import torch

from coreg.demo.strokes import ORNATE, PLAIN, SEGMENTS, draw_strokes, stroke_bank

ALPHABETS = {"plain": PLAIN, "ornate": ORNATE, "segments": SEGMENTS}


def draw(bank, rows, *, jitter=0.0, width=0.1, size=0.9, shift=(0.0, 0.0), resolution=32, seed=0, transform=None):
    n = len(rows)
    return draw_strokes(
        bank,
        torch.tensor(rows),
        torch.full((n,), jitter),
        (torch.eye(2) if transform is None else transform).expand(n, 2, 2),
        torch.full((n,), width),
        torch.full((n,), size),
        torch.tensor([shift]).expand(n, 2),
        resolution,
        torch.Generator().manual_seed(seed),
    )


def ink_box(image):
    """(left, top, right, bottom) of the inked pixels, in frames."""
    ys, xs = (image > 0.5).nonzero(as_tuple=True)
    return tuple(float(v) / image.shape[0] for v in (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))


@pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=ALPHABETS.keys())
def test_every_alphabet_writes_every_digit(alphabet):
    bank = stroke_bank(alphabet)
    assert sorted(set(bank.digit.tolist())) == list(range(10))
    images = draw(bank, list(range(len(bank.digit))))
    assert images.shape == (len(bank.digit), 1, 32, 32)
    assert images.min() >= 0 and images.max() == 1
    ink = images.mean((1, 2, 3))
    assert (ink > 0.03).all() and (ink < 0.5).all()
    # No two skeletons draw the same picture.
    flat = images.flatten(1)
    assert torch.cdist(flat, flat)[~torch.eye(len(flat), dtype=torch.bool)].min() > 1


def test_path_points_are_splines_and_lines():
    bank = stroke_bank({3: ("curve 0,0 30,10 20,60 50,100 | line 0,0 60,100",)})
    points = (bank.path[0] @ bank.control[0]).numpy()
    p = np.array([[0, 0], [0.3, 0.1], [0.2, 0.6], [0.5, 1.0]])
    padded = np.concatenate([p[:1], p, p[-1:]])
    expected = []
    for i in range(3):
        for t in (0, 1 / 3, 2 / 3):
            # Catmull-Rom: a Hermite cubic whose tangents are half the chord between the neighbours.
            a, b = padded[i + 1], padded[i + 2]
            tangent_a, tangent_b = (padded[i + 2] - padded[i]) / 2, (padded[i + 3] - padded[i + 1]) / 2
            expected.append(
                (2 * t**3 - 3 * t**2 + 1) * a
                + (t**3 - 2 * t**2 + t) * tangent_a
                + (3 * t**2 - 2 * t**3) * b
                + (t**3 - t**2) * tangent_b
            )
    expected += [p[3], [0, 0], [0.6, 1.0]]
    np.testing.assert_allclose(points, expected, atol=1e-6)
    joined = [True] * 9 + [False] + [True]
    assert bank.pen_down[0].tolist() == joined


def test_ink_is_where_the_pen_passes():
    # A short and a long skeleton in one bank: padding must not show.
    bank = stroke_bank({1: ("line 0,0 100,100",), 0: ("ring 50,50 50,50 0,360",)})
    image = draw(bank, [0], width=0.12, size=0.8, resolution=20)[0, 0]
    # The pen's centre runs down the diagonal between these corners; its rim fills the box of side 0.8.
    low, high = 0.5 - (0.8 - 0.12) / 2, 0.5 + (0.8 - 0.12) / 2
    for y in range(20):
        for x in range(20):
            px, py = (x + 0.5) / 20, (y + 0.5) / 20
            nearest = min(high, max(low, (px + py) / 2))
            distance = math.hypot(px - nearest, py - nearest)
            assert image[y, x].item() == pytest.approx(min(1, max(0, (0.06 - distance) * 20 + 0.5)), abs=1e-4)


def test_strokes_are_not_joined():
    bank = stroke_bank({1: ("line 0,0 100,0 | line 0,100 100,100",)})
    image = draw(bank, [0], resolution=40)[0, 0]
    assert image[10:30].max() == 0 and image[:10].max() == 1 and image[30:].max() == 1


def test_size_shift_and_transform():
    bank = stroke_bank({1: ("line 0,0 0,100",)})
    left, top, right, bottom = ink_box(draw(bank, [0], size=0.5, shift=(0.2, -0.1), resolution=100)[0, 0])
    assert bottom - top == pytest.approx(0.5, abs=0.03) and right - left == pytest.approx(0.1, abs=0.03)
    assert (left + right) / 2 == pytest.approx(0.7, abs=0.02) and (top + bottom) / 2 == pytest.approx(0.4, abs=0.02)
    quarter_turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    left, top, right, bottom = ink_box(draw(bank, [0], size=0.5, transform=quarter_turn, resolution=100)[0, 0])
    assert right - left == pytest.approx(0.5, abs=0.03) and bottom - top == pytest.approx(0.1, abs=0.03)


def test_jitter_is_seeded():
    bank = stroke_bank(PLAIN)
    first, again, other = (draw(bank, [4, 5], jitter=0.04, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().amax((1, 2, 3)).min() > 0.5
