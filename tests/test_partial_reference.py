"""Partial-label methods against the numbers that public code gives on the same inputs (`tests/reference/`)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import Identity

from coreg.learn.partial import METHODS
from coreg.learn.partial.method import Outputs, Step
from coreg.learn.partial_options import OPTIONS

FOLDER = Path(__file__).parent / "reference"


def replayed(name, **options):
    """The method on every batch of its file: yields (epoch, step, method, loss, gradient, numbers)."""
    numbers = np.load(FOLDER / f"{name}.npz")
    sets = torch.from_numpy(numbers["Y"]).bool()
    method = METHODS[name](Identity(), sets, OPTIONS[name](method=name, **options), dtype=torch.float64)
    epochs, steps = numbers["order"].shape[:2]
    for epoch in range(epochs):
        when = Step(epoch, epochs)
        for step in range(steps):
            index = torch.from_numpy(numbers["order"][epoch, step]).long()
            logits = torch.from_numpy(numbers["logits"][epoch, step]).requires_grad_()
            loss = method.loss(Outputs((logits,), ()), index, when)["loss"]
            loss.backward()
            again = "logits_after" if method.reads_again else "logits"
            if again in numbers.files:
                with torch.no_grad():
                    method.update(Outputs((torch.from_numpy(numbers[again][epoch, step]),), ()), index, when)
            yield epoch, step, method, loss.item(), logits.grad.numpy(), numbers
        method.finish_epoch(when)
        # the end of the epoch
        yield epoch, None, method, None, None, numbers


SETTINGS = {
    "abs_mae": {},
    "abs_gce": {},
    "cavl": {},
    "pop": {"purify_window": 2, "purify_after": 2, "purify_threshold": 0.05, "threshold_growth": 1.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_gradients_and_tables_are_those_of_public_code(name):
    compared = 0
    for epoch, step, method, loss, gradient, numbers in replayed(name, **SETTINGS[name]):
        if step is None:
            if name == "pop":
                np.testing.assert_allclose(method.confidence, numbers["confidence_epoch_end"][epoch], atol=1e-12)
                np.testing.assert_array_equal(method.kept, numbers["candidates_epoch_end"][epoch])
                assert float(method.threshold) == pytest.approx(float(numbers["theta_epoch_end"][epoch]), abs=1e-12)
            continue
        assert loss == pytest.approx(float(numbers["loss"][epoch, step]), abs=1e-12)
        np.testing.assert_allclose(gradient, numbers["grad_logits"][epoch, step], atol=1e-12)
        if "confidence" in numbers.files:
            np.testing.assert_allclose(method.confidence, numbers["confidence"][epoch, step], atol=1e-12)
        compared += 1
    assert compared == numbers["order"].shape[0] * 4
