"""Candidate sets: generators against their procedures image by image and against closed forms; stores of what they drew."""

import dataclasses
import datetime
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import as_votes, refused, write_store
from safetensors.torch import save, save_file

from coreg.annotate.tools import main as tool
from coreg.data.images import ImageList
from coreg.errors import UserError
from coreg.store.store import AnnotationStore, StoreWriter
from coreg.weak import __main__ as command
from coreg.weak import noise
from coreg.weak.__main__ import main
from coreg.weak.labels import WeakLabels
from coreg.weak.long_tail import long_tail, tail_counts
from coreg.weak.noise import flip, hierarchical, instance, noise_report, pico, uniform, uniforms, uss
from coreg.weak.people import aggregate, plain_pickle, read_people, vaguest, validation_rows
from coreg.weak.rules import candidate_sets

REFERENCE = Path(__file__).parent / "reference"
LABELS = np.random.default_rng(5).integers(0, 7, 60)
SUPERCLASS_OF = np.array([0, 0, 0, 1, 1, 2, 1])  # class 5 is alone in its super-class


def draws(seed, step, n, columns):
    return uniforms(seed, step, np.arange(n), columns).tolist()


def exchange(candidates, label, u, v, eta, allowed):
    """Step 2 of the flip procedure for one image: a set of classes in, a set out."""
    outside = [j for j in allowed if j not in candidates]
    if eta > 0 and u <= eta and outside:
        return candidates - {label} | {outside[int(v * len(outside))]}
    return candidates


def as_matrix(sets, n_classes):
    return np.array([[j in chosen for j in range(n_classes)] for chosen in sets])


def flip_by_loop(labels, n_classes, q, eta, seed, superclass_of=None):
    first, second = draws(seed, "sets", len(labels), n_classes), draws(seed, "noise", len(labels), 2)
    sets = []
    for i, label in enumerate(labels.tolist()):
        allowed = [j for j in range(n_classes) if superclass_of is None or superclass_of[j] == superclass_of[label]]
        chosen = {label}
        for j in allowed:
            if j != label and first[i][j] < q:
                chosen.add(j)
        sets.append(exchange(chosen, label, *second[i], eta, allowed))
    return as_matrix(sets, n_classes)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_flip_is_the_procedure_image_by_image(q, eta):
    for n_classes in (7, 12):
        expected = flip_by_loop(LABELS, n_classes, q, eta, 3)
        drawn = flip(LABELS, n_classes, q, eta, 3)
        assert drawn.dtype == bool and (drawn == expected).all() and drawn.any(axis=1).all()
    related = hierarchical(LABELS, SUPERCLASS_OF, q, eta, 3)
    assert (related == flip_by_loop(LABELS, 7, q, eta, 3, SUPERCLASS_OF)).all()


@pytest.mark.parametrize(("q", "eta"), [(0.0, 0.3), (0.1, 0.0), (0.1, 0.5), (0.3, 1.0)])
def test_pico_draws_whole_sets_again_until_they_are_not_empty(q, eta):
    rounds = [draws(1, f"round {number}", len(LABELS), 7) for number in range(60)]
    sets = []
    for i, label in enumerate(LABELS.tolist()):
        tries = ({j for j in range(7) if u[i][j] < (1 - eta if j == label else q)} for u in rounds)
        sets.append(next(chosen for chosen in tries if chosen))
    assert (pico(LABELS, 7, q, eta, 1) == as_matrix(sets, 7)).all()


@pytest.mark.parametrize("eta", [0.0, 0.4])
def test_instance_follows_the_classifier_image_by_image(eta):
    probs = torch.randn(60, 7, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=1).double().numpy()
    probs[0] = np.eye(7)[LABELS[0]]  # certain of the truth: 0 / 0
    probs[1] = np.eye(7)[(LABELS[1] + 1) % 7]  # all on one wrong class: its ratio exceeds 1
    first, second = draws(2, "sets", 60, 7), draws(2, "noise", 60, 2)
    sets = []
    for i, label in enumerate(LABELS.tolist()):
        a = probs[i].copy()
        a[label] = 0
        with np.errstate(invalid="ignore"):
            r = a / a.max()
            r = np.nan_to_num(np.minimum(r * 0.4 / r.mean(), 1))
        chosen = {label} | {j for j in range(7) if first[i][j] < r[j]}
        sets.append(exchange(chosen, label, *second[i], eta, range(7)))
    drawn = instance(LABELS, probs, 0.4, eta, 2)
    assert (drawn == as_matrix(sets, 7)).all()
    if eta == 0:
        assert drawn[0].sum() == 1 and drawn[1].sum() == 2


def with_draws(monkeypatch, draw):
    """Let generators draw given numbers: `draw(step)` gives those of all images."""
    monkeypatch.setattr(noise, "uniforms", lambda seed, step, rows, columns: draw(step)[rows][:, :columns])


def test_fps_is_public_code_on_the_same_draws(monkeypatch):
    numbers = np.load(REFERENCE / "candidates_fps.npz")
    with_draws(monkeypatch, lambda step: {"sets": numbers["uniform"], "noise": np.zeros((40, 2))}[step])
    for q, name in zip(numbers["eta"], ("eta01", "eta04", "eta07")):
        assert (WeakLabels.from_truth(numbers["labels"], 7, "fps", 0, q=q).table == numbers[name]).all()


def test_instance_is_public_code_on_the_same_draws(monkeypatch):
    numbers = np.load(REFERENCE / "candidates_instance.npz")
    probs = np.exp(numbers["logits"]) / np.exp(numbers["logits"]).sum(axis=1, keepdims=True)
    with_draws(monkeypatch, lambda step: {"sets": numbers["uniform"], "noise": np.zeros((40, 2))}[step])
    for rho, name in zip(numbers["rate"], ("candidates_01", "candidates_04")):
        assert (instance(numbers["labels"], probs, rho, 0.0, 0) == numbers[name]).all()


def test_uss_is_corrected_public_code_on_the_same_draws(monkeypatch):
    numbers = np.load(REFERENCE / "candidates_uss.npz")
    with_draws(monkeypatch, lambda step: numbers["coin_uniform"][int(step.removeprefix("round "))])
    assert (uss(numbers["labels"], 7, 0) == numbers["candidates_coin"]).all()


@pytest.mark.parametrize("classes", [2, 4, 10, 64, 100])
def test_uss_has_the_sizes_of_equally_likely_sets(classes):
    labels = np.arange(20_000) % classes
    drawn = uss(labels, classes, 0)
    assert drawn[np.arange(20_000), labels].all() and not drawn.all(axis=1).any()
    sizes = drawn.sum(axis=1)
    if classes == 4:  # every set but the full one: 3 of one wrong class, 3 of two, 1 of none
        chances = np.load(REFERENCE / "candidates_uss.npz")["p_size_fixed_K4"]
        assert chances.tolist() == pytest.approx([1 / 7, 3 / 7, 3 / 7])
        assert all(within((sizes == size).mean(), chance, 20_000) for size, chance in enumerate(chances, start=1))
    expected = 1 + (classes - 1) * (2.0 ** (classes - 2) - 1) / (2.0 ** (classes - 1) - 1)
    assert within(sizes.mean(), expected, 20_000, spread=(classes - 1) / 4 + 1e-9)


def test_long_tails_are_those_of_the_literature():
    numbers = np.load(REFERENCE / "long_tail.npz")
    labels = numbers["labels"]
    for name, imbalance in (("imb100", 10), ("imb050", 20), ("imb010", 100)):
        chosen = long_tail(labels, 7, imbalance, 0)
        assert (chosen == numbers[f"{name}_indices"]).all() and (labels[chosen] == numbers[f"{name}_labels"]).all()
        assert (np.bincount(labels[chosen], minlength=7) == numbers[f"{name}_counts"]).all()
    for name in (name for name in numbers.files if name.startswith("cifar")):
        wanted, imbalance = numbers[name], float(name.split("_ir")[1].removesuffix("_counts"))
        # public code writes 1 / 150 as 0.0067
        counts = tail_counts(50_000, len(wanted), 1 / 0.0067 if imbalance == 150 else imbalance)
        assert (counts == wanted).all(), name
    assert (long_tail(labels, 7, 10, 1) != long_tail(labels, 7, 10, 0)).any()
    few = np.repeat([0, 1], [2, 10])  # no more of the first than there are
    assert long_tail(few, 2, 1.5, 0).tolist()[:2] in ([0, 1], [1, 0]) and len(long_tail(few, 2, 1.5, 0)) == 2 + 4


def within(share, expected, n, spread=0.25):
    """Whether a mean over n draws lies within five standard errors of what is expected; spread = variance of a draw."""
    return abs(share - expected) < 5 * (spread / n) ** 0.5


@pytest.mark.parametrize(("q", "size"), [(0.01, 1.99), (0.03, 3.97), (0.05, 5.95)])
def test_flip_has_the_published_sizes_and_noise(q, size):
    labels = np.arange(20_000) % 100
    report = noise_report(flip(labels, 100, q, 0.2, 0), labels)
    assert within(report.mean_candidates, size, 20_000, spread=99 * q)
    assert within(report.eta, 0.2, 20_000, spread=0.16)
    assert report.wrong == pytest.approx(report.q + report.eta / 99)
    assert within(report.single, (1 - q) ** 99, 20_000)


@pytest.mark.parametrize(
    ("classes", "q", "eta", "effective"),
    [(100, 0.01, 0.2, 0.136), (100, 0.03, 0.2, 0.192), (100, 0.05, 0.2, 0.199), (10, 0.1, 0.2, 0.133)],
)
def test_pico_is_less_noisy_than_its_eta(classes, q, eta, effective):
    labels = np.arange(20_000) % classes
    report = noise_report(pico(labels, classes, q, eta, 0), labels)
    exact = 1 - (1 - eta) / (1 - eta * (1 - q) ** (classes - 1))
    assert exact == pytest.approx(effective, abs=6e-4)
    assert within(report.eta, exact, 20_000)


def test_other_rules_have_the_expected_sizes():
    labels = np.arange(20_000) % 10
    clean = noise_report(uniform(labels, 10, 0.5, 0), labels)
    assert clean.partial_accuracy == 1 and within(clean.mean_candidates, 5.5, 20_000, spread=9 / 4)
    assert (uniform(labels, 10, 0.3, 0) == flip(labels, 10, 0.3, 0.0, 0)).all()
    supers = np.arange(10) // 5
    related = hierarchical(labels, supers, 0.5, 0.3, 0)
    assert not related[supers[labels][:, None] != supers].any()
    assert within(noise_report(related, labels).mean_candidates, 1 + 4 * 0.5, 20_000, spread=1)
    # a set of all 5 relatives keeps its truth
    assert within(noise_report(related, labels).eta, 0.3 * (1 - 0.5**4), 20_000)
    even = np.full((20_000, 10), 0.1)  # nothing to cut off: 1 + rho C, the mean being over all C
    assert within(noise_report(instance(labels, even, 0.4, 0.0, 0), labels).mean_candidates, 5.0, 20_000, spread=9 / 4)


def test_every_wrong_class_takes_the_truths_place_equally_often():
    labels = np.zeros(20_000, dtype=np.int64)
    taken = flip(labels, 5, 0.0, 1.0, 4).mean(axis=0)
    assert taken[0] == 0 and all(within(share, 0.25, 20_000) for share in taken[1:])


def test_degenerate_cases():
    labels = np.arange(50) % 2
    truth = labels[:, None] == np.arange(2)
    assert (flip(labels, 2, 0.0, 0.0, 0) == truth).all()
    assert (flip(labels, 2, 0.0, 1.0, 0) == ~truth).all()
    assert flip(labels, 2, 1.0, 1.0, 0).all()  # full sets cannot lose their truth
    assert pico(labels, 2, 1.0, 0.0, 0).all()
    assert (pico(labels, 2, 1.0, 1.0, 0) == ~truth).all()
    assert (pico(labels, 2, 0.0, 0.9, 0) == truth).all()  # all that is left after drawing again
    assert flip(labels[:0], 2, 0.5, 0.5, 0).shape == (0, 2)
    alone = hierarchical(labels, np.arange(2), 1.0, 1.0, 0)
    assert (alone == truth).all()


def test_a_draw_of_exactly_eta_counts_but_not_for_no_noise(monkeypatch):
    monkeypatch.setattr(noise, "uniforms", lambda seed, step, rows, columns: np.full((len(rows), columns), 0.25))
    labels = np.array([0, 1])
    assert (flip(labels, 3, 0.25, 0.25, 0) == [[0, 1, 0], [1, 0, 0]]).all()  # u < q is strict, u <= eta is not
    assert (flip(labels, 3, 0.26, 0.24, 0)).all()
    monkeypatch.setattr(noise, "uniforms", lambda seed, step, rows, columns: np.zeros((len(rows), columns)))
    assert (flip(labels, 3, 0.0, 0.0, 0) == [[1, 0, 0], [0, 1, 0]]).all()


def test_draws_belong_to_the_image_and_the_seed():
    labels = np.arange(100) % 10
    all_of_them = flip(labels, 10, 0.3, 0.3, 1)
    assert (flip(labels[:30], 10, 0.3, 0.3, 1) == all_of_them[:30]).all()
    assert (pico(labels[:30], 10, 0.05, 0.9, 1) == pico(labels, 10, 0.05, 0.9, 1)[:30]).all()
    assert (flip(labels, 10, 0.3, 0.3, 2) != all_of_them).any()


def test_the_report_counts_a_hand_made_case():
    candidates = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)
    report = noise_report(candidates, np.array([0, 0, 2, 2]))
    assert report.partial_accuracy == 0.75 and report.eta == 0.25 and report.mean_candidates == 7 / 4
    assert report.q == 0.375 and report.wrong == 4 / 8 and report.single == 0.5 and report.full == 0.25


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_shares_out_of_range_are_refused(wrong):
    for make in (
        lambda: flip(LABELS, 7, wrong, 0.1, 0),
        lambda: pico(LABELS, 7, 0.1, wrong, 0),
        lambda: uniform(LABELS, 7, wrong, 0),
        lambda: hierarchical(LABELS, SUPERCLASS_OF, wrong, 0.1, 0),
        lambda: instance(LABELS, np.full((60, 7), 1 / 7), wrong, 0.1, 0),
    ):
        with pytest.raises(UserError, match="from 0 to 1"):
            make()
    with pytest.raises(UserError, match="nearly every candidate set is empty"):
        pico(LABELS, 7, 0.0, 1.0, 0)
    with pytest.raises(ValueError, match=r"\[0, 6\)"):
        flip(LABELS, 6, 0.1, 0.1, 0)
    with pytest.raises(ValueError, match="at least 2"):
        flip(np.zeros(3, dtype=np.int64), 1, 0.1, 0.1, 0)


def test_the_images_that_are_held_out_for_validation_are_those_of_plench():
    """Keys shuffled as a list by numpy's legacy generator; the seeds are MD5 digests of "(0,)" and "(3,)" modulo 2^31."""
    for seed, hashed in ((0, 0x5C8A950061AA331153F4A172BBCBFD1B), (3, 0xD3395E15F605BC35AB1BAC6341A285E2)):
        keys = list(range(57))
        np.random.RandomState(hashed % 2**31).shuffle(keys)
        assert validation_rows(57, 0.1, seed).tolist() == keys[:5]
    assert validation_rows(9, 0.1, 0).tolist() == []


# ---- sets that people gave ------------------------------------------------------------------------------------------

GIVEN = {0: [[3, 5], [3], [4, 3]], 1: [[0], [6]], 2: [[2], [2, 6], [2, 1]]}


def test_sets_of_several_people_by_the_loops_of_their_authors():
    sets = list(GIVEN.values())
    union, largest = np.zeros((2, 3, 7), dtype=bool)
    for row, given in GIVEN.items():
        best = []
        for one in given:
            union[row, one] = True
            best = one if len(one) > len(best) else best
        largest[row, best] = True
    assert (aggregate(sets, 7) == union).all() and (vaguest(sets, 7) == largest).all()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_are_read_without_being_run(tmp_path, protocol):
    shared = [1, 2]  # written once, referred to afterwards
    values = GIVEN | {10**12: [shared, shared, list(range(300))], -3: [[], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]}
    plain = json.loads(json.dumps({str(key): value for key, value in values.items()}))
    read = plain_pickle(pickle.dumps(values, protocol))
    assert {str(key): value for key, value in read.items()} == plain
    (tmp_path / "plcifar10.pkl").write_bytes(pickle.dumps(GIVEN, protocol))
    assert read_people(str(tmp_path), 3, 7) == list(GIVEN.values())


class Runs:
    def __reduce__(self):
        return os.mkdir, ("it-was-run",)


@pytest.mark.parametrize("value", [Runs(), {0: Runs()}, datetime.date(2020, 1, 1), np.int64(3), {0: [["a"]]}, {0: [[1.5]]}])
def test_pickles_with_more_than_plain_values_are_refused_and_run_nothing(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 2, 4):
        Path("x.pkl").write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(UserError, match=r"cannot read candidate sets in x\.pkl: .*; give PLCIFAR10's") as raised:
            read_people("x.pkl", 1, 7)
        assert "\n" not in str(raised.value)
    assert not Path("it-was-run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no whole pickle"),
        (b"text", "no whole pickle"),
        (pickle.dumps(GIVEN)[:-8], "no whole pickle"),
        (b"\x80\x04\x85.", "no whole pickle"),  # a tuple of what is not there
        (b"\x80\x04a.", "no whole pickle"),
        (b"\x80\x04e.", "no whole pickle"),
        (b"\x80\x04h\x07.", "no whole pickle"),
        (b"\x80\x04]](.", "no whole pickle"),
        (pickle.dumps([1]), "expected an object"),
        (pickle.dumps({0: [3]}), "expected a list"),
        (pickle.dumps({0: [[7]]}), "from 0 to 6"),
        (pickle.dumps({0: [[-1]]}), "from 0 to 6"),
        (pickle.dumps({0: [[1]], 1: [[]], 2: [[1]]}), "image 1 has none"),
        (pickle.dumps({0: [[1]], 1: [[2]]}), "of 2 images, and there are 3 training images"),
        (pickle.dumps(GIVEN | {3: [[1]]}), "of 4 images"),
    ],
)
def test_damaged_or_other_files_of_people_are_one_line(tmp_path, content, words):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        read_people(str(tmp_path / "x.pkl"), 3, 7)
    assert "\n" not in str(raised.value)
    (tmp_path / "x.json").write_text(json.dumps(GIVEN))
    assert read_people(str(tmp_path / "x.json"), 3, 7) == list(GIVEN.values())
    with pytest.raises(UserError, match="No such file"):
        read_people(str(tmp_path / "no.pkl"), 3, 7)


# ---- weak labels ----------------------------------------------------------------------------------------------------


def evidence(tmp_path):
    """Three templates on six images of three classes; nobody names a class of the fourth, the last is a test image."""
    labels, split = np.array([0, 1, 2, 0, -1, 1]), np.array([0, 0, 0, 0, 0, 1])
    images = ImageList("x", [f"{i}.png" for i in range(6)], labels, split, None, None)
    votes = np.array([[0, 0, 1], [1, 1, 1], [0, -1, 1], [-1, -1, -1], [2, 1, 0], [1, 2, 1]], dtype=np.int16)
    tensors = {"votes": votes, "probs": np.full((6, 3), 1 / 3, dtype=np.float16)}
    return write_store(tmp_path / "ann", images, ["a", "b", "c"], ["1", "2", "3"], tensors)


def test_weak_labels_of_a_store_and_of_a_person(tmp_path):
    store, known = evidence(tmp_path), np.array([-1, -1, 2, -1, -1, -1])
    weak = WeakLabels.from_store(store, "union", known, np.array([4, 2, 3, 0, 0]))  # any rows, any number of times
    assert weak.table.tolist() == [[True] * 3, [False, False, True], [True] * 3, *[[True, True, False]] * 2]
    assert weak.certain.tolist() == [False, True, False, False, False] and weak.known.tolist() == [-1, 2, -1, -1, -1]
    assert weak.usable.tolist() == [True, True, False, True, True] and weak.truth.tolist() == [-1, 2, 0, 0, 0]
    assert weak.source == {"annotator": "m", "rule": "union", "store": store.hash}
    alone = WeakLabels.from_store(store, "votes:2")
    assert alone.table[:3].tolist() == [[True, False, False], [False, True, False], [True, False, False]]
    assert not alone.certain.any() and alone.samples.tolist() == list(range(6))
    assert alone.hash != WeakLabels.from_store(store).hash


def test_revealed_labels_are_certain_and_the_others_teach_nothing(tmp_path):
    weak = WeakLabels.from_store(evidence(tmp_path)).revealed()
    assert weak.known.tolist() == weak.truth.tolist() == [0, 1, 2, 0, -1, 1]
    assert weak.usable.tolist() == weak.certain.tolist() == [True] * 4 + [False, True]
    assert weak.table[4].all() and (weak.table.sum(axis=1) == [1, 1, 1, 1, 3, 1]).all()


def test_weak_labels_from_truth_are_those_of_the_generator_and_of_its_store(place, tmp_path):
    drawn = WeakLabels.from_truth(LABELS, 7, "flip", 3, q=0.3, eta=0.2)
    assert (drawn.table == flip(LABELS, 7, 0.3, 0.2, 3)).all() and (drawn.truth == LABELS).all() and drawn.usable.all()
    assert drawn.source == {"generator": "flip(q=0.3,eta=0.2,seed=3)"}
    related = WeakLabels.from_truth(LABELS, SUPERCLASS_OF, "hierarchical", 3, q=0.3, eta=0.2)
    assert (related.table == hierarchical(LABELS, SUPERCLASS_OF, 0.3, 0.2, 3)).all()
    main(arguments(place, tmp_path / "ann", "--q", "0.3", "--eta", "0.2", "--seed", "3"))
    store = AnnotationStore.open(tmp_path / "ann")
    again = WeakLabels.from_store(store)
    assert (again.table == WeakLabels.from_truth(store.labels, 4, "flip", 3, q=0.3, eta=0.2).table).all()
    assert again.source == {"generator": "flip(q=0.3,eta=0.2,seed=3)", "store": store.hash} and again.usable.all()


def test_weak_labels_are_read_back_as_they_were_or_not_at_all(tmp_path):
    weak, file = WeakLabels.from_truth(LABELS, 9, "flip", 3, q=0.3, eta=0.2), tmp_path / "weak_labels.safetensors"
    weak.save(file)
    read = WeakLabels.read(file)
    assert read.hash == weak.hash and read.source == weak.source and read.table.dtype == bool
    for name in ("table", "samples", "certain", "usable", "truth"):
        assert (getattr(read, name) == getattr(weak, name)).all()
    whole = file.read_bytes()
    for place in (0, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match="does not hold the weak labels of a run"):
            WeakLabels.read(file)
    for content in (b"", whole[:-1], save({"table": torch.zeros(2, 3)})):
        file.write_bytes(content)
        with pytest.raises(UserError, match="does not hold the weak labels of a run"):
            WeakLabels.read(file)
    file.unlink()
    with pytest.raises(UserError, match="does not hold"):
        WeakLabels.read(file)


# ---- the command ----------------------------------------------------------------------------------------------------

NAMES = ["red thing", "green thing", "blue thing", "odd thing"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of 40 labelled images, a quarter of them test, with lists beside it; the images are not even readable."""
    root = tmp_path_factory.mktemp("place")
    for number in range(40):
        folder = root / "photos" / ("test" if number % 4 == 0 else "train") / NAMES[number % 3].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.png").write_bytes(b"never decoded")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    (root / "supers.csv").write_text(
        "class,superclass\n" + "".join(f"{name},{'odd' if name[0] in 'bo' else 'even'}\n" for name in NAMES)
    )
    probs = torch.rand(40, 4, generator=torch.Generator().manual_seed(1))
    save_file({"probs": (probs / probs.sum(1, keepdim=True)).half()}, root / "p.safetensors")
    return root


def arguments(place, output, *more):
    return ["--images", str(place / "photos"), "--classes", str(place / "classes.txt"), "--output_dir", str(output), *more]


def truth_of(store):
    return np.array([NAMES.index(path.split("/")[1].replace("_", " ")) for path in store.paths])


def test_the_command_writes_the_generated_sets_as_a_store_without_templates(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "BLOCK_SIZE", 16)
    main(arguments(place, tmp_path / "my ann", "--q", "0.5", "--eta", "0.3", "--seed", "7"))
    store = AnnotationStore.open(tmp_path / "my ann")
    labels = truth_of(store)
    expected = flip(labels, 4, 0.5, 0.3, 7)
    assert (candidate_sets(store) == expected).all() and (store.labels == labels).all()
    assert (store.split == [path.startswith("test/") for path in store.paths]).all() and store.split.sum() == 10
    assert (store.probs() == (expected / expected.sum(axis=1, keepdims=True)).astype(np.float16)).all()
    assert store.probs().dtype == np.float16 and store.templates == []
    with pytest.raises(UserError, match="drawn from true labels"):
        store.votes()
    with pytest.raises(UserError, match="leave out --candidates"):
        candidate_sets(store, "topk:2")
    assert store.features() is None and store.manifest["model"]["spec"] == "synthetic:flip(q=0.5,eta=0.3,seed=7)"
    assert store.images().paths == store.paths
    text = capsys.readouterr().out
    for index, split in enumerate(("train", "test")):
        rows = store.split == index
        assert f"  {split:5} {noise_report(expected[rows], labels[rows])}" in text
    assert f"next: accelerate launch train_coreg.py --annotations '{tmp_path}/my ann'" in text


def test_a_store_of_made_up_votes_as_before_is_read_as_the_same_sets(place, tmp_path, capsys):
    """Up to version 2 each candidate was the vote of a template that nobody had."""
    main(arguments(place, tmp_path / "new", "--q", "0.5", "--eta", "0.3", "--seed", "7"))
    new = AnnotationStore.open(tmp_path / "new")
    as_votes(new.root, tmp_path / "old", new.manifest["model"]["spec"])
    manifest = json.loads((tmp_path / "old" / "manifest.json").read_text())
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
    old = AnnotationStore.open(tmp_path / "old")
    assert old.templates[0] == "synthetic candidate 1 ({})"
    assert (candidate_sets(old) == candidate_sets(new)).all() and (old.probs() == new.probs()).all()
    printed = []
    for store in (new, old):
        with pytest.raises(UserError, match="drawn from true labels"):
            store.votes()
        capsys.readouterr()
        assert tool(["info", str(store.root)]) == 0 and tool(["verify", str(store.root)]) == 0
        printed.append(capsys.readouterr().out.replace(str(store.root), "STORE").split("\n"))
        with pytest.raises(SystemExit):
            tool(["health", str(store.root)])
        assert "coreg.annotate info" in capsys.readouterr().err
        tool(["export", str(store.root), "--output", str(tmp_path / f"{store.root.name}.csv")])
    assert [line for line in printed[0] if "(eta" in line] == [line for line in printed[1] if "(eta" in line] != []
    assert (tmp_path / "new.csv").read_text() == (tmp_path / "old.csv").read_text()
    weak = [dataclasses.replace(WeakLabels.from_store(store), source={}).hash for store in (new, old)]
    assert weak[0] == weak[1]


def test_a_block_without_a_candidate_is_refused(place, tmp_path):
    main(arguments(place, tmp_path / "ann"))
    store = AnnotationStore.open(tmp_path / "ann")
    writer = StoreWriter(tmp_path / "other", store.manifest)
    writer.start(store.images())
    sets = store.drawn_sets()
    sets[3] = False
    with pytest.raises(UserError, match="it has no candidate"):
        writer.write(0, {"candidates": sets}, {})
    with pytest.raises(UserError, match="it holds probs, expected candidates"):
        writer.write(0, {"probs": store.probs()}, {})


@pytest.mark.parametrize("rule", ["pico", "uniform", "hierarchical", "instance"])
def test_the_command_knows_every_rule(place, tmp_path, rule):
    more = {"hierarchical": ["--superclasses", str(place / "supers.csv"), "--q", "0.9"], "uniform": ["--q", "0.2"]}
    more["instance"] = ["--probabilities", str(place / "p.safetensors"), "--rho", "0.3"]
    main(arguments(place, tmp_path / "ann", "--rule", rule, *more.get(rule, [])))
    store = AnnotationStore.open(tmp_path / "ann")
    labels = truth_of(store)
    probs = command.read_probabilities(str(place / "p.safetensors"), 40, 4)
    expected = {
        "pico": lambda: pico(labels, 4, 0.1, 0.0, 0),
        "uniform": lambda: uniform(labels, 4, 0.2, 0),
        "hierarchical": lambda: hierarchical(labels, np.array([0, 0, 1, 1]), 0.9, 0.0, 0),
        "instance": lambda: instance(labels, probs, 0.3, 0.0, 0),
    }[rule]()
    assert (candidate_sets(store) == expected).all()
    assert store.manifest["model"]["spec"].startswith(f"synthetic:{rule}(")


def test_the_command_draws_uniformly_and_by_the_flips_of_either_name(place, tmp_path):
    sets = {}
    for rule, more in (("uss", []), ("fps", ["--q", "0.2"]), ("uniform", ["--q", "0.2"])):
        main(arguments(place, tmp_path / rule, "--rule", rule, *more))
        sets[rule] = AnnotationStore.open(tmp_path / rule)
    assert (candidate_sets(sets["fps"]) == candidate_sets(sets["uniform"])).all()
    assert (candidate_sets(sets["uss"]) == uss(truth_of(sets["uss"]), 4, 0)).all()


def test_a_long_tail_holds_the_other_training_images_out(place, tmp_path, capsys):
    command = arguments(place, tmp_path / "ann", "--rule", "fps", "--imbalance", "3")
    main(command)
    text, store = capsys.readouterr().out, AnnotationStore.open(tmp_path / "ann")
    labels, train = truth_of(store), np.flatnonzero([path.startswith("train/") for path in store.paths])
    chosen = train[long_tail(labels[train], 4, 3, 0)]
    assert set(np.flatnonzero(store.split == 0)) == set(chosen) and (store.split == 1).sum() == 10
    assert (store.split == 2).sum() == 30 - len(chosen)
    assert f"{len(chosen)} training images, {30 - len(chosen)} held out; training images of a class: 7 to 0" in text
    # the sets are those of all images
    assert (candidate_sets(store) == uniform(labels, 4, 0.1, 0)).all()
    assert store.manifest["model"]["spec"] == "synthetic:fps(q=0.1,seed=0), long_tail(imbalance=3,seed=0)"
    assert "another job" in refused(capsys, main, *command[:-1], "4")
    assert "--imbalance is 0.5" in refused(capsys, main, *command[:-1], "0.5")


def test_sets_of_people_are_a_store_without_labels_and_without_an_annotator(place, tmp_path):
    given = {number: [[number % 4], [(number + 1) % 4, 3]] for number in range(30)}
    (tmp_path / "plcifar10.pkl").write_bytes(pickle.dumps(given))
    for rule, make in (("aggregate", aggregate), ("vaguest", vaguest)):
        main(arguments(place, tmp_path / rule, "--rule", rule, "--people", str(tmp_path)))
        store = AnnotationStore.open(tmp_path / rule)
        sets = candidate_sets(store)
        assert (sets[store.split == 0] == make(list(given.values()), 4)).all() and sets[store.split == 1].all()
        assert store.manifest["model"]["spec"] == f"synthetic:people({rule})" and store.drawn
        with pytest.raises(UserError, match="candidate sets that people gave, and this needs"):
            store.votes()
    # a tenth of the training images is held out; their sets are those that people gave to them
    main(arguments(place, tmp_path / "held", "--rule", rule, "--people", str(tmp_path), "--validation", "0.1"))
    held, train = AnnotationStore.open(tmp_path / "held"), np.flatnonzero(store.split == 0)
    assert np.flatnonzero(held.split == 2).tolist() == sorted(train[validation_rows(30, 0.1, 0)].tolist())
    np.testing.assert_array_equal(candidate_sets(held), sets)
    assert held.manifest["model"]["spec"] == "synthetic:people(vaguest), validation(share=0.1,seed=0)"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve images of three classes that can be read, sets that were drawn for them, and a classifier of them."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(12):
        folder = root / "photos" / "train" / f"thing {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (root / "classes.txt").write_text("thing 0\nthing 1\nthing 2\n")
    main(arguments(root, root / "drawn", "--q", "0.5"))
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=3, img_size=32).eval()
    with torch.no_grad():
        network.head.weight.mul_(50)
    timm.models.save_for_hf(network, root / "classifier", model_args={"img_size": 32}, safe_serialization=True)
    return root, network


def test_instances_by_a_network_that_a_folder_holds(pictures, tmp_path, capsys):
    root, network = pictures
    named = ["--rule", "instance", "--probabilities"]
    main(arguments(root, tmp_path / "ann", *named, f"local-dir:{root / 'classifier'}"))
    store = AnnotationStore.open(tmp_path / "ann")
    config = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    rows = []
    for path in store.paths:
        pixels = Image.open(root / "photos" / path).resize(config["input_size"][1:], Image.Resampling.BILINEAR)
        x = (torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            rows.append(network(x[None]).double().softmax(1)[0].numpy())
    assert np.ptp(rows, axis=0).max() > 0.1
    assert (candidate_sets(store) == instance(store.labels, np.stack(rows), 0.4, 0.0, 0)).all()
    (root / "two.txt").write_text("thing 0\nthing 1\n")
    other = ["--images", str(root / "photos"), "--classes", str(root / "two.txt"), "--output_dir", str(tmp_path / "two")]
    assert "no known label" in refused(capsys, main, *other, *named, f"local-dir:{root / 'classifier'}")
    assert "unknown backbone" in refused(capsys, main, *arguments(root, tmp_path / "x", *named, "vit_nothing"))
    assert "local-dir:no" in refused(capsys, main, *arguments(root, tmp_path / "x", *named, "local-dir:no"))


def test_instances_by_the_probabilities_of_an_annotator(pictures, place, tmp_path, capsys):
    root, _ = pictures
    voted = as_votes(root / "drawn", tmp_path / "votes")
    named = ["--rule", "instance", "--probabilities", str(voted), "--rho", "0.6"]
    main(arguments(root, tmp_path / "ann", *named))
    store, probs = AnnotationStore.open(tmp_path / "ann"), AnnotationStore.open(voted).probs().astype(np.float64)
    probs /= probs.sum(axis=1, keepdims=True)
    assert (candidate_sets(store) == instance(store.labels, probs, 0.6, 0.0, 0)).all()
    assert "is of other images" in refused(capsys, main, *arguments(place, tmp_path / "x", *named))
    named[3] = str(root / "drawn")
    assert "drawn from true labels" in refused(capsys, main, *arguments(root, tmp_path / "x", *named))


def test_the_same_command_again_gives_the_same_store_and_another_is_refused(place, tmp_path, capsys):
    command = arguments(place, tmp_path / "ann", "--q", "0.5")
    main(command)
    digest = AnnotationStore.open(tmp_path / "ann").hash
    main(command)
    assert AnnotationStore.open(tmp_path / "ann").hash == digest
    shutil.rmtree(tmp_path / "ann" / "blocks")
    (tmp_path / "ann" / "blocks").mkdir()
    main(command)  # finishes what was lost
    assert AnnotationStore.open(tmp_path / "ann").hash == digest
    message = refused(capsys, main, *[*command, "--seed", "1"])
    assert "another job" in message and AnnotationStore.open(tmp_path / "ann").hash == digest


def test_train_coreg_reads_the_store_unchanged(tmp_path, capsys):
    import train_coreg

    generator = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "photos" / ("test" if number % 4 == 0 else "train") / f"thing {number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (16, 16), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "classes.txt").write_text("thing 0\nthing 1\nthing 2\n")
    main(arguments(tmp_path, tmp_path / "ann", "--q", "0.3", "--eta", "0.2"))
    run = [
        "--annotations",
        str(tmp_path / "ann"),
        "--output_dir",
        str(tmp_path / "run"),
        "--recipe",
        "digits",
        "--refine",
        "none",
    ]
    train_coreg.main([*run, "--epochs", "2", "--warmup_epochs", "1", "--batch_size", "8", "--report_to", "none"])
    assert "Co-Reg" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    # what was trained on lies in the run folder, and the report says where it comes from
    store, weak = AnnotationStore.open(tmp_path / "ann"), WeakLabels.read(tmp_path / "run" / "weak_labels.safetensors")
    source = {"generator": "flip(q=0.3,eta=0.2,seed=0)", "store": store.hash}
    assert weak.source == source and report["weak_labels"] == source | {"hash": weak.hash}
    assert (weak.table == store.drawn_sets()[store.split == 0]).all()
    assert (weak.truth == store.labels[store.split == 0]).all()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--q", "1.5"], "--q is 1.5"),
        (["--rule", "uniform", "--eta", "0.2"], "takes no --eta; leave it out, or write --rule flip"),
        (["--rule", "flip", "--rho", "0.2"], "write --rule instance"),
        (["--rule", "instance"], "needs --probabilities FILE"),
        (["--rule", "hierarchical"], "needs --superclasses FILE"),
        (["--rule", "vaguest"], "needs --people FILE"),
        (["--rule", "uss", "--q", "0.5"], "--rule uss takes no --q"),
        (["--rule", "flop"], "invalid choice"),
        (["--rule", "instance", "--probabilities", "no.safetensors"], "cannot read the tensor probs"),
        (["--rule", "hierarchical", "--superclasses", "no.csv"], "cannot read no.csv"),
    ],
)
def test_wrong_options_end_in_one_line(place, tmp_path, monkeypatch, capsys, more, words):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, main, *arguments(place, tmp_path / "ann", *more))
    assert not (tmp_path / "ann").exists()


def test_images_without_a_known_label_are_an_error(place, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("path,label\na.png,red thing\nb.png,\n")
    argv = ["--images", str(tmp_path / "list.csv"), "--output_dir", str(tmp_path / "ann")]
    assert "no class names" in refused(capsys, main, *argv)
    argv += ["--classes", str(place / "classes.txt")]
    assert "1 of 2 images have no known label (the first, 'b.png')" in refused(capsys, main, *argv)
    (tmp_path / "list.csv").write_text("path\na.png\nb.png\n")
    assert "2 of 2 images" in refused(capsys, main, *argv)
    assert not (tmp_path / "ann").exists()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"probs": torch.full((39, 4), 0.25)}, "shape (39, 4); wanted (40, 4)"),
        ({"logits": torch.full((40, 4), 0.25)}, "cannot read the tensor probs"),
        ({"probs": torch.full((40, 4), 3.0)}, "apply softmax"),
        ({"probs": torch.full((40, 4), float("nan"))}, "apply softmax"),
        ({"probs": torch.tensor([-0.5, 0.5, 0.5, 0.5]).repeat(40, 1)}, "apply softmax"),
    ],
)
def test_wrong_probabilities_are_refused(place, tmp_path, capsys, tensors, words):
    save_file(tensors, tmp_path / "p.safetensors")
    more = ["--rule", "instance", "--probabilities", str(tmp_path / "p.safetensors")]
    assert words in refused(capsys, main, *arguments(place, tmp_path / "ann", *more))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class;superclass\n", "has to name class,superclass"),
        ("", "has to name class,superclass"),
        ("class,superclass\nred thin,a\n", "line 2 names the class 'red thin', did you mean 'red thing'?"),
        ("class,superclass\nred thing,a\nred thing,b\n", "line 3 names the class 'red thing'; write every class name once"),
        ("class,superclass\nred thing,\n", "with its super-class"),
        ("class,superclass\nred thing,a\n", "gives 'green thing' no super-class (3 classes"),
    ],
)
def test_wrong_superclasses_are_refused(place, tmp_path, capsys, text, words):
    (tmp_path / "s.csv").write_text(text)
    more = ["--rule", "hierarchical", "--superclasses", str(tmp_path / "s.csv")]
    assert words in refused(capsys, main, *arguments(place, tmp_path / "ann", *more))
