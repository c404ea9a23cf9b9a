"""What methods of several labels an image promise beyond the numbers of public code."""

import dataclasses
import math
import typing

import numpy as np
import pytest
import torch
import torch.distributed as dist
from timm.loss import AsymmetricLossMultiLabel
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from coreg.errors import UserError
from coreg.learn.collective import my_rows
from coreg.learn.multi import METHODS
from coreg.learn.multi.best import BestEpoch
from coreg.learn.multi.method import MultiBatch
from coreg.learn.multi_options import NAMES, OFFICIAL, OPTIONS, Name
from coreg.learn.schedules import Step
from coreg.settings import JobConfig
from coreg.weak.multi import ObservedLabels
from coreg.weak.tag_evidence import softmax

N, L = 10, 4
INDEX = torch.tensor([3, 0, 9, 5, 4])
LARGE = {"large_share": 0.2}
# values at which every method does what it is for within two epochs
VALUES = {"ll_r": LARGE, "ll_ct": LARGE, "ll_cp": LARGE, "em_apl": {"pseudo_after": 1}, "vlpl": {"absent_weight": 0.3}}


class Net(nn.Module):
    """Logits from three numbers an image, and features nobody needs."""

    def __init__(self, labels=L):
        super().__init__()
        self.head = nn.Linear(3, labels)

    def forward(self, images):
        return self.head(images.flatten(1)), None


def weak(seed=0, labels=L, negatives=True):
    generator = np.random.default_rng(seed)
    truth = np.where(generator.random((N, labels)) < 0.4, 1, -1).astype(np.int8)
    states = [0, 1, -1] if negatives else [0, 1]
    table = generator.choice(states, size=truth.shape, p=[0.6, 0.2, 0.2] if negatives else [0.7, 0.3]).astype(np.int8)
    evidence = softmax(generator.random(truth.shape) * 0.1 / 0.03)
    return ObservedLabels(table, np.arange(N), truth, {}, evidence)


def build(name, observed=None, seed=0, labels=L, **options):
    torch.manual_seed(seed)
    values = VALUES.get(name, {}) | options
    options = OPTIONS[name](method=name, **values)
    return METHODS[name](Net(labels).double(), observed or weak(labels=labels), options, seed=seed, dtype=torch.float64)


def images(seed=1, rows=5):
    return torch.randn(rows, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cells(name, logits, observed, **options):
    """The method's loss of logits (n, L) that are in order those of images 0 ... n-1."""
    table = np.zeros((len(logits), len(logits[0])), dtype=np.int8)
    table[:] = observed
    method = build(name, ObservedLabels(table, np.arange(len(table)), table, {}), labels=table.shape[1], **options)
    return method.loss(torch.tensor(logits, dtype=torch.float64), torch.arange(len(table)), Step(0, 1))["loss"].item()


def nl(x):
    return -math.log(x + 1e-5)


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


# ---- all of them ----------------------------------------------------------------------------------------------------


def test_names_options_and_authors_values_belong_together():
    assert set(METHODS) == set(typing.get_args(Name)) == set(OFFICIAL) == set(NAMES) == set(OPTIONS)
    shared = {field.name for field in dataclasses.fields(JobConfig)}
    for name, by_set in OFFICIAL.items():
        own = {field.name for field in dataclasses.fields(OPTIONS[name])}
        assert list(by_set) == ["voc", "coco", "nuswide", "cub"]
        for values in by_set.values():
            assert set(values) <= shared | own
            assert values["lr"] == values["lr_floor"] and values["epochs"] == 10 and values["weight_decay"] == 0


def train(method, steps, epochs=3, start=0):
    """Steps of all batches of two, and the ends of epochs; gives the losses."""
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    losses = []
    for number in range(start, start + steps):
        epoch, place = divmod(number, N // 5)
        index = torch.arange(N)[5 * place : 5 * place + 5]
        parts = method(MultiBatch(index, Step(epoch, epochs), images(number)))
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append(parts["loss"].item())
        if place == N // 5 - 1:
            now = Step(epoch, epochs)
            logits = method.net(images(99, N))[0].detach() if method.reads_all(now) else None
            method.finish_epoch(now, logits)
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_a_training_that_goes_on_from_a_checkpoint_is_the_same(name):
    """Tables are in the checkpoint; what comes from the data is not, and is there again."""
    whole, first = build(name), build(name)
    expected = train(whole, 6)
    begun = train(first, 3)
    again = build(name, seed=7)
    again.load_state_dict(first.state_dict())
    assert begun + train(again, 3, start=3) == expected
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert all(np.isfinite(expected))
    tables = {key for key in whole.state_dict() if not key.startswith("net.")}
    assert tables == {"em_apl": {"soft"}, "ll_cp": {"observed"}, "role": {"estimate"}}.get(name, set())


@pytest.mark.parametrize("name", METHODS)
def test_degenerate_labels_and_logits_train(name):
    """Nothing observed, everything observed, one label alone; p that is 0 or 1 in float32."""
    for labels, state in ((4, 0), (4, 1), (4, -1), (1, 0), (1, 1)):
        table = np.full((N, labels), state, dtype=np.int8)
        observed = ObservedLabels(table, np.arange(N), table, {}, np.full(table.shape, 0.2))
        method = build(name, observed, labels=labels).float()
        for epoch in range(2):
            logits = torch.linspace(-200, 200, len(INDEX) * labels).reshape(-1, labels).requires_grad_()
            now = Step(epoch, 3)
            method.loss(logits, INDEX, now)["loss"].backward()
            assert logits.grad.isfinite().all()
            with torch.no_grad():
                method.update(logits, INDEX, now)
            method.finish_epoch(now, torch.zeros(N, labels) if method.reads_all(now) else None)


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("role", "epr", "pr", "wan", "vlpl", "soft", "l1r", "l2r")]
)
def test_a_loss_is_a_mean_over_cells(name):
    """Labels that are there twice change nothing, where libraries' sums over the labels would double."""
    logits = [[0.3, -2.0, 1.5], [2.5, 0.1, -0.7]]
    observed = [[1, 0, 0], [0, 0, 1]]
    once = cells(name, logits, observed)
    assert once == pytest.approx(cells(name, [row * 2 for row in logits], [row * 2 for row in observed]), abs=1e-12)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("pr", "ll_r", "ll_ct", "ll_cp", "focal", "asl")])
def test_an_absent_label_that_is_observed_counts_fully(name):
    """In methods that weigh or leave out what is unknown, it is not taken for that."""
    difference = cells_with_evidence(name, -1, 0.7) - cells_with_evidence(name, -1, -0.4)
    smoothing = 0.1 if name in ("an_ls", "bce_ls") else 0.0
    expected = (1 - smoothing) * (nl(sigmoid(-0.7)) - nl(sigmoid(0.4)))
    expected += smoothing * (nl(sigmoid(0.7)) - nl(sigmoid(-0.4)))
    if name in ("role", "epr"):
        p, q = (sigmoid(z) + sigmoid(0.2) for z in (0.7, -0.4))
        count = 2 * ((p - 1.5) ** 2 - (q - 1.5) ** 2) / 4
        expected += count
    if name == "role":
        # half of that, and half of the agreement with the table, of p = 0.005
        expected /= 2
        soft = [0.005 * nl(sigmoid(z)) + 0.995 * nl(sigmoid(-z)) for z in (0.7, -0.4)]
        reverse = [sigmoid(z) * nl(0.005) + sigmoid(-z) * nl(0.995) for z in (0.7, -0.4)]
        expected += (soft[0] - soft[1] + reverse[0] - reverse[1]) / 2
    assert 2 * difference == pytest.approx(expected, abs=1e-9)


def cells_with_evidence(name, state, logit):
    """One image of two labels, the first observed to be in a state, the second unknown with the logit 0.2."""
    table = np.array([[state, 0]], dtype=np.int8)
    observed = ObservedLabels(table, np.arange(1), table, {}, np.array([[0.9, 0.1]]))
    method = build(name, observed, labels=2)
    logits = torch.tensor([[logit, 0.2]], dtype=torch.float64)
    return method.loss(logits, torch.arange(1), Step(0, 3))["loss"].item()


def test_half_precision_logits_are_widened():
    method = build("an").float()
    logits = torch.tensor([[9.0, -9.0, 3.0, 1.0]])
    index = torch.tensor([2])
    exact = method.loss(logits, index, Step(0, 1))["loss"]
    assert method.loss(logits.bfloat16(), index, Step(0, 1))["loss"].dtype == torch.float32
    torch.testing.assert_close(method.loss(logits.bfloat16(), index, Step(0, 1))["loss"], exact)


# ---- formulas without public code -----------------------------------------------------------------------------------


def test_n_ls_smooths_unknown_labels_alone():
    p, q = sigmoid(0.8), sigmoid(-1.1)
    expected = (nl(p) + 0.9 * nl(1 - q) + 0.1 * nl(q)) / 2
    assert cells("n_ls", [[0.8, -1.1]], [[1, 0]]) == pytest.approx(expected, abs=1e-12)
    assert cells("an_ls", [[0.8, -1.1]], [[1, 0]]) == pytest.approx(expected + 0.1 * (nl(1 - p) - nl(p)) / 2, abs=1e-12)


def test_entmin_is_em_with_the_other_sign():
    p, q = sigmoid(0.8), sigmoid(-1.1)
    entropy = q * nl(q) + (1 - q) * nl(1 - q)
    for name, sign in (("entmin", 1), ("em", -1)):
        expected = (nl(p) + sign * 0.3 * entropy) / 2
        assert cells(name, [[0.8, -1.1]], [[1, 0]], entropy_weight=0.3) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("name", "power"), [("l1r", 1), ("l2r", 2)])
def test_penalties_are_sums_over_what_is_trained(name, power):
    method, plain = build(name, penalty=0.01), build("an")
    method.net.head.bias.requires_grad_(False)
    logits, now = torch.zeros(len(INDEX), L, dtype=torch.float64), Step(0, 1)
    extra = method.loss(logits, INDEX, now)["loss"] - plain.loss(logits, INDEX, now)["loss"]
    assert extra.item() == pytest.approx(0.01 * (method.net.head.weight.abs() ** power).sum().item(), abs=1e-12)


def test_focal_and_asymmetric_losses_are_those_of_libraries():
    logits, observed = torch.randn(6, 5, dtype=torch.float64), np.random.default_rng(0).integers(0, 2, (6, 5))
    target = torch.from_numpy(observed).double()
    expected = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2, reduction="mean")
    assert cells("focal", logits.tolist(), observed) == pytest.approx(expected.item(), abs=1e-12)
    # timm sums over the labels, and over images or not by version: one at a time
    asymmetric = AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0.05)
    expected = sum(asymmetric(*pair) for pair in zip(logits.split(1), target.split(1))) / logits.numel()
    assert cells("asl", logits.tolist(), observed) == pytest.approx(expected.item(), rel=1e-6)


# ---- EM+APL ---------------------------------------------------------------------------------------------------------


def test_pseudo_labels_wait_for_their_epoch_and_never_divide_by_nothing():
    method = build("em_apl", pseudo_after=3)
    assert [method.reads_all(Step(epoch, 5)) for epoch in range(5)] == [False, False, True, True, True]
    # trained for no longer than that: there is no round to share labels out over
    assert not any(method.reads_all(Step(epoch, epochs)) for epochs in (2, 3) for epoch in range(epochs))


def test_the_least_probable_unknown_labels_become_absent_once():
    table = np.zeros((N, 1), dtype=np.int8)
    table[0], table[1] = 1, -1
    method = build("em_apl", ObservedLabels(table, np.arange(N), table, {}), labels=1, pseudo_after=1, pseudo_share=0.5)
    logits = torch.arange(N, dtype=torch.float64)[:, None] - 5
    method.finish_epoch(Step(0, 3), logits)
    # 0.5 of 8 unknown ones in two rounds: two a round, and the observed ones are none of them
    assert (method.soft >= 0).flatten().nonzero().flatten().tolist() == [2, 3]
    assert method.soft[2].item() == pytest.approx(sigmoid(-3))
    method.finish_epoch(Step(1, 3), -logits)
    assert (method.soft >= 0).flatten().nonzero().flatten().tolist() == [2, 3, 8, 9]
    assert method.soft[2].item() == pytest.approx(sigmoid(-3))


# ---- ROLE -----------------------------------------------------------------------------------------------------------


def test_roles_table_begins_the_same_for_a_seed():
    first, again, other = build("role", seed=1), build("role", seed=1), build("role", seed=2)
    assert torch.equal(first.estimate, again.estimate) and not torch.equal(first.estimate, other.estimate)
    p = torch.sigmoid(first.estimate.detach())
    unknown = first.observed == 0
    assert ((p[unknown] >= 0.4) & (p[unknown] <= 0.6)).all()
    torch.testing.assert_close(p[first.observed == 1], torch.full_like(p[first.observed == 1], 0.995))


# ---- VLPL -----------------------------------------------------------------------------------------------------------

VLPL = {"temperature": 0.05, "suggestion_threshold": 0.3, "absent_share": 0.4, "absent_weight": 0.25, "entropy_weight": 0.2}
SIMILARITY = np.array([[0.5, 0.45, 0.1, 0.3, 0.0], [0.1, 0.2, 0.9, 0.3, 0.4]])
OBSERVED = np.array([[1, 0, 0, 0, 0], [0, 0, -1, 0, 0]], dtype=np.int8)
LOGITS = [[0.3, -0.4, 1.2, 0.9, -2.0], [12.0, -14.0, 0.5, 2.2, -0.1]]


def vlpl(logits=LOGITS, similarity=SIMILARITY, observed=OBSERVED, **options):
    evidence = softmax(similarity / VLPL["temperature"])
    weak_labels = ObservedLabels(observed, np.arange(len(observed)), observed, {}, evidence)
    method = build("vlpl", weak_labels, labels=observed.shape[1], **VLPL | options)
    return method, torch.tensor(logits, dtype=torch.float64, requires_grad=True)


def vlpl_by_hand(focal):
    total = 0.0
    for row in range(2):
        odds = [math.exp(value / 0.05) for value in SIMILARITY[row]]
        smallest = sorted(range(5), key=lambda label: SIMILARITY[row][label])[:2]
        for label in range(5):
            p, seen = sigmoid(LOGITS[row][label]), OBSERVED[row][label]
            entropy = p * nl(p) + (1 - p) * nl(1 - p)
            present, absent = odds[label] / sum(odds) > 0.3, label in smallest
            if seen == 1 or (seen == 0 and present):
                plain = nl(p) if seen == 1 else 0.7 * (0.9 * nl(p) + 0.1 * nl(1 - p))
                total += (1 - p) ** 2 * nl(p) if focal else plain
            elif seen == -1 or absent:
                plain = nl(1 - p) if seen == -1 else 0.25 * (0.1 * nl(p) + 0.9 * nl(1 - p))
                total += p**4 * nl(1 - p) if focal else plain
            else:
                total -= (1 - p) ** 4 * entropy if focal else 0.2 * entropy
    return total / 10


@pytest.mark.parametrize("focal", [False, True])
def test_vlpl_by_hand(focal):
    method, logits = vlpl(focal=focal)
    assert sorted(set(method.suggested.flatten().tolist())) == [-1, 0, 1]
    loss = method.loss(logits, torch.arange(2), Step(0, 1))["loss"]
    assert loss.item() == pytest.approx(vlpl_by_hand(focal), abs=1e-12)


def gradient_at(p, similarity, **options):
    """d loss / d logit of an unknown label at probability p, beside another; the loss is a mean over two cells."""
    z = math.log(p / (1 - p))
    method, logits = vlpl([[z, 0.0]], np.array([similarity]), np.zeros((1, 2), dtype=np.int8), absent_share=0.0, **options)
    method.loss(logits, torch.arange(1), Step(0, 1))["loss"].backward()
    return logits.grad[0, 0].item()


def test_the_sign_of_the_smoothed_term_is_that_of_the_code():
    """What is suggested is drawn up to 0.9; with the sign of the paper's eq. 4 to 6 it would be pushed away from there."""
    suggested = [0.9, 0.0]
    assert gradient_at(0.5, suggested) < 0 and gradient_at(0.8, suggested) < 0 and gradient_at(0.95, suggested) > 0
    assert gradient_at(0.9, suggested) == pytest.approx(0, abs=1e-5)
    # without smoothing: up to 1
    assert gradient_at(0.95, suggested, smoothing=0.0) < 0


def test_unknown_labels_are_drawn_to_a_half():
    neither = [0.0, 0.9]
    assert gradient_at(0.2, neither) < 0 < gradient_at(0.8, neither)
    assert gradient_at(0.5, neither) == pytest.approx(0, abs=1e-6)


def test_absent_suggestions_count_nothing_by_default():
    """As published: the public code has the term commented out."""
    method, logits = vlpl(absent_weight=OPTIONS["vlpl"]().absent_weight)
    method.loss(logits, torch.arange(2), Step(0, 1))["loss"].backward()
    absent = (method.suggested == -1) & (method.observed == 0)
    assert absent.any() and not logits.grad[absent].any()


def test_what_is_observed_is_not_doubted():
    """An observed label counts the same whatever the annotator suggests."""
    losses = set()
    for first in (0.0, 0.9):
        method, logits = vlpl([[0.3, 0.1]], np.array([[first, 0.5]]), np.array([[-1, 1]], dtype=np.int8))
        losses.add(method.loss(logits, torch.arange(1), Step(0, 1))["loss"].item())
    assert len(losses) == 1


def test_authors_temperatures_are_those_of_the_paper():
    """The public code takes 0.01 and 0.3 for every data set unless it is given others."""
    taken = {name: (values["temperature"], values["suggestion_threshold"]) for name, values in OFFICIAL["vlpl"].items()}
    assert taken == {"voc": (0.03, 0.3), "coco": (0.01, 0.3), "nuswide": (0.03, 0.1), "cub": (0.03, 0.01)}


def test_vlpl_needs_an_annotator():
    with pytest.raises(UserError, match="--method vlpl needs an annotator's evidence"):
        build("vlpl", dataclasses.replace(weak(), evidence=None))


# ---- soft targets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evidence", ["tiles", "ccd", "piaa"])
def test_soft_targets_by_hand(evidence):
    given = np.array([[0.7, 0.2, 0.1], [0.5, 0.1, 0.4], [0.2, 0.2, 0.6]])
    observed = np.array([[0, 1, 0], [0, 0, -1], [0, 0, 0]], dtype=np.int8)
    logits = [[0.3, -0.4, 1.2], [2.0, -1.0, 0.5], [0.1, 0.2, 0.3]]
    # of the first label, the first in two images; nobody's first is the second
    bias = [0.6, 1.0, 0.6] if evidence == "piaa" else [1, 1, 1]
    total = 0.0
    for row in range(3):
        for label in range(3):
            p, target = sigmoid(logits[row][label]), min(given[row][label] / bias[label], 1)
            target = {1: 1, -1: 0, 0: target}[observed[row][label]]
            total += target * nl(p) + (1 - target) * nl(1 - p)
    weak_labels = ObservedLabels(observed, np.arange(3), observed, {}, given)
    method = build("soft", weak_labels, labels=3, evidence=evidence)
    loss = method.loss(torch.tensor(logits, dtype=torch.float64), torch.arange(3), Step(0, 1))["loss"]
    assert loss.item() == pytest.approx(total / 9, abs=1e-12)


# ---- the best epoch -------------------------------------------------------------------------------------------------


def test_the_last_of_the_best_epochs_is_kept_and_goes_on_from_a_checkpoint():
    net, seen = Net().double(), {}
    best = BestEpoch(net)
    for epoch, score in enumerate([0.25, 0.5, 0.5, 0.499999999, 0.3], start=1):
        with torch.no_grad():
            net.head.weight.fill_(epoch)
        best.consider(net, score, epoch)
        seen[epoch] = net.head.weight.clone()
        if epoch == 3:  # a job that was stopped here
            again = BestEpoch(net)
            again.load_state_dict(best.state_dict())
            best = again
    assert best.restore(net) == 3
    assert torch.equal(net.head.weight, seen[3])


def test_without_a_better_one_the_network_stays():
    net = Net()
    before = net.head.weight.clone()
    assert BestEpoch(net).restore(net) == 0 and torch.equal(net.head.weight, before)


# ---- several processes ----------------------------------------------------------------------------------------------


def one_step(name):
    """Loss, gradients and tables after a step in the second epoch, of all processes together."""
    method, now = build(name), Step(1, 3)
    parts = method(MultiBatch(INDEX, now, my_rows(images())))
    parts["loss"].backward()
    gradients = [parameter.grad for parameter in method.parameters()]
    if dist.is_initialized():
        for value in [*parts.values(), *gradients]:
            dist.all_reduce(value.detach())
    tables = [value for key, value in method.state_dict().items() if not key.startswith("net.") and key != "estimate"]
    return [value.detach() for value in [*parts.values(), *gradients, *tables]]


def of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save({name: one_step(name) for name in METHODS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.multiprocess
def test_two_processes_compute_what_one_does(tmp_path):
    """Of an odd number of images."""
    # to import everything twice more would take ten times as long; a process that has used a GPU cannot be forked
    start = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(of_two, (str(tmp_path),), nprocs=2, start_method=start)
    for rank in (0, 1):
        theirs = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name in METHODS:
            for ours, other in zip(one_step(name), theirs[name], strict=True):
                torch.testing.assert_close(ours, other, rtol=1e-12, atol=1e-12, msg=f"{name} on process {rank}")
