"""Partial-label methods against the numbers that public code gives on the same inputs (`tests/reference/`)."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import Identity
from torch.nn import functional as F

from coreg.learn.partial import METHODS, imbalanced, solar
from coreg.learn.partial.method import Outputs, PartialBatch
from coreg.learn.partial.solar import transport_plan
from coreg.learn.partial_options import OPTIONS
from coreg.learn.schedules import Step
from coreg.nets.model import Model
from coreg.nets.preact import PreActResNet

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


# ---- whole steps: the network is the identity, a view is its logits, and a mixed view mixed logits -------------------

WIDTH = 16


@functools.cache
def numbers(name):
    return np.load(FOLDER / f"{name}.npz")


def array(name, key, *at):
    return torch.from_numpy(np.asarray(numbers(name)[key][at]))


def made(name, **options):
    """The method on the candidate sets of its file; its network stands aside."""
    net = Model(PreActResNet(7, 1, widths=(8, WIDTH), depths=(1, 1), norm="none"), 4)
    method = METHODS[name](
        net, array(name, "Y").bool(), OPTIONS[name](method=name, **options), dtype=torch.float64
    ).double()
    method.outputs_on = lambda view: (view, None)
    return method


def batch_of(name, epoch, step, epochs, views, steps=4, at=None):
    index = array(name, "order", *((epoch, step) if at is None else at)).long()
    return PartialBatch(index, Step(epoch, epochs, step, steps), tuple(view.requires_grad_() for view in views))


def near(ours, theirs, atol=1e-12):
    np.testing.assert_allclose(ours.detach(), theirs, rtol=0, atol=atol)


def prepared(monkeypatch, module, *draws):
    """Let the next draws of MixUp be these: lambda, and the permutation of the mixed rows, padded with -1."""
    left = list(draws)

    def draw(batch, alpha, name, among=None):
        kept, permutation = left.pop(0)
        rows = torch.arange(batch.size) if among is None else among.nonzero()[:, 0]
        permutation = torch.from_numpy(permutation[permutation >= 0])
        assert len(permutation) == len(rows)
        partner = torch.arange(batch.size)
        partner[rows] = rows[permutation]
        return float(kept), partner

    monkeypatch.setattr(module, "draw_partners", draw)
    return left


def test_able():
    f = numbers("able")
    method = made("able", contrast_temperature=0.07)
    for epoch, step in np.ndindex(2, 4):
        index = array("able", "order", epoch, step).long()
        logits = array("able", "logits_weak", epoch, step).requires_grad_()
        raw = array("able", "features_unnormalised", epoch, step).requires_grad_()
        outputs = Outputs((logits, logits), tuple(F.normalize(raw, dim=1).chunk(2)))
        parts = method.loss(outputs, index, Step(epoch, 3))
        near(parts["classification"], f["loss_ce"][epoch, step])
        near(parts["contrast"], f["loss_con"][epoch, step])
        parts["loss"].backward()
        near(logits.grad, f["grad_weak"][epoch, step])
        near(raw.grad, f["grad_features_unnormalised"][epoch, step])
        with torch.no_grad():
            method.update(outputs, index, Step(epoch, 3))
        near(method.confidence, f["confidence"][epoch, step])


def test_idgp():
    f = numbers("idgp")
    method = made("idgp", joint_start=0.1, divergence_ramp=0.2)  # of 40 steps
    for epoch, step in np.ndindex(3, 4):
        views = [array("idgp", key, epoch, step).requires_grad_() for key in ("logits_f", "logits_g")]
        index = array("idgp", "order", epoch, step).long()
        outputs, when = Outputs((torch.cat(views, dim=1),), ()), Step(epoch, 10, step, 4)
        parts = method.loss(outputs, index, when)
        near(parts["classifier"], f["loss_f"][epoch, step], 1e-10)
        near(parts["generator"], f["loss_g"][epoch, step], 1e-10)
        parts["loss"].backward()
        near(views[0].grad, f["grad_f"][epoch, step], 1e-10)
        near(views[1].grad, f["grad_g"][epoch, step], 1e-10)
        with torch.no_grad():
            method.update(outputs, index, when)
        # they add 1e-12 to what they divide by; on from theirs
        near(method.confidence, f["D"][epoch, step], 1e-9)
        method.confidence.copy_(array("idgp", "D", epoch, step))
        near(method.flips, f["B"][epoch, step])


def test_transport_plan():
    f = numbers("sinkhorn")
    prior = torch.from_numpy(f["prior"])
    near(transport_plan(torch.from_numpy(f["scores"]), prior), f["plan"])
    near(transport_plan(torch.from_numpy(f["scores_empty_class"]), prior), f["plan_empty_class"])


def test_solar(monkeypatch):
    f = numbers("solar")
    method = made(
        "solar", estimation=2 / 5, selection_ramp=2 / 3, plan_queue=20, selected=[0.2, 0.8], prior_rate=[0.1, 0.01]
    )
    for epoch, step in np.ndindex(5, 4):
        assert method.stage(Step(epoch, 5)) == Step(f["epoch"][epoch], 3)
        if (epoch, step) == (2, 0):
            method.restart()
        near(method.prior, f["prior_used"][epoch, step])
        views = ["weak", "strong"] if f["epoch"][epoch] else ["weak"]
        assert method.passes(Step(epoch, 5)).views == tuple(views)
        batch = batch_of("solar", epoch, step, 5, [array("solar", f"logits_{view}", epoch, step) for view in views])
        left = prepared(monkeypatch, solar, (f["mix_lambda"][epoch, step], f["mix_perm"][epoch, step]))
        outputs = method._outputs(batch)
        near(outputs.plan, f["plan"][epoch, step])
        assert len(left) == (0 if f["epoch"][epoch] else 1)
        if f["epoch"][epoch]:
            np.testing.assert_array_equal(outputs.selected, f["selected"][epoch, step])
            outputs.mixed.logits.retain_grad()
        loss = method.loss(outputs, batch.index, batch.step)["loss"]
        near(loss, f["loss"][epoch, step])
        loss.backward()
        near(batch.views[0].grad, f["grad_input_total"][epoch, step])
        if f["epoch"][epoch]:
            near(batch.views[1].grad, f["grad_strong"][epoch, step])
        with torch.no_grad():
            method.update(outputs, batch.index, batch.step)
        near(method.confidence, f["confidence"][epoch, step])
        near(method.queue, f["queue"][epoch, step])
        if step == 3:
            method.survey(array("solar", "logits_estimate", epoch), Step(epoch, 5))
            near(method.prior, f["prior_after_epoch"][epoch])


def test_records(monkeypatch):
    f = numbers("records")
    method = made("records", update_start=1, mixup_weight=1.0, feature_momentum=0.9)
    classifier = method.net.backbone.fc
    classifier.weight.data.copy_(array("records", "head_weight"))
    classifier.bias.data.copy_(array("records", "head_bias"))
    for epoch, step in np.ndindex(3, 4):
        views = [array("records", f"logits_{view}", epoch, step) for view in ("weak", "strong")]
        batch = batch_of("records", epoch, step, 3, views)
        prepared(monkeypatch, imbalanced, (f["mix_lambda"][epoch, step], f["mix_perm"][epoch, step]))
        outputs = method._outputs(batch)
        outputs.features = tuple(array("records", f"feat_{view}", epoch, step) for view in ("weak", "strong"))
        loss = method.loss(outputs, batch.index, batch.step)["loss"]
        near(loss, f["loss"][epoch, step], 1e-10)
        loss.backward()
        for k, view in enumerate(batch.views):
            near(view.grad, f["grad_input_total"][epoch, step, k], 1e-10)
        with torch.no_grad():
            method.update(outputs, batch.index, batch.step)
        near(method.feature_mean, f["feature_mean"][epoch, step])
        # they add 1e-9 to what they divide by; on from theirs
        near(method.confidence, f["confidence"][epoch, step], 2e-9)
        method.confidence.copy_(array("records", "confidence", epoch, step))
        if step == 3:
            near(array("records", "logits_test") - method.log_prior(), f["test_output"][epoch])


def test_htc(monkeypatch):
    f = numbers("htc")
    method = made("htc", selection_ramp=2 / 5)
    fused = method.net.backbone.fc
    fused.gate.weight.data.copy_(array("htc", "gate_weight"))
    fused.gate.bias.data.copy_(array("htc", "gate_bias"))
    for epoch, step in np.ndindex(4, 4):
        near(method.prior, f["prior_head"][epoch])
        names = ["weak", "strong"] if epoch else ["weak"]
        assert method.passes(Step(epoch, 5)).views == tuple(names)
        both = [[array("htc", f"logits_{view}_{head}", epoch, step) for head in ("head", "tail")] for view in names]
        batch = batch_of("htc", epoch, step, 5, [torch.cat(pair, dim=1) for pair in both])
        prepared(monkeypatch, imbalanced, *zip(f["mix_lambda"][epoch, step], f["mix_perm"][epoch, step]))
        outputs = method._outputs(batch)
        for k, head in enumerate(("head", "tail")[: 2 * bool(epoch)]):
            np.testing.assert_array_equal(outputs.selected[k], f[f"selected_{head}"][epoch, step])
        fused.zero_grad()
        loss = method.loss(outputs, batch.index, batch.step)["loss"]
        near(loss, f["loss"][epoch, step])
        loss.backward()
        for k, view in enumerate(batch.views):
            near(view.grad, f["grad_input_total"][epoch, step, k])
        near(fused.gate.weight.grad, f["grad_gate_weight"][epoch, step])
        near(fused.gate.bias.grad, f["grad_gate_bias"][epoch, step])
        with torch.no_grad():
            method.update(outputs, batch.index, batch.step)
        near(method.confidence, f["confidence"][epoch, step])
        if step == 3:
            tests = [array("htc", f"logits_test_{head}") for head in ("head", "tail")]
            judged = method.judged().backbone.fc
            near(torch.softmax(judged.fused(*tests, judged.prior), 1), f["test_head_tail_fused"][epoch, 2])
            method.finish_epoch(batch.step)
