"""N processes compute what one computes: real processes started by the real launcher, float64, odd sizes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_JOB
from runs import final_state, same_curves

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_coreg.py"


def launch(processes, small_store, output, *more, launcher="accelerate"):
    """Start train_coreg.py in `processes` processes as a user would; gives the finished process."""
    script = [
        str(ROOT / "train_coreg.py"),
        "--annotations",
        str(small_store),
        "--output_dir",
        str(output),
        *SMALL_JOB,
        *more,
    ]
    if launcher == "accelerate":
        config = ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), "--num_processes", str(processes)]
        start = [sys.executable, "-m", "accelerate.commands.launch", *config]
    else:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*start, *script], env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def alone(small_store, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--annotations", str(small_store), "--output_dir", str(output), *SMALL_JOB],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return final_state(output)


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
@pytest.mark.parametrize(("processes", "launcher"), [(2, "accelerate"), (4, "torchrun")])
def test_several_processes_train_like_one(small_store, alone, tmp_path, processes, launcher):
    done = launch(processes, small_store, tmp_path / "run", launcher=launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    same(alone, final_state(tmp_path / "run"))
    assert (tmp_path / "run" / "report.json").is_file()


@pytest.mark.multiprocess
def test_two_processes_train_like_one_with_adamw_too(small_store, tmp_path):
    """Its steps do not shrink with the gradient, and so it shows where a process has a gradient that it should not have.

    They train on half of the images, which every process draws for itself.
    """
    words = ("--optimizer", "adamw", "--lr", "0.001", "--share", "0.5")
    for processes in (1, 2):
        done = launch(processes, small_store, tmp_path / str(processes), *words)
        assert done.returncode == 0, done.stderr[-2000:]
    same(final_state(tmp_path / "1"), final_state(tmp_path / "2"), rtol=1e-8)


@pytest.mark.multiprocess
def test_a_process_that_is_told_of_others_it_cannot_find_is_refused(small_store, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--annotations", str(small_store), "--output_dir", str(tmp_path / "run")],
        env=os.environ | {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "error: the processes cannot start" in done.stderr
    assert not (tmp_path / "run").exists()


BROKEN_ON_THE_SECOND = """
import os, sys
sys.path.insert(0, sys.argv[1])
import train_coreg
from coreg.learn.coreg import CoRegLearner
step = CoRegLearner._warm_up

def broken(self, batch):
    parts = step(self, batch)
    return parts | {"negative_entropy": parts["negative_entropy"] * (float("nan") if os.environ["RANK"] == "1" else 1)}

CoRegLearner._warm_up = broken
train_coreg.main(sys.argv[2:])
"""


@pytest.mark.multiprocess
def test_no_number_on_one_process_ends_all_of_them_with_one_line(small_store, tmp_path):
    """Started without a launcher, which would end the first process when the second has left."""
    (tmp_path / "broken.py").write_text(BROKEN_ON_THE_SECOND)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    arguments = ["--annotations", str(small_store), "--output_dir", str(tmp_path / "run"), *SMALL_JOB]
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "broken.py"), str(ROOT), *arguments],
            env=os.environ | where | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], errors
    (line,) = [line for text in errors for line in text.splitlines() if "error:" in line]
    assert "loss/net1/negative_entropy became nan in epoch 1" in line
    assert not any("Traceback" in text for text in errors)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("wrong", ["store", "labels"])
def test_what_every_process_meets_is_one_line(small_store, tmp_path, wrong):
    absent = tmp_path / "absent"
    more = ("--labels", str(absent)) if wrong == "labels" else ()
    done = launch(2, small_store if more else absent, tmp_path / "run", *more)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert str(absent) in line
