"""Tables whole and in parts: the same rows, sums in every bit, on one process and on several."""

import numpy as np
import pytest
import torch
from runs import in_processes

from coreg.learn import tables
from coreg.learn.collective import gather_rows, my_slice, rank_and_world
from coreg.learn.division import Predicted
from coreg.process import build_accelerator


def test_pieces_change_no_bit(monkeypatch):
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(10_007, 10)).astype(np.float32)) * 3
    log_p = torch.log_softmax(logits.double(), dim=1).numpy()
    whole = Predicted.of(log_p)
    monkeypatch.setattr(tables, "PIECE", 1000)
    parts = list(tables.log_probabilities(logits))
    assert len(parts) == 101 and np.array_equal(np.concatenate([rows for _, rows in parts]), log_p)
    for table in (logits, tables.owned(logits, logits.device)):
        predicted = tables.predicted(table)
        assert np.array_equal(predicted.mean, whole.mean) and np.array_equal(predicted.classes, whole.classes)
        assert predicted.finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_seen(value):
    logits = torch.zeros(5, 3)
    logits[4, 1] = value
    assert not tables.predicted(logits).finite


def test_a_share_of_a_batch_alone_is_the_batch():
    table, batch = torch.arange(20.0).reshape(10, 2), np.array([7, 0, 7, 9])
    for kept in (table, tables.owned(table, table.device)):
        assert torch.equal(tables.share(kept, batch), table[[7, 0, 7, 9]])
        assert tables.share(kept, batch[:0]).shape == (0, 2)


def compare(words):
    """On each process: rows by share, all rows, and vectors, of tables whole and in parts."""
    build_accelerator()
    rank, world = rank_and_world()
    tables.PIECE = 5
    for n in (1, 2, world - 1, world, 11, 23):
        rng = np.random.default_rng(n)
        for kind in (torch.float64, torch.float32, torch.bool, torch.int64):
            whole = torch.from_numpy(rng.integers(0, 9, (n, 3))).to(kind)
            part = tables.owned(whole, whole.device)
            assert len(part.rows) == my_slice(n).stop - my_slice(n).start
            for size in (0, 1, 2, 7, 30):
                batch = rng.integers(0, n, size)
                assert torch.equal(tables.share(part, batch), tables.share(whole, batch))
                assert torch.equal(tables.share(whole, batch), whole[torch.from_numpy(batch[my_slice(size)])])
            together = part.gathered()
            assert torch.equal(together, whole) if rank == 0 else together is None
        logits = torch.from_numpy(rng.normal(size=(n, 3)))
        part, log_p = tables.owned(logits, logits.device), torch.log_softmax(logits, 1).numpy()
        expected, predicted = Predicted.of(log_p), tables.predicted(part)
        assert np.array_equal(predicted.classes, expected.classes) and predicted.finite
        np.testing.assert_allclose(predicted.mean, expected.mean, rtol=1e-14)
        here = tables.rows_here(part)
        assert np.array_equal(tables.every_row(log_p[here, 0], part), log_p[:, 0])
        logits[n - 1, 0] = float("nan")
        assert not tables.predicted(tables.owned(logits, logits.device)).finite
    gather_rows(torch.zeros(1, 1), world)  # none leaves while another one is at work


@pytest.mark.multiprocess
@pytest.mark.parametrize("processes", [2, 3])
def test_rows_come_from_their_owners(processes):
    ended = in_processes(processes, compare)
    assert ended.codes == [0] * processes, ended.stderr[-2000:]
