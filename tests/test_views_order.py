"""Every round visits every row once and none alone, whatever the batch size; a batch is a pure function of its number."""

import numpy as np
import pytest
import torch

from coreg.data.keyed import keyed_order, keyed_uniform
from coreg.views import order as order_module
from coreg.views.order import ShuffledRows, drawn_part, n_batches


@pytest.mark.parametrize("large", [order_module.LARGE, 3])
@pytest.mark.parametrize(
    ("n", "size", "smallest"),
    [(11, 3, 2), (9, 3, 2), (4, 4, 2), (10, 3, 1), (5, 1, 1), (1, 4, 1), (101, 3, 2), (99, 3, 2)],
)
def test_every_round_is_a_new_permutation(n, size, smallest, large, monkeypatch):
    """Whether it is held or computed place by place."""
    monkeypatch.setattr(order_module, "LARGE", large)
    monkeypatch.setattr(order_module, "PART", 1)
    rows = np.arange(200, 200 + n)
    order = ShuffledRows(rows, size, ("key", 1), smallest)
    rounds = [[order.batch(r * order.per_round + i) for i in range(order.per_round)] for r in range(3)]
    for batches in rounds:
        assert [len(b) for b in batches] == [min(size, n - i * size) for i in range(n_batches(n, size))]
        assert sorted(np.concatenate(batches)) == rows.tolist()
    if n > 4:
        assert not np.array_equal(np.concatenate(rounds[0]), np.concatenate(rounds[1]))


@pytest.mark.parametrize("large", [order_module.LARGE, 10])
def test_one_row_that_is_left_over_joins_the_batch_before_it(large, monkeypatch):
    monkeypatch.setattr(order_module, "LARGE", large)
    monkeypatch.setattr(order_module, "PART", 1)
    for n in range(2, 70):
        for size in range(2, 20):
            order = ShuffledRows(np.arange(n), size, ("key", n))
            batches = [order.batch(i) for i in range(order.per_round)]
            row = np.concatenate(batches)
            assert sorted(row) == list(range(n))
            # cut every `size` rows, unless one is left over
            cuts = [at for at in range(size, n, size) if n - at > 1]
            assert [len(b) for b in batches] == [len(b) for b in np.split(row, cuts)]
            assert min(len(b) for b in batches) >= 2 and max(len(b) for b in batches) <= size + 1


def test_a_row_that_is_the_only_one_is_taken_twice():
    order = ShuffledRows(np.array([7]), 5, ("U",))
    assert order.per_round == 1 and [order.batch(step).tolist() for step in range(3)] == [[7, 7]] * 3


def test_batches_can_be_asked_for_in_any_order():
    first, second = (ShuffledRows(np.arange(20), 6, (3, "P")) for _ in range(2))
    forward = [first.batch(step) for step in range(9)]
    backward = [second.batch(step) for step in reversed(range(9))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward))
    other = ShuffledRows(np.arange(20), 6, (4, "P"))
    assert not np.array_equal(first.batch(0), other.batch(0))


def test_the_order_of_many_rows_is_never_held(monkeypatch):
    monkeypatch.setattr(order_module, "LARGE", 99)
    monkeypatch.setattr(order_module, "PART", 1)
    computed = ShuffledRows(np.arange(401), 7, ("k",))
    assert sorted(np.concatenate([computed.batch(step) for step in range(computed.per_round)])) == list(range(401))
    assert sum(len(rows) for rows in computed._parts.values()) <= 2 * 16 * 7
    whole = keyed_order(("k", 1), 401, np.arange(401))
    for step in (computed.per_round, computed.per_round + 20, 2 * computed.per_round - 1, computed.per_round + 1):
        start = (step - computed.per_round) * 7
        assert computed.batch(step).tolist() == whole[start : start + 7].tolist()


def test_no_rows_give_empty_batches():
    order = ShuffledRows(np.arange(0), 5, ("U",))
    assert order.per_round == 0 and len(order.batch(3)) == 0


def test_a_smaller_part_lies_within_a_larger_one():
    rows = np.arange(1000) * 3 + 1
    parts = [drawn_part(rows, n, 5) for n in (10, 200, 1000)]
    assert [len(part) for part in parts] == [10, 200, 1000] and set(parts[0]) < set(parts[1]) < set(parts[2])
    assert all((np.diff(part) > 0).all() for part in parts) and parts[2].tolist() == rows.tolist()
    # the rows with the smallest numbers of their own: nothing hangs on the company or the order
    number = {row: float(keyed_uniform((5, "part"), torch.tensor([row]), 1)) for row in rows.tolist()}
    assert parts[0].tolist() == sorted(sorted(number, key=number.__getitem__)[:10])
    assert drawn_part(rows[::-1].copy(), 10, 5).tolist() == parts[0].tolist()
    assert drawn_part(rows, 10, 6).tolist() != parts[0].tolist()
    assert abs(parts[1].mean() - rows.mean()) < 4 * rows.std() / 200**0.5  # of all of them
