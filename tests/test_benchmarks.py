"""The benchmarks' plain step against ours, row by row and gradient by gradient; growth, tables and pages by hand."""

import copy
import csv
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL_JOB
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook

from benchmarks import estimates, growth, labelling, memory, mended, pixels, record, referees, tiny_clip
from benchmarks.__main__ import PAGE, TABLES
from benchmarks.augment import MEAN, STD, pil_batch, waves
from benchmarks.plain import VIEWS, PlainCoReg
from benchmarks.sides import Bench, Case
from benchmarks.step import Clock, parts_of_a_step
from benchmarks.tables import as_markdown, fill
from benchmarks.turns import in_turns, ratio
from coreg.annotate.annotators import ClipAnnotator
from coreg.annotate.models import resolve
from coreg.annotate.prompts import TEMPLATES
from coreg.data.images import TEST
from coreg.data.sources import open_images
from coreg.errors import UserError
from coreg.learn.coreg import CoRegBatch, CoRegLearner
from coreg.learn.memory import Prototypes
from coreg.learn.options import CoRegOptions
from coreg.nets.model import Model
from coreg.nets.preact import PreActResNet
from coreg.process import build_accelerator
from coreg.settings import JobConfig
from coreg.views.augment import Augmentation

C, D, QUEUE = 5, 8, 23


def small_net(seed):
    """With batch statistics: every pass of the plain step and of ours has to see the same batches."""
    torch.manual_seed(seed)
    return Model(PreActResNet(C, 1, widths=(4, 8), depths=(1, 1)), D).double()


def both_sides(steps):
    """Our learner and the plain one trained on the same `steps` batches of (n_x, n_u) rows, and the losses of both."""
    net, peer = small_net(0), small_net(1).eval()
    ours = CoRegLearner(net, Prototypes(C, D).double(), CoRegOptions(queue_size=QUEUE, projection_dim=D)).double().train()
    ours.set_peer(peer)
    plain = PlainCoReg(copy.deepcopy(net), copy.deepcopy(peer), C, D, QUEUE)
    generator, losses = torch.Generator().manual_seed(3), []
    optimizers = [torch.optim.SGD(side.net.parameters(), lr=0.1, momentum=0.9) for side in (ours, plain)]
    for n_x, n_u in steps:
        views = {
            name: torch.randn(n_x if name[0] == "x" else n_u, 1, 8, 8, generator=generator, dtype=torch.float64)
            for name in VIEWS
        }
        order = torch.randperm(2 * n_x + 2 * n_u, generator=generator)
        p = torch.randn(n_x, C, generator=generator, dtype=torch.float64).softmax(1)
        w = torch.rand(n_x, generator=generator, dtype=torch.float64)
        strong = torch.cat([views[name] for name in ("x_s1", "x_s2", "u_s1", "u_s2")])
        batch = CoRegBatch(
            x_weak=(views["x_w1"], views["x_w2"]),
            u_weak=(views["u_w1"], views["u_w2"]),
            strong=strong,
            partners=strong[order],
            position=torch.arange(len(order)),
            partner_position=order,
            x_targets=p,
            x_weight=w,
            n_x=n_x,
            n_u=n_u,
            share_kept=0.7,
            ramp=0.3,
            gate=True,
            fill_queue=True,
        )
        losses.append((ours(batch)["loss"], plain.loss(views, p, w, 0.7, order, 0.3)))
        for optimizer, loss in zip(optimizers, losses[-1]):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return ours, plain, losses


def test_our_step_is_the_plain_step():
    # the queue of 23 places runs full and wraps around, and tails of batches have other sizes
    ours, plain, losses = both_sides([(6, 4), (4, 6), (5, 5), (2, 3)])
    for mine, theirs in losses:
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    for (name, mine), theirs in zip(ours.net.named_parameters(), plain.net.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, msg=name)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-7, atol=1e-10, msg=name)
    for (name, mine), theirs in zip(ours.key_net.named_parameters(), plain.key_net.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, msg=name)
    for (name, mine), theirs in zip(ours.net.named_buffers(), plain.net.buffers()):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, msg=name)
    torch.testing.assert_close(ours.prototypes.value, plain.prototypes, rtol=1e-9, atol=1e-11)
    keys, labels, marks = ours.queue.rows()
    torch.testing.assert_close(keys, plain.queue, rtol=1e-9, atol=1e-11)
    assert torch.equal(labels, plain.queue_targets.argmax(1)) and torch.equal(marks, plain.queue_marks)


@pytest.mark.parametrize("channels", [1, 3])
def test_plain_views_are_normalised_like_ours(channels):
    images = waves(6, 16, channels, np.random.default_rng(0))
    still = SimpleNamespace(integers=lambda low, high, count: (0, 0), random=lambda: 0.9)  # no shift, no flip
    ours = Augmentation(16, 0, False, mean=MEAN[:channels], std=STD[:channels])
    torch.testing.assert_close(
        pil_batch(images, 0, False, still), ours.plain(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())
    )
    strong = pil_batch(images, 2, True, np.random.default_rng(0))
    assert strong.shape == (6, channels, 16, 16) and strong.isfinite().all()


@pytest.fixture(scope="module")
def bench():
    return Bench(Case("preact_resnet_tiny", 16, 1, classes=3, batch=4, queue=16), build_accelerator(), JobConfig())


def images_through_networks(step):
    """Forward, and with gradient, of one step of one side."""
    counts = {"forward": 0, "backward": 0}

    def count(module, inputs, outputs):
        if isinstance(module, Model):
            counts["forward"] += len(inputs[0])
            counts["backward"] += len(inputs[0]) * outputs[0].requires_grad

    handle = register_module_forward_hook(count)
    step(0)
    handle.remove()
    return counts


def test_the_bare_passes_are_those_of_a_step(bench):
    made = {name: images_through_networks(make()) for name, make in bench.sides().items()}
    b = bench.case.batch
    assert made["ours"] == made["plain"] == made["passes"] == {"forward": 14 * b, "backward": 6 * b}
    assert made["ours, fast"] == made["passes, fast"] == {"forward": 8 * b, "backward": 6 * b}


def test_parts_of_a_step_make_up_the_whole(bench):
    shares = parts_of_a_step(bench, "reference", 2)
    assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
    assert shares["passes"] > shares["bookkeeping"] > 0


def test_a_second_counts_for_the_innermost_part():
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    clock = Clock(lambda: next(now))
    clock.start()  # at 0
    with clock.part("outer"), clock.part("inner"):  # from 1 and from 3
        pass  # until 6 and until 10
    assert clock.seconds == {"losses": 1.0, "outer": 2.0 + 4.0, "inner": 3.0}


def test_sides_are_timed_in_turns():
    calls = []
    now = iter(range(100))
    rounds = in_turns(
        {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}, 0, lambda: next(now) ** 2, least=3
    )
    assert calls == [(name, i) for i in range(4) for name in ("ab" if i % 2 == 0 else "ba")]
    # the clock is read twice for a side, four times a round: the first round would have been 1 - 0 and 9 - 4
    assert rounds == [{"b": 25 - 16, "a": 49 - 36}, {"a": 81 - 64, "b": 121 - 100}, {"b": 169 - 144, "a": 225 - 196}]
    assert ratio([{"a": 2, "b": 1}, {"a": 9, "b": 3}, {"a": 50, "b": 10}], "a", "b") == 3


def test_the_exponent_of_a_power_is_found():
    sizes = (10, 100, 1000)
    assert growth.exponent(sizes, [3 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert growth.exponent(sizes, [7.0] * 3) == pytest.approx(0)


def test_the_refinement_that_is_measured_mends_labels():
    rows = mended.measure(600, 12)
    assert all(float(row["seconds"]) >= 0 and float(row["MB"]) >= 0 for row in rows)
    before, after = (float(share) for share in re.findall(r"([0-9.]+)%", rows[-1]["step"]))
    assert 55 < before < 75 and after > 90


@pytest.mark.parametrize("name", growth.WORK)
def test_every_piece_of_work_can_be_done(name):
    seconds, megabytes = growth.point(name, 300, 10)
    assert seconds > 0 and 0 <= megabytes < 100


@pytest.mark.multiprocess
def test_memory_of_tables_is_measured_in_one_process_and_in_two(monkeypatch):
    monkeypatch.setattr(memory, "CLASSES", (10,))
    rows = memory.measure(3000, (1, 2))
    assert [(row["images"], row["tables"]) for row in rows] == [("300", "whole"), ("300", "sharded")]
    assert all(float(row["MB"]) > 0 for row in rows)


def test_a_table_and_the_page_that_holds_it():
    table = as_markdown([{"work": "union", "s": "1.50"}, {"work": "topk:3", "s": "12"}])
    assert table == "| work   |    s |\n| ------ | ---: |\n| union  | 1.50 |\n| topk:3 |   12 |"
    page = "Before.\n<!-- a -->\nold\n<!-- end of a -->\nBehind.\n"
    filled = fill(page, "a", "new")
    assert filled == "Before.\n<!-- a -->\n\nnew\n\n<!-- end of a -->\nBehind.\n" and fill(filled, "a", "new") == filled
    for broken in (page.replace("end of", "end"), page * 2, "<!-- end of a --><!-- a -->\n"):
        with pytest.raises(ValueError, match="one line <!-- a -->"):
            fill(broken, "a", "new")


def test_the_page_has_a_place_for_every_table():
    page = PAGE.read_text(encoding="utf-8")
    for name in TABLES:
        assert fill(page, name, "new") != page


def test_training_from_a_disk_is_measured_beside_the_device(tmp_path, monkeypatch):
    case = pixels.Case("preact_resnet_tiny", {"widths": [4], "depths": [1]}, 8, 4)
    monkeypatch.setitem(pixels.CASES, "small", case)
    rows = pixels.measure("small", 0, 0, tmp_path)
    assert [row["images"] for row in rows] == ["device", "disk, warm", "disk, cold"]
    assert rows[0]["of device"] == "1.00" and all(float(row["of device"]) > 0 for row in rows)
    assert not list(tmp_path.iterdir())


# ---- the tiny CLIP ---------------------------------------------------------------------------------------------------


def test_a_tiny_clip_learns_the_classes_and_annotates_other_images(tmp_path, capsys):
    generator = np.random.default_rng(0)
    for name, tint in (("dark thing", 0), ("bright thing", 150)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            noise = generator.integers(0, 100, (20, 24, 3)) + tint
            Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "images" / name / f"{i:02}.png")
    (tmp_path / "classes.txt").write_text("dark thing\nbright thing\n")
    arguments = ["--images", str(tmp_path / "images"), "--classes", str(tmp_path / "classes.txt"), "--skip", "4"]
    assert tiny_clip.main([*arguments, "--steps", "12", "--output_dir", str(tmp_path / "clip")]) == 0
    assert "trained on 16 images" in capsys.readouterr().out
    spec = f"local-dir:{tmp_path / 'clip'}"
    annotator = ClipAnnotator(resolve(spec), TEMPLATES, ["dark thing", "bright thing"])
    images = open_images(str(tmp_path / "images"), ["dark thing", "bright thing"])
    pixels = torch.stack([annotator.preprocess(images.load(row)) for row in range(24)])
    assert (annotator.annotate(pixels)["votes"] == images.labels[:, None]).all()
    for wrong, why in ((["--skip", "12"], "smaller --skip"), (["--skip", "-1"], "0 or more"), ([], "exists")):
        folder = tmp_path / ("new" if wrong else "clip")
        with pytest.raises(SystemExit):
            tiny_clip.main([*arguments, *wrong, "--output_dir", str(folder)])
        assert why in capsys.readouterr().err and (wrong == [] or not folder.exists())
    (tmp_path / "images" / "dark thing" / "07.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        tiny_clip.main([*arguments, "--output_dir", str(tmp_path / "new")])
    assert "07.png' cannot be read" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize("flip", [True, False])
def test_no_image_is_mirrored_where_left_and_right_make_another_class(flip, monkeypatch):
    pixels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    pixels[:, :, :, :16] = 200  # bright on the left
    seen, encode = [], tiny_clip.CLIP.encode_image

    def watched(model, images, normalize=False):
        seen.append(images[:, 0, 0, 0] > images[:, 0, 0, 31])
        return encode(model, images, normalize)

    monkeypatch.setattr(tiny_clip.CLIP, "encode_image", watched)
    tiny_clip.train(pixels, torch.arange(4) // 2, ("left", "right"), steps=1, seed=0, flip=flip)
    assert torch.cat(seen).all() == (not flip)


def test_the_tiny_clip_leaves_the_first_images_of_every_class_alone():
    labels = np.array([2, 0, 0, -1, 2, 0, 2, 0, 2])
    assert tiny_clip.chosen_rows(labels, 1, 2).tolist() == [2, 5, 4, 6]
    assert tiny_clip.chosen_rows(np.full(3, -1), 0, 2).tolist() == []


def test_answers_are_given_in_the_order_that_is_measured(small_store, tmp_path, capsys):
    """One seed, one number of answers, every order; a second time from what is finished, with the same table."""
    words = ["--output_dir", str(tmp_path), "--seeds", "0", "--answers", "9", "--annotations", str(small_store), *SMALL_JOB]
    words += ["--epochs", "1", "--warmup_epochs", "1", "--share", "40", "--report_to", "none"]
    tables = []
    for orders in (("asked", "random"), labelling.ORDERS):
        assert labelling.main([*words, "--orders", *orders]) == 0
        tables.append([line.replace(" ", "") for line in capsys.readouterr().out.splitlines()])
    assert set(tables[0][2:]) <= set(tables[1][2:]) and [len(table) for table in tables] == [5, 7]
    run = tmp_path / "seed0"
    lines = list(csv.DictReader((run / "none/labels.csv").open(newline="")))
    asked = list(csv.DictReader((run / "none/label_next.csv").open(newline="")))
    given = {order: list(csv.DictReader((run / f"{order}9.csv").open(newline=""))) for order in labelling.ORDERS}
    assert all(row["label"] == row["path"].split("/")[1] for rows in given.values() for row in rows)
    chosen = {order: [row["path"] for row in rows] for order, rows in given.items()}
    assert chosen["asked"] == [row["path"] for row in asked[:9]]
    sure = {line["path"]: float(line["probability"]) for line in lines}
    assert sorted(sure[path] for path in chosen["unsure"]) == sorted(sure.values())[:9]
    assert len(set(chosen["random"])) == 9 and set(chosen["random"]) <= set(sure)
    label = {line["path"]: line["label"] for line in lines}
    wrong = sum(label[row["path"]] != row["label"] for row in given["asked"])
    (row,) = [row.split("|") for row in tables[0] if "|asked|" in row]
    assert row[1:4] == ["9", "asked", f"{100 * wrong / 9:.1f}"]
    for order in labelling.ORDERS:
        assert json.loads((run / f"{order}9/report.json").read_text())["labels_used"] == 9


def test_the_record_of_results_sees_one_bit_shape_and_dtype():
    """And no times, names or order of tables."""
    zeros, other = torch.zeros(2, 3), torch.zeros(2, 3)
    other[1, 2] = 1e-40
    different = [zeros, other, zeros.view(3, 2), zeros.double(), zeros.view(torch.int32)]
    assert len({record.digest(record.bytes_of(tensor)) for tensor in different}) == 5
    assert record.digest(record.bytes_of(zeros.t().contiguous().t())) == record.digest(record.bytes_of(zeros))
    assert record.digest(b"a", b"bc") != record.digest(b"ab", b"c")
    tensors = record.tensors_in({"epoch": 3, "nets": [{"w": zeros}, {"w": other, "chosen": None}], "t": (zeros,)})
    assert [id(tensor) for tensor in tensors] == [id(zeros), id(other), id(zeros)]


def test_how_often_a_report_is_right_about_whom_to_trust():
    cases = [referees.Case("a", "own", "as it is", 0.6, 0.8, most) for most in ("view", "annotator")]
    cases += [
        referees.Case("a", "own", "as it is", 0.9, 0.5, "student"),
        referees.Case("a", "own", "mended", 0.9, 0.88, "view"),
    ]
    first, second = referees.table(cases)
    assert (first["evidence"], first["cases"], first["right"], first["mean points lost"]) == (
        "as it is",
        "3",
        "1 of 3",
        "20.0",
    )
    # (0 + 20 + 40) / 3; always the annotator (20 + 20 + 0) / 3; always the view 40 / 3
    assert (first["most below the annotator"], first["always annotator"], first["always view"]) == ("40.0", "13.3", "13.3")
    assert (second["right"], second["most below the annotator"]) == ("1 of 1", "2.0")


def test_referees_of_a_store(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(referees, "MENDED", ())
    monkeypatch.setattr(referees, "SPOILED", ())
    (case,) = referees.cases_of(digits)
    test = digits.rows_of(TEST)
    assert case.annotator == np.mean(digits.probs()[test].argmax(axis=1) == digits.labels[test])
    # its own features, of which the demo's refinement says that they are right where they read alone
    assert case.view == "own" and case.by_view > case.annotator + 0.1 and case.most != "annotator" and case.lost == 0
    monkeypatch.setattr(referees, "cases_of", lambda store: [case, referees.Case("a", "own", "as it is", 0.9, 0.5, "view")])
    referees.main([str(digits.root)])
    assert "a, own, as it is: annotator 90.0%, view 50.0%, the answer view loses 40.0" in capsys.readouterr().out
    monkeypatch.undo()
    bare = SimpleNamespace(
        root=tmp_path, labels=None, paths=digits.paths, rows_of=digits.rows_of, manifest={"features": None}
    )
    with pytest.raises(UserError, match="has 0 training and 0 test images with labels and 0 kinds of features"):
        next(referees.cases_of(bare))


def test_evidence_is_mended_and_spoiled_by_the_shares_that_are_named():
    rng = np.random.default_rng(1)
    labels, probs = rng.integers(0, 4, 1000), rng.dirichlet(np.ones(4), 1000)
    before = np.mean(probs.argmax(axis=1) == labels)
    kinds = list(referees.changed(probs, labels))
    assert [kind for kind, _ in kinds] == ["as it is", "mended", "mended", "spoiled", "spoiled"]
    shares = [np.mean(changed.argmax(axis=1) == labels) for _, changed in kinds]
    assert shares[:3] == pytest.approx([before, before + 0.3 * (1 - before), before + 0.6 * (1 - before)], abs=2e-3)
    for share, (_, spoiled) in zip(referees.SPOILED, kinds[3:], strict=True):
        # the same rows in other places, nearly none of them where it was
        assert np.mean((spoiled != probs).any(axis=1)) == pytest.approx(share, abs=0.01)
        np.testing.assert_array_equal(np.sort(spoiled[:, 0]), np.sort(probs[:, 0]))


def test_how_often_estimates_held_the_truth():
    """Scores 0.5 and 0.6: the truths 0.65 and 0.35 need margins of 0.05 and 0.15, and 0.55 none."""
    cases = [estimates.Case("a", "train", (0.5, 0.6), truth) for truth in (0.65, 0.35, 0.55)]
    cases += [estimates.Case("b", "train", (0.9, 0.95, 0.97), 0.85)]
    first, second, both = estimates.table(cases, 0.1)
    assert [first["held the truth"], second["held the truth"], both["held the truth"]] == ["2 of 3", "1 of 1", "3 of 4"]
    assert (first["mean width"], second["mean width"]) == ("0.30", "0.20")
    assert (first["mean error"], second["mean bias"]) == (f"{(0.1 + 0.2 + 0) / 3:.3f}", "+0.100")
    assert first["held, margin of the other sets"] == "2 of 3 (± 0.05)"
    assert second["held, margin of the other sets"] == "1 of 1 (± 0.15)" and both["data"] == "all"
