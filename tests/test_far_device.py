"""Every script on a device that is not there: no two devices in one operation, no waiting in a step.

What a GPU computes is not asked here (`tests/test_gpu_step.py` does), but everything that would end a job on one because a
tensor was left on the other side, and all that would let a GPU run idle, happens here as well.
"""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from far_device import FAR, FarTensor, TwoDevicesError, WaitedError, far_device, strictly
from runs import final_state, script, with_method
from test_annotate_annotators import save_tiny_clip
from test_baseline_lora import clip_store  # noqa: F401
from torch.utils._pytree import tree_map

import annotate_vlm
import train_coreg
from benchmarks.sides import Bench, Case
from benchmarks.step import parts_of_a_step
from coreg.process import build_accelerator
from coreg.run import checkpoint
from coreg.run.loop import Run
from coreg.settings import JobConfig
from coreg.store.store import AnnotationStore

# ---- the device itself -----------------------------------------------------------------------------------------------


def test_it_computes_what_the_cpu_computes():
    here = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with far_device():
        weights = torch.nn.Parameter(here.to(FAR))
        rows = torch.arange(6, device=FAR, dtype=torch.float32).reshape(2, 3)
        (rows @ weights.T).square().sum().backward()
        assert isinstance(weights.grad, FarTensor) and weights.grad.device == FAR
        found = weights.grad.cpu()
    wanted = here.clone().requires_grad_()
    (torch.arange(6.0).reshape(2, 3) @ wanted.T).square().sum().backward()
    assert torch.equal(found, wanted.grad)


WAITS = {
    "a number": lambda x: float(x.sum()),
    "a condition": lambda x: bool((x > 0).any()),
    "rows by mask": lambda x: x[x > 0],
    "places": lambda x: torch.where(x > 0),
    "to the cpu": lambda x: x.cpu(),
    "from the cpu": lambda x: torch.ones(2).to(x.device),
    "from numpy": lambda x: torch.as_tensor(np.ones(2), device=x.device),
    "from a list": lambda x: torch.tensor([1.0], device=x.device) + 1,
    "copied over": lambda x: x.copy_(torch.zeros(3)),
    "counts": lambda x: x.repeat_interleave((x > 0).long()),
    "kinds": lambda x: x.unique(),
}
FLOWS = {
    "from the cpu": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "copied over": lambda x: x.copy_(torch.zeros(3), non_blocking=True),
    "a mask written": lambda x: x.masked_fill_(x > 0, 2.0),
    "one hot": lambda x: torch.nn.functional.one_hot((x > 0).long(), 2),
    "a number from the cpu": lambda x: x * torch.tensor(2.0),
    "rows": lambda x: x[torch.arange(2, device=x.device)],
}


@pytest.mark.parametrize("what", WAITS)
def test_waiting_is_noticed(what):
    with far_device() as mode:
        x = torch.arange(3.0, device=FAR)
        with strictly(mode), pytest.raises(WaitedError):
            WAITS[what](x)


@pytest.mark.parametrize("what", FLOWS)
def test_what_does_not_wait_is_let_through(what):
    with far_device() as mode:
        x = torch.arange(3.0, device=FAR)
        with strictly(mode):
            assert FLOWS[what](x).device == FAR


def test_two_devices_in_one_operation_are_noticed():
    with far_device():
        x = torch.arange(3.0, device=FAR)
        for mixed in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(1)]), lambda: x[torch.tensor([0, 1])]):
            with pytest.raises(TwoDevicesError):
                mixed()


# ---- every training script -------------------------------------------------------------------------------------------


def brought_here(value):
    return value.cpu() if isinstance(value, FarTensor) else value


def trained_far_away(main, arguments, monkeypatch):
    """Run a script with the far device for its own; nothing in the loop over steps may wait."""
    with far_device() as mode, monkeypatch.context() as patched:
        steps = Run.steps

        def strict_steps(run, training, count):
            assert all(isinstance(weight, FarTensor) for weight in training.learners[0].parameters())
            for step in steps(run, training, count):
                with strictly(mode):
                    yield step

        patched.setattr(Accelerator, "device", property(lambda accelerator: FAR))
        patched.setattr(Run, "steps", strict_steps)
        # a checkpoint is read with map_location="cpu"
        save = checkpoint.save
        patched.setattr(
            checkpoint, "save", lambda folder, number, state: save(folder, number, tree_map(brought_here, state))
        )
        main(arguments)


JOB = [
    "--recipe", "digits", "--refine", "none", "--channels", "3", "--image_size", "12", "--epochs", "2",
    "--backbone_args", '{"widths": [8, 16], "depths": [1, 1]}',
    "--batch_size", "25", "--workers", "0", "--report_to", "none",
]  # fmt: skip
CO_TRAINED = [
    "--warmup_epochs", "1", "--mixup_alpha", "4", "--contrast_after", "-1", "--queue_size", "50", "--projection_dim", "8",
]  # fmt: skip
# every starting time is over after the first epoch
PARTIAL = {"queue_size": 50, "projection_dim": 8, "correction_margin": 0, "noise_rate": 0.2}
pll = script("pll")
SCRIPTS = {
    "coreg": (train_coreg, CO_TRAINED),
    "coreg fast": (train_coreg, [*CO_TRAINED, "--preset", "fast", "--few_shot", "2"]),
    "coreg eval": (train_coreg, [*CO_TRAINED, "--guess_mode", "eval", "--optimizer", "adamw", "--mixup_alpha", "0"]),
    "coreg accumulating": (train_coreg, [*CO_TRAINED, "--gradient_accumulation_steps", "2", "--contrast", "supervised"]),
    "coreg from memory that is shared": (train_coreg, [*CO_TRAINED, "--pixels", "host"]),
    "distill": (script("distill"), ["--teacher", "averaged"]),
    "dividemix": (script("dividemix"), ["--warmup_epochs", "1"]),
    "distill few": (script("distill"), ["--teacher", "single", "--few_shot", "2"]),
    "dividemix few": (script("dividemix"), ["--warmup_epochs", "1", "--few_shot", "2"]),
    "alim few": (pll, [*with_method("alim_onehot", **PARTIAL), "--few_shot", "2", "--gradient_accumulation_steps", "2"]),
    **{method: (pll, with_method(method, **PARTIAL)) for method in pll.NAMES},
    "pico views": (pll, [*with_method("pico", **PARTIAL), "--weak_view", "pico_weak", "--strong_view", "pico_strong"]),
    "cr views": (pll, [*with_method("cr_dpll", **PARTIAL), "--weak_view", "cr_weak", "--strong_view", "cr_strong"]),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_far_away_as_it_trains_here(name, small_annotated, tmp_path, monkeypatch):
    module, more = SCRIPTS[name]
    monkeypatch.setattr("coreg.run.training.FUSED", ())  # the far device has no such kernels, and bits are compared
    job = ["--annotations", str(small_annotated), *JOB, *more]
    module.main([*job, "--output_dir", str(tmp_path / "here")])
    trained_far_away(module.main, [*job, "--output_dir", str(tmp_path / "far")], monkeypatch)
    here, far = final_state(tmp_path / "here"), final_state(tmp_path / "far")
    assert far["epoch"] == 2 and len(here["learners"]) == len(far["learners"])
    for one, other in zip(here["learners"], far["learners"]):
        assert one.keys() == other.keys()
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, rtol=0, atol=0, equal_nan=True, msg=key)


# ---- annotators, what tunes them, and the benchmark ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["coop", "lora"])
def test_a_tuner_tunes_far_away_as_it_tunes_here(name, clip_store, tmp_path, monkeypatch):  # noqa: F811
    module = script(name)
    job = ["--annotations", str(clip_store.root), "--shots", "2", "--epochs", "2", "--workers", "0", "--report_to", "none"]
    job += ["--context_tokens", "2"] if name == "coop" else []
    module.main([*job, "--output_dir", str(tmp_path / "here")])
    trained_far_away(module.main, [*job, "--output_dir", str(tmp_path / "far")], monkeypatch)
    here, far = (final_state(tmp_path / place)["learners"][0] for place in ("here", "far"))
    assert here.keys() == far.keys()
    for key, value in here.items():
        torch.testing.assert_close(far[key], value, msg=key)  # attention is computed by other kernels elsewhere


def test_images_are_annotated_far_away_as_they_are_here(small_store, tmp_path, monkeypatch):
    images = Path(AnnotationStore.open(small_store).images_spec)
    words = ["--images", str(images), "--classes", str(images.parent / "classes.txt"), "--workers", "0"]
    words += ["--vlm", f"local-dir:{save_tiny_clip(tmp_path / 'clip')}", "--output_dir"]
    annotate_vlm.main([*words, str(tmp_path / "here")])
    with far_device(), monkeypatch.context() as patched:
        patched.setattr(Accelerator, "device", property(lambda accelerator: FAR))
        annotate_vlm.main([*words, str(tmp_path / "far")])
    here, far = (AnnotationStore.open(tmp_path / place) for place in ("here", "far"))
    assert len(np.unique(here.votes())) > 1
    assert np.array_equal(here.votes(), far.votes()) and np.array_equal(here.probs(), far.probs())


def test_no_side_of_the_benchmark_waits_but_the_plain_one(monkeypatch):
    with far_device() as mode, monkeypatch.context() as patched:
        patched.setattr(Accelerator, "device", property(lambda accelerator: FAR))
        bench = Bench(Case("preact_resnet_tiny", 16, 1, 4, 6, 20), build_accelerator(), JobConfig())
        for name, make in bench.sides().items():
            step = make()
            with strictly(mode) if name != "plain" else contextlib.nullcontext():
                step(0)
                step(1)
        assert sum(parts_of_a_step(bench, "fast", 1).values()) == pytest.approx(1)
