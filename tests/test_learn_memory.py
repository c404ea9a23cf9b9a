"""Prototypes against the sequential loop, the queue against a plain list."""

import pytest
import torch
from torch.nn import functional as F

from coreg.learn.memory import Prototypes, Queue


@pytest.mark.parametrize("n", [0, 1, 40])
def test_prototypes_equal_the_sequential_loop(n):
    generator = torch.Generator().manual_seed(n)
    prototypes = Prototypes(6, 5).double()
    prototypes.value.copy_(F.normalize(torch.randn(6, 5, generator=generator, dtype=torch.float64), dim=1))
    features = F.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.randint(0, 4, (n,), generator=generator)  # classes 4 and 5 are never seen
    by_hand = prototypes.value.clone()
    for feature, label in zip(features, labels):
        by_hand[label] = 0.9 * by_hand[label] + 0.1 * feature
    by_hand /= by_hand.norm(dim=1, keepdim=True)
    prototypes.update(features, labels, 0.9)
    torch.testing.assert_close(prototypes.value, by_hand, rtol=1e-12, atol=1e-14)


def test_rows_that_do_not_count_are_as_if_they_were_not_there():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 5, generator=generator, dtype=torch.float64)
    labels, taken = torch.randint(0, 4, (30,), generator=generator), torch.rand(30, generator=generator) < 0.6
    taken[labels == 3] = False
    masked, without = (Prototypes(4, 5).double() for _ in range(2))
    for _ in range(2):
        masked.update(features, labels, 0.9, taken)
        without.update(features[taken], labels[taken], 0.9)
    torch.testing.assert_close(masked.value, without.value, rtol=1e-12, atol=1e-14)
    assert not masked.value[3].any() and masked.value[:3].any(dim=1).all()


def test_the_prototype_of_an_unseen_class_stays_zero():
    prototypes = Prototypes(3, 2)
    prototypes.update(torch.tensor([[0.6, 0.8]]), torch.tensor([1]), 0.99)
    torch.testing.assert_close(prototypes.value, torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.0, 0.0]]))


@pytest.mark.parametrize("batches", [[3], [3, 3, 3, 3], [5, 5], [12], [2, 0, 9, 1], [25, 3]])
def test_the_queue_is_a_ring_of_the_last_rows(batches):
    queue, rows, step = Queue(5, 2), [], 0
    for n in batches:
        keys = torch.arange(step, step + n).float()[:, None].repeat(1, 2)
        labels = torch.arange(step, step + n)
        queue.enqueue(keys, labels, labels % 2 == 0)
        rows += labels.tolist()
        step += n
        keys, labels, confident = queue.rows()
        assert sorted(labels.tolist()) == sorted(rows[-5:])
        assert keys[:, 0].tolist() == labels.tolist()
        assert confident.tolist() == [label % 2 == 0 for label in labels.tolist()]


def test_a_restored_queue_goes_on_where_it_stopped():
    first, second = Queue(4, 1), Queue(4, 1)
    first.enqueue(torch.arange(6.0)[:, None], torch.arange(6), torch.ones(6, dtype=torch.bool))
    second.load_state_dict(first.state_dict())
    for queue in (first, second):
        queue.enqueue(torch.tensor([[9.0]]), torch.tensor([9]), torch.tensor([False]))
    assert all(torch.equal(a, b) for a, b in zip(first.rows(), second.rows()))
    assert sorted(second.rows()[1].tolist()) == [3, 4, 5, 9]
