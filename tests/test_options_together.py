"""bf16, gradient accumulation, channels_last (always on), SyncBatchNorm and torch.compile, together and on both devices."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import SMALL_JOB
from runs import final_state, in_processes

import train_coreg

# the backward pass of group normalisation in bf16 on the CPU ends the process with torch 2.6 and 2.8
BATCH_NORM = ["--backbone_args", '{"norm": "batch", "widths": [16, 16], "depths": [1, 1]}']
TOGETHER = ["--dtype", "float32", "--mixed_precision", "bf16", "--gradient_accumulation_steps", "2"]


def in_a_process(store, output, *more, processes=1):
    """A start of its own: compiled code and the device cannot be changed in a process that has begun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    script = [train_coreg.__file__, "--annotations", str(store), "--output_dir", str(output), *SMALL_JOB, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *script], env=environment, capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return final_state(output)


def parameters(state):
    return torch.cat([tensor.flatten() for name, tensor in state["learners"][0].items() if name.startswith("net.")]).float()


def test_autocast_and_accumulation_stay_near_full_precision(small_store, tmp_path):
    for name, more in (("full", TOGETHER[:2] + TOGETHER[4:]), ("half", TOGETHER)):
        words = ["--annotations", small_store, "--output_dir", tmp_path / name, *SMALL_JOB, *BATCH_NORM, *more]
        ended = in_processes(1, train_coreg.main, *words)
        assert ended.codes == [0], ended.stderr
    full, half = (final_state(tmp_path / name) for name in ("full", "half"))
    difference = (parameters(full) - parameters(half)).norm() / parameters(full).norm()
    assert 0 < difference < 0.1  # bf16 keeps 8 bits: it has to differ, and not by much


@pytest.mark.slow
def test_compiled_networks_train_the_same(small_store, tmp_path):
    plain = in_a_process(small_store, tmp_path / "plain", "--dtype", "float32")
    compiled = in_a_process(small_store, tmp_path / "compiled", "--dtype", "float32", "--compile")
    torch.testing.assert_close(parameters(compiled), parameters(plain), rtol=1e-2, atol=1e-3)
    assert plain["learners"][0].keys() == compiled["learners"][0].keys()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_trains_like_the_cpu(small_store, tmp_path, monkeypatch):
    gpu = in_a_process(small_store, tmp_path / "gpu", "--epochs", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cpu = in_a_process(small_store, tmp_path / "cpu", "--epochs", "2")
    torch.testing.assert_close(parameters(gpu), parameters(cpu), rtol=1e-4, atol=1e-5)  # float64 arithmetic on both


@pytest.mark.gpu
@needs_gpu
def test_everything_together_on_a_gpu(small_store, tmp_path):
    batch_norm = ["--backbone_args", '{"widths": [8, 16], "depths": [1, 1]}']
    state = in_a_process(small_store, tmp_path / "run", *TOGETHER, "--compile", *batch_norm)
    assert parameters(state).isfinite().all()


@pytest.mark.gpu
@pytest.mark.multiprocess
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
def test_batch_statistics_are_shared_between_gpus(small_store, tmp_path):
    batch_norm = ["--backbone_args", '{"widths": [8, 16], "depths": [1, 1]}', "--epochs", "2"]
    one = in_a_process(small_store, tmp_path / "one", *batch_norm)
    two = in_a_process(small_store, tmp_path / "two", *batch_norm, processes=2)
    torch.testing.assert_close(parameters(two), parameters(one), rtol=1e-4, atol=1e-5)
