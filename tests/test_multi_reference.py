"""Methods of several labels an image against the numbers that public code gives on the same inputs (`tests/reference/`)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import Identity

from coreg.learn.multi import METHODS
from coreg.learn.multi.losses import large_losses
from coreg.learn.multi.tables import initial_estimate
from coreg.learn.multi_options import OPTIONS
from coreg.learn.schedules import Step
from coreg.weak.multi import ObservedLabels

FOLDER = Path(__file__).parent / "reference"
LOSSES = np.load(FOLDER / "spml_losses.npz")


def built(name, observed, **options):
    """The method on observed labels (24, 9), in float64 and without a network."""
    table = np.asarray(observed, dtype=np.int8)
    weak = ObservedLabels(table, np.arange(len(table)), table, {})
    return METHODS[name](Identity(), weak, OPTIONS[name](method=name, **options), dtype=torch.float64)


def replayed(method, numbers):
    """Every batch of a file: yields (epoch, step, method, parts, gradient), and step None when an epoch ends."""
    epochs, steps = numbers["order"].shape[:2]
    for epoch in range(epochs):
        now = Step(epoch, epochs)
        for step in range(steps):
            index = torch.from_numpy(numbers["order"][epoch, step]).long()
            logits = torch.from_numpy(numbers["logits"][epoch, step]).requires_grad_()
            method.zero_grad()
            parts = method.loss(logits, index, now)
            parts["loss"].backward()
            with torch.no_grad():
                method.update(logits.detach(), index, now)
            yield epoch, step, parts, logits.grad.numpy()
        if method.reads_all(now):
            method.finish_epoch(now, torch.from_numpy(numbers["logits_pseudo"][epoch]))
        yield epoch, None, None, None


def same(parts, gradient, loss, expected_gradient):
    assert parts["loss"].item() == pytest.approx(float(loss), abs=1e-12)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-12)


ALL_NEGATIVES = np.where(LOSSES["labels"] == 0, -1, LOSSES["observed"])
TRUTH = 2 * LOSSES["labels"] - 1
PLAIN = [
    ("an", "an", LOSSES["observed"], {}),
    ("wan", "wan", LOSSES["observed"], {}),
    ("an_ls", "an_ls", LOSSES["observed"], {"smoothing": 0.1}),
    ("pr", "pr", LOSSES["observed"], {}),
    ("epr", "epr", LOSSES["observed"], {"expected_positives": 2.9}),
    ("em", "em", LOSSES["observed"], {"entropy_weight": 0.2}),
    ("iu", "iu", LOSSES["iu_observed"], {}),
    # IUN is IU where all absent labels are observed
    ("iu", "iun", ALL_NEGATIVES, {}),
    ("bce", "bce", TRUTH, {}),
    ("bce_ls", "bce_ls", TRUTH, {"smoothing": 0.1}),
]


@pytest.mark.parametrize(("name", "key", "observed", "options"), PLAIN, ids=[key for _, key, _, _ in PLAIN])
def test_losses_and_gradients_are_those_of_public_code(name, key, observed, options):
    """The first logits are saturated: without the 1e-5 inside the logarithm they would differ."""
    for _, step, parts, gradient in replayed(built(name, observed, **options), LOSSES):
        if step is not None:
            same(parts, gradient, LOSSES[f"{key}_loss"][0, step], LOSSES[f"{key}_grad"][0, step])
            if name == "epr":
                assert parts["count"].item() == pytest.approx(float(LOSSES["epr_regulariser"][0, step]), abs=1e-12)


@pytest.mark.parametrize(
    ("name", "key", "options"),
    [
        ("focal", "focal_g2_a25", {"focus": 2, "balance": 0.25}),
        ("focal", "focal_g2_noalpha", {"focus": 2, "balance": -1}),
        ("asl", "asl_gp0", {"focus_present": 0}),
        ("asl", "asl_gp1", {}),
    ],
)
def test_focal_losses_are_those_of_the_libraries_as_means_over_cells(name, key, options):
    numbers = np.load(FOLDER / "spml_focal_asl.npz")
    for _, step, parts, gradient in replayed(built(name, numbers["observed"], **options), numbers):
        if step is not None:
            same(parts, gradient, numbers[f"{key}_loss"][step], numbers[f"{key}_grad"][step])


@pytest.mark.parametrize("name", ["ll_r", "ll_ct", "ll_cp"])
def test_large_losses_are_those_of_public_code(name):
    numbers = np.load(FOLDER / "spml_large_loss.npz")
    method = built(name, numbers["observed"], large_share=float(numbers["delta"]))
    for epoch, step, parts, gradient in replayed(method, numbers):
        if step is None:
            continue
        same(parts, gradient, numbers[f"{name}_loss"][epoch, step], numbers[f"{name}_grad"][epoch, step])
        assert method._count(54, Step(epoch, 6)) == numbers[f"{name}_k"][epoch, step]
        if name == "ll_cp":
            np.testing.assert_array_equal(method.observed, numbers["ll_cp_labels"][epoch, step])
        else:
            np.testing.assert_array_equal(method.observed, numbers["observed"])


def test_em_apl_is_that_of_public_code():
    numbers = np.load(FOLDER / "spml_em_apl.npz")
    options = {"entropy_weight": 0.2, "pseudo_after": 3, "pseudo_share": 0.9, "pseudo_weight": 0.4}
    method, rounds = built("em_apl", numbers["observed"], **options), 0
    for epoch, step, parts, gradient in replayed(method, numbers):
        if step is not None:
            same(parts, gradient, numbers["loss"][epoch, step], numbers["grad"][epoch, step])
            continue
        soft = method.soft.numpy()
        labels = np.where(soft >= 0, -soft, method.observed.numpy())
        np.testing.assert_allclose(labels, numbers["labels_after_epoch"][epoch], atol=1e-12)
        rounds += method.reads_all(Step(epoch, 8))
    assert rounds == 8 - 3 + 1


def test_role_is_that_of_public_code():
    """Adam moves rows of the table that are not in the batch, too."""
    numbers = np.load(FOLDER / "spml_role.npz")
    method = built("role", numbers["observed"], expected_positives=2.9)
    with torch.no_grad():
        method.estimate.copy_(torch.from_numpy(numbers["table_init"]))
    adam = torch.optim.Adam([method.estimate], lr=float(numbers["adam_lr"]))
    for epoch, step, parts, gradient in replayed(method, numbers):
        if step is None:
            continue
        same(parts, gradient, numbers["loss"][epoch, step], numbers["grad"][epoch, step])
        np.testing.assert_allclose(method.estimate.grad, numbers["grad_table"][epoch, step], atol=1e-12)
        adam.step()
        np.testing.assert_allclose(method.estimate.detach(), numbers["table_after_step"][epoch, step], atol=1e-9)


@pytest.mark.parametrize(("observed", "table"), [("observed", "table_init"), ("observed_pos_neg", "table_init_pos_neg")])
def test_roles_table_begins_as_in_public_code(observed, table):
    numbers = np.load(FOLDER / "spml_role.npz")
    ours = initial_estimate(torch.from_numpy(numbers["init_uniform"]), torch.from_numpy(numbers[observed]))
    np.testing.assert_allclose(ours, numbers[table], atol=1e-12)


def test_cells_strictly_above_the_smallest_large_loss():
    """One of three cells of the same loss may not be preferred: none of them is above."""
    losses = torch.tensor([[3.0, 2.0, 2.0], [2.0, 9.0, 1.0]])
    unknown = torch.tensor([[True, True, True], [True, False, True]])
    large, largest = large_losses(losses, unknown, 2)
    assert large.tolist() == [[True, True, True], [True, False, False]]
    assert largest.tolist() == [[True, False, False], [False, False, False]]
    assert not large_losses(losses, unknown, 0)[0].any()
    # more than there are: observed cells stay out of it, where the public code drops them
    assert torch.equal(large_losses(losses, unknown, 6)[0], unknown)
    assert not large_losses(losses, torch.zeros_like(unknown), 3)[0].any()
