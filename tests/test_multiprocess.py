"""N processes compute what one computes: float64, odd sizes. One test starts them by the real launcher, the others fork."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_JOB
from runs import final_state, in_processes, same_curves

import train_coreg
from coreg.learn import division, tables
from coreg.learn.coreg import CoRegLearner
from coreg.views import order

ROOT = Path(__file__).parents[1]


def arguments(store, output, *more):
    return ["--annotations", str(store), "--output_dir", str(output), *SMALL_JOB, *more]


def trained(processes, store, output, *more, before=None):
    """The final state of a job in so many processes."""
    ended = in_processes(processes, train_coreg.main, *arguments(store, output, *more), before=before)
    assert ended.codes == [0] * processes, ended.stderr[-2000:]
    return final_state(output)


@pytest.fixture(scope="module")
def lone_run(small_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    trained(1, small_store, folder)
    return folder


@pytest.fixture(scope="module")
def alone(lone_run):
    return final_state(lone_run)


def same(ours, theirs, rtol=1e-10):
    """Every tensor of two checkpoints, whole numbers exactly and float64 within `rtol` of the largest entry."""
    for a, b in zip(ours["learners"], theirs["learners"]):
        assert a.keys() == b.keys()
        for name in a:
            if a[name].is_floating_point():
                assert (a[name] - b[name]).abs().max() <= rtol * a[name].abs().max().clamp_min(1e-3), name
            else:
                assert torch.equal(a[name], b[name]), name
    for key in ("losses", "weights"):
        for a, b in zip(ours["divisions"][key], theirs["divisions"][key]):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    same_curves(ours, theirs, rtol)


@pytest.mark.multiprocess
def test_two_processes_of_the_launcher_train_like_one(small_store, alone, tmp_path):
    """As a user starts them."""
    config = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), "--num_processes", "2"]
    start = [sys.executable, "-m", "accelerate.commands.launch", *config, str(ROOT / "train_coreg.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*start, *arguments(small_store, tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    same(alone, final_state(tmp_path / "run"))
    assert (tmp_path / "run" / "report.json").is_file()


@pytest.mark.multiprocess
def test_four_processes_train_like_one(small_store, alone, tmp_path):
    same(alone, trained(4, small_store, tmp_path / "run"))


@pytest.mark.multiprocess
def test_two_processes_with_parts_of_the_tables_train_like_one_with_all(small_store, lone_run, alone, tmp_path):
    """And report the same, although one of them alone has all predictions then."""
    same(alone, trained(2, small_store, tmp_path / "run", "--tables", "sharded"))
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (lone_run, tmp_path / "run"))
    for part in ("accuracy", "label_free", "per_class_accuracy"):
        assert theirs[part].keys() == ours[part].keys()
    assert theirs["accuracy"] == ours["accuracy"] and theirs["temperature"] == pytest.approx(ours["temperature"])
    one, two = ((folder / "labels.csv").read_text().split("\n") for folder in (lone_run, tmp_path / "run"))
    assert [line.split(",")[:2] for line in one] == [line.split(",")[:2] for line in two]


def many_images():
    """97 images are many: orders are computed place by place, the mixture is fitted to a histogram, tables go in pieces."""
    order.LARGE, division.LARGE, tables.PIECE = 10, 60, 100


@pytest.mark.multiprocess
def test_processes_with_parts_of_large_tables_train_like_one(small_store, tmp_path):
    words = ("--guesses", "epoch", "--tables", "sharded", "--epochs", "2")
    one, two, four = (trained(count, small_store, tmp_path / str(count), *words, before=many_images) for count in (1, 2, 4))
    same(one, two)
    same(one, four)


@pytest.mark.multiprocess
def test_two_processes_train_like_one_with_adamw_too(small_store, tmp_path):
    """Its steps do not shrink with the gradient, and so it shows where a process has a gradient that it should not have.

    They train on half of the images, which every process draws for itself.
    """
    words = ("--optimizer", "adamw", "--lr", "0.001", "--share", "0.5")
    one, two = (trained(count, small_store, tmp_path / str(count), *words) for count in (1, 2))
    same(one, two, rtol=1e-8)


@pytest.mark.multiprocess
def test_a_process_whose_group_cannot_be_joined_is_refused(small_store, tmp_path):
    """A launcher that names the number of processes and not where they are."""
    words = arguments(small_store, tmp_path / "run")
    ended = in_processes(1, train_coreg.main, *words, before=lambda: os.environ.update(WORLD_SIZE="2"))
    assert ended.codes == [2] and "error: the processes cannot start" in ended.stderr
    assert not (tmp_path / "run").exists()


def broken_on_the_second():
    step = CoRegLearner._warm_up

    def broken(self, batch):
        parts = step(self, batch)
        return parts | {"negative_entropy": parts["negative_entropy"] * (float("nan") if os.environ["RANK"] == "1" else 1)}

    CoRegLearner._warm_up = broken


@pytest.mark.multiprocess
def test_no_number_on_one_process_ends_all_of_them_with_one_line(small_store, tmp_path):
    """Without a launcher, which would end the first process when the second has left."""
    words = arguments(small_store, tmp_path / "run")
    ended = in_processes(2, train_coreg.main, *words, before=broken_on_the_second)
    assert ended.codes == [2, 2], ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if "error:" in line]
    assert "loss/net1/negative_entropy became nan in epoch 1" in line
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("wrong", ["store", "labels"])
def test_what_every_process_meets_is_one_line(small_store, tmp_path, wrong):
    absent = tmp_path / "absent"
    more = ("--labels", str(absent)) if wrong == "labels" else ()
    ended = in_processes(2, train_coreg.main, *arguments(small_store if more else absent, tmp_path / "run", *more))
    assert ended.codes == [2, 2], ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error:")]
    assert str(absent) in line
