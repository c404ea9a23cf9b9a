"""Keyed random numbers: pinned to a big-integer statement of the hash, and tested for what randomness promises."""

import zlib

import numpy as np
import pytest
import torch
from scipy import stats

from coreg.data.keyed import keyed_generator, keyed_order, keyed_uniform

M = 2**64
PINNED = [[14785304, 10853401, 16157835], [1891199, 13591482, 12660242], [7126612, 15955074, 15565734]]
PERMUTATION = [6, 1, 4, 9, 3, 8, 7, 5, 0, 2]


def _splitmix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % M
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % M
    return z ^ (z >> 31)


def _by_big_integers(key, row, draw):
    """The 24 bits of one draw, in unsigned arithmetic without a tensor."""
    golden = 0x9E3779B97F4A7C15
    state = _splitmix(len(key) * golden % M)
    for part in key:
        kind, value = (2, zlib.crc32(part.encode())) if isinstance(part, str) else (1, part % M)
        state = _splitmix(_splitmix((state + kind * golden) % M) ^ value)
    per_row = _splitmix(_splitmix(row * golden % M) ^ state)
    return _splitmix((per_row + (draw + 1) * golden) % M) >> 40


@pytest.mark.parametrize(
    "key", [(), (0,), (1,), (-1,), (2**64 - 5,), ("train",), (7, "train", 3, "net1", "weak2"), ("ü", -(2**63))]
)
def test_equals_the_big_integer_hash(key):
    rows = [0, 1, 2, 49_999, 10**12, 2**63 - 1, -1]
    expected = [[_by_big_integers(key, row, draw) / 2**24 for draw in range(5)] for row in rows]
    assert keyed_uniform(key, torch.tensor(rows), 5).tolist() == expected


def test_values_never_change():
    bits = keyed_uniform((0, "train", 1, "weak"), torch.tensor([0, 1, 50_000]), 3) * 2**24
    assert bits.int().tolist() == PINNED


def test_a_draw_depends_on_nothing_but_key_row_and_column():
    rows = torch.arange(1000)
    whole = keyed_uniform((3, "a"), rows, 8)
    order = torch.from_numpy(np.random.default_rng(0).permutation(1000))
    assert torch.equal(keyed_uniform((3, "a"), order, 8), whole[order])
    assert torch.equal(keyed_uniform((3, "a"), rows[17:18], 8), whole[17:18])
    assert torch.equal(keyed_uniform((3, "a"), rows, 3), whole[:, :3])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        many = keyed_uniform((3, "a"), torch.arange(100_000), 8)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(many[:1000], whole)
    state = torch.get_rng_state()
    keyed_uniform((3, "a"), rows, 8)
    assert torch.equal(torch.get_rng_state(), state)


def test_order_length_and_type_of_the_key_count():
    keys = [(), (0,), (0, 0), ("a",), (zlib.crc32(b"a"),), (1, 2), (2, 1), (12,), ("1", "2"), ("12",), (1, "2")]
    draws = {tuple(keyed_uniform(key, torch.tensor([5]), 4)[0].tolist()) for key in keys}
    assert len(draws) == len(keys)
    firsts = {tuple(keyed_generator(*key).integers(2**60, size=4)) for key in keys}
    assert len(firsts) == len(keys)


@pytest.mark.parametrize("key", [(0,), (1, "train", 0), (2**40, "x", "y", 17)])
def test_uniform(key):
    draws = keyed_uniform(key, torch.arange(50_000), 4).double().numpy()
    assert draws.min() >= 0 and draws.max() < 1
    for column in draws.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    pairs = np.histogram2d(draws[:, 0], draws[:, 1], bins=16, range=[[0, 1]] * 2)[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-4
    low_byte = (draws[:, 2] * 2**24).astype(int) % 256
    assert stats.chisquare(np.bincount(low_byte, minlength=256)).pvalue > 1e-4


def test_neighbours_are_uncorrelated():
    rows = torch.arange(40_000)
    keys = [(0, epoch, view) for epoch in range(3) for view in ("weak1", "weak2")]
    columns = torch.cat([keyed_uniform(key, rows, 5) for key in keys], 1).double().numpy()
    limit = 5 / np.sqrt(len(rows))  # five standard errors, over some hundreds of pairs
    assert abs(np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])).max() < limit
    for lag in (1, 2, 256):
        both = np.concatenate([columns[lag:], columns[:-lag]], 1)
        assert abs(np.corrcoef(both, rowvar=False) - np.eye(both.shape[1])).max() < limit
    # Counter generators fail where one key's rows are another's, moved: then values recur far more often than by chance.
    recurring = len(columns.ravel()) - len(np.unique(columns))
    assert recurring < 1.1 * columns.size**2 / 2**25


def test_avalanche():
    rows = torch.arange(2000)
    base = (keyed_uniform((9, "k"), rows, 1) * 2**24).int()

    def flipped(other):
        changed = (base ^ (other * 2**24).int()).numpy().astype(np.uint32)
        return np.array([(changed >> bit & 1).mean() for bit in range(24)])

    for bit in (0, 1, 7, 20, 40, 62):
        for share in (
            flipped(keyed_uniform((9, "k"), rows ^ (1 << bit), 1)),
            flipped(keyed_uniform((9 ^ (1 << bit), "k"), rows, 1)),
        ):
            assert abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(len(rows))
    assert abs(flipped(keyed_uniform((9, "k"), rows, 2)[:, 1:]) - 0.5).max() < 5 * 0.5 / np.sqrt(len(rows))


def test_empty():
    assert keyed_uniform((0,), torch.empty(0, dtype=torch.int64), 3).shape == (0, 3)
    assert keyed_uniform((0,), torch.arange(4), 0).shape == (4, 0)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: keyed_uniform((0,), torch.arange(3, dtype=torch.int32), 1), TypeError),
        (lambda: keyed_uniform((0,), torch.zeros(2, 2, dtype=torch.int64), 1), ValueError),
        (lambda: keyed_uniform((0,), torch.arange(3), -1), ValueError),
        (lambda: keyed_uniform((2**64,), torch.arange(3), 1), ValueError),
        (lambda: keyed_uniform((0.5,), torch.arange(3), 1), TypeError),
        (lambda: keyed_generator(None), TypeError),
        (lambda: keyed_generator(-(2**63) - 1), ValueError),
    ],
)
def test_what_is_no_key_is_refused(call, error):
    with pytest.raises(error):
        call()


def test_numpy_integers_are_integers():
    rows = torch.arange(3)
    assert torch.equal(keyed_uniform((np.int64(7), "a"), rows, 2), keyed_uniform((7, "a"), rows, 2))
    assert keyed_generator(np.int32(7)).integers(2**60) == keyed_generator(7).integers(2**60)


def test_generator_is_a_function_of_its_key():
    permutation = keyed_generator(0, "order", 3).permutation(10)
    assert permutation.tolist() == PERMUTATION
    assert sorted(permutation.tolist()) == list(range(10))
    assert np.array_equal(keyed_generator(0, "order", 3).random(4), keyed_generator(0, "order", 3).random(4))
    # SeedSequence alone takes [1] and [1, 0], and [2**32] and [0, 1], for the same seed.
    assert keyed_generator(1).integers(2**60) != keyed_generator(1, 0).integers(2**60)
    assert keyed_generator(2**32).integers(2**60) != keyed_generator(0, 1).integers(2**60)
    assert keyed_generator(2**32 + 5).integers(2**60) != keyed_generator(5).integers(2**60)
    means = [keyed_generator("seed", i).random() for i in range(5000)]
    assert stats.kstest(means, "uniform").pvalue > 1e-4


def test_a_keyed_order_has_every_number_once():
    for n in [*range(1, 80), 1000, 65_537]:
        order = keyed_order(("order", n), n, np.arange(n))
        assert order.dtype == np.int64 and sorted(order) == list(range(n))


def test_a_place_of_a_keyed_order_is_computed_alone():
    n, places = 10**12 + 39, np.array([0, 1, 10**12, 17, 17])
    order = keyed_order((1, "x"), n, places)
    assert ((order >= 0) & (order < n)).all() and order[3] == order[4] and len(set(order.tolist())) == 4
    assert all(keyed_order((1, "x"), n, places[i : i + 1])[0] == order[i] for i in range(5))
    assert keyed_order((1, "x"), n, places[:0]).shape == (0,)
    assert (keyed_order((2, "x"), n, places) != order).all()


def test_keyed_orders_are_drawn_evenly():
    """Over the keys three places get each triple of numbers as often; in one order place and number, and neighbours, have
    nothing to do with each other."""
    triples = np.stack([keyed_order((key,), 997, np.array([0, 1, 700])) for key in range(2500)]) * 5 // 997
    assert stats.chisquare(np.bincount(triples @ [25, 5, 1], minlength=125)).pvalue > 1e-4
    order = keyed_order(("large",), 10_000, np.arange(10_000))
    for lag in range(1, 12):
        assert abs(np.corrcoef(order[lag:], order[:-lag])[0, 1]) < 0.05
        assert stats.kstest((order[lag:] - order[:-lag]) % 10_000, "uniform", (0, 10_000)).pvalue > 1e-4
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    table, *_ = np.histogram2d(order, np.arange(10_000), bins=20)
    assert stats.chisquare(table.ravel()).pvalue > 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_bits_on_a_gpu():
    rows = torch.arange(-1000, 100_000)
    assert torch.equal(keyed_uniform((1, "gpu"), rows.cuda(), 9).cpu(), keyed_uniform((1, "gpu"), rows, 9))
