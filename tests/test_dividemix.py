"""Steps of DivideMix and of distillation against the methods written out in plain steps; two processes against one."""

import copy
import json

import pytest
import torch
from runs import final_state, on_two_processes, same_curves, script
from torch.nn import functional as F

from coreg.learn.coreg import CoRegBatch, WarmUpBatch
from coreg.learn.distill import DistillBatch, DistillLearner
from coreg.learn.dividemix import DivideMixLearner, uniformity_penalty
from coreg.learn.dividemix_options import DivideMixOptions
from coreg.nets.model import Model
from coreg.nets.preact import PreActResNet

C = 4


def small_net(seed):
    torch.manual_seed(seed)
    return Model(PreActResNet(C, 1, widths=(4, 8), depths=(1, 1), norm="none"), 1).double()


def learner(**options):
    made = DivideMixLearner(small_net(0), DivideMixOptions(**options))
    made.set_peer(small_net(1).eval())
    return made.train()


def batch(n_x=5, n_u=3, views="own", seed=7):
    """`views`: "own" trains on the weak views themselves, as the authors do, "strong" on others."""
    generator = torch.Generator().manual_seed(seed)

    def images(n):
        return torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64)

    x, u = (images(n_x), images(n_x)), (images(n_u), images(n_u))
    n = 2 * n_x + 2 * n_u
    trained = torch.cat([*x, *u]) if views == "own" else images(n)
    order = torch.randperm(n, generator=generator)
    return CoRegBatch(
        x_weak=x,
        u_weak=u,
        strong=trained,
        partners=trained[order],
        position=torch.arange(n),
        partner_position=order,
        x_targets=F.one_hot(torch.randint(0, C, (n_x,), generator=generator), C).double(),
        x_weight=torch.rand(n_x, generator=generator, dtype=torch.float64),
        n_x=n_x,
        n_u=n_u,
        share_kept=0.7,
        ramp=0.5,
        gate=False,
        fill_queue=False,
    )


def step_by_hand(made, b):
    """Li et al., eq. 4-12, image by image."""
    o = made.options

    def p(network, image):
        return network(image[None])[0][0].softmax(0).detach()

    def sharp(q):
        return q ** (1 / o.temperature) / (q ** (1 / o.temperature)).sum()

    refined, guessed = [], []
    for i in range(b.n_x):
        mean = (p(made.net, b.x_weak[0][i]) + p(made.net, b.x_weak[1][i])) / 2
        refined.append(sharp(b.x_weight[i] * b.x_targets[i] + (1 - b.x_weight[i]) * mean))
    for i in range(b.n_u):
        guessed.append(sharp(sum(p(net, view[i]) for net in (made.net, made._peer[0]) for view in b.u_weak) / 4))
    targets = refined + refined + guessed + guessed
    trusted = distrusted = 0.0
    predictions = []
    for r in range(len(targets)):
        partner, lam = int(b.partner_position[r]), b.share_kept
        f = made.net((lam * b.strong[r] + (1 - lam) * b.strong[partner])[None])[0][0].softmax(0)
        y = lam * targets[r] + (1 - lam) * targets[partner]
        predictions.append(f)
        if r < 2 * b.n_x:
            trusted = trusted - (y * f.log()).sum() / (2 * b.n_x)
        else:
            distrusted = distrusted + ((f - y) ** 2).sum() / C / (2 * b.n_u)
    mean = sum(predictions) / len(predictions)
    penalty = sum(torch.log(1 / C / mean[c]) / C for c in range(C))
    return trusted + o.lambda_u * b.ramp * distrusted + o.penalty_weight * penalty


@pytest.mark.parametrize(("n_x", "n_u"), [(5, 3), (1, 4), (4, 0)])
@pytest.mark.parametrize("views", ["own", "strong"])
def test_a_step_is_the_method_written_out(n_x, n_u, views):
    made = learner(lambda_u=3.0, penalty_weight=0.6, temperature=0.4)
    twin, b = copy.deepcopy(made), batch(n_x, n_u, views)
    twin.set_peer(small_net(1).eval())
    parts, expected = made(b), step_by_hand(twin, b)
    torch.testing.assert_close(parts["loss"], expected, rtol=1e-10, atol=1e-12)
    assert set(parts) == {"loss", "trusted", "distrusted", "penalty"} and not parts["trusted"].requires_grad
    parts["loss"].backward()
    expected.backward()
    for (name, ours), theirs in zip(made.net.named_parameters(), twin.net.parameters()):
        if "projector" in name:
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11, msg=name)
    assert all(p.grad is None for p in made._peer[0].parameters())


def test_labels_of_a_person_add_a_supervised_term():
    made, plain = learner(), batch()
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    classes = torch.tensor([2, 0, 1])
    with_labels = copy.copy(plain)
    with_labels.labelled, with_labels.n_labelled = (images, classes), 3
    extra = F.cross_entropy(made.net(images)[0], classes)
    torch.testing.assert_close(made(with_labels)["loss"], made(plain)["loss"] + extra)


def test_warm_up_is_cross_entropy_plus_negative_entropy():
    made = learner(entropy_weight=0.3)
    images, classes = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2, 0])
    logits = made.net(images)[0]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    expected = F.cross_entropy(logits, classes) - 0.3 * entropy
    parts = made(WarmUpBatch(images, F.one_hot(classes, C).bool(), size=6, n_informative=6))
    torch.testing.assert_close(parts["loss"], expected)


def test_the_penalty_is_the_divergence_of_the_mean_from_uniform():
    mean = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(uniformity_penalty(mean), F.kl_div(mean.log(), uniform, reduction="sum"))
    assert abs(uniformity_penalty(uniform)) < 1e-12
    # a class that nobody predicts costs much, but no infinity
    assert 10 < uniformity_penalty(torch.tensor([1.0, 0.0])) < 100


def test_the_peer_is_no_part_of_the_learner():
    assert {name.split(".")[0] for name, _ in learner().named_parameters()} == {"net"}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_the_divergence_of_softened_distributions(temperature):
    made = DistillLearner(small_net(0), temperature)
    images, teacher_logits = torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.randn(5, C, dtype=torch.float64)
    parts = made(DistillBatch(images, teacher_logits.softmax(1), size=5))
    student = F.log_softmax(made.net(images)[0] / temperature, 1)
    expected = temperature**2 * F.kl_div(student, F.softmax(teacher_logits / temperature, 1), reduction="batchmean")
    torch.testing.assert_close(parts["loss"], expected)
    torch.testing.assert_close(parts["divergence"] * temperature**2, expected.detach())


def test_a_teacher_that_is_sure_gives_cross_entropy():
    made = DistillLearner(small_net(0), 1.0)
    images, classes = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 0, 3])
    parts = made(DistillBatch(images, F.one_hot(classes, C).double(), size=3))
    torch.testing.assert_close(parts["loss"], F.cross_entropy(made.net(images)[0], classes))
    parts["loss"].backward()
    assert all(p.grad.isfinite().all() for p in made.net.backbone.parameters())


# ---- two processes ---------------------------------------------------------------------------------------------------

SMALL = [
    "--recipe", "digits", "--refine", "none",
    "--dtype", "float64", "--channels", "3", "--image_size", "12", "--backbone_args",
    '{"norm": "group", "widths": [8, 16], "depths": [1, 1]}', "--epochs", "3", "--batch_size", "13", "--workers", "0",
]  # fmt: skip


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("dividemix", ("--warmup_epochs", "1", "--train_view", "weak", "--labels_from", "single", "--tables", "sharded")),
        pytest.param("dividemix", ("--warmup_epochs", "1", "--train_view", "weak"), marks=pytest.mark.slow),
        pytest.param("distill", ("--kd_temperature", "2", "--view", "strong"), marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_like_one(small_annotated, tmp_path, name, more):
    options = ["--annotations", str(small_annotated), *SMALL, *more]
    script(name).main([*options, "--output_dir", str(tmp_path / "1")])
    on_two_processes(script(name).main, *options, "--output_dir", tmp_path / "2")
    alone, both = final_state(tmp_path / "1"), final_state(tmp_path / "2")
    assert len(alone["learners"]) == len(both["learners"]) == (2 if name == "dividemix" else 1)
    for ours, theirs in zip(alone["learners"], both["learners"]):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert (ours[key] - theirs[key]).abs().max() <= 1e-10 * ours[key].abs().max().clamp_min(1e-3), key
    for key in ("losses", "weights") if name == "dividemix" else ():
        for ours, theirs in zip(alone["divisions"][key], both["divisions"][key]):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    same_curves(alone, both)
    assert json.loads((tmp_path / "2" / "report.json").read_text())["processes"] == 2
