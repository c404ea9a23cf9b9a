"""The parts of the GPU benchmark: each is a function of its scale that gives plain numbers, ready for JSON.

`Scale` says how large: `CARD` for a GPU, `DRY` for a rehearsal of the same calls on a CPU within seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import growth
from benchmarks.augment import MEAN, STD, waves
from benchmarks.sides import CASES, Bench, Case
from benchmarks.turns import in_turns, ratio
from coreg.process import build_accelerator
from coreg.records import read_record
from coreg.run.task import predict
from coreg.settings import JobConfig
from coreg.views.augment import Augmentation
from coreg.views.resident import TrainingImages

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    case: Case
    seconds: float  # of the rounds of one comparison
    epoch_images: int  # images of an epoch of both networks
    view_batches: tuple[int, ...]
    conv: tuple[int, int, int]  # images, channels and side of the convolution whose rate is the card's
    annotate: dict[str, Any]  # options of `benchmarks.annotate`
    table_images: int  # N of division and refinement
    tests: tuple[str, ...]  # arguments of pytest
    epochs: int  # of the trainings on real images


CARD = Scale(
    replace(CASES["papers"], batch=256, classes=10),
    8.0,
    50_000,
    (256, 1024),
    (1024, 512, 16),
    {"model": "ViT-B-16", "images": 32_768, "classes": 10, "batch": 256, "precision": "bf16", "seconds": 2.0, "rounds": 1},
    1_000_000,
    ("-m", "gpu", "-q", "-o", "addopts="),
    20,
)
DRY = Scale(
    Case("preact_resnet_tiny", 16, 3, 10, 8, 64),
    0.0,
    64,
    (16,),
    (2, 8, 8),
    {"model": "ViT-S-32-alt", "images": 2, "classes": 1, "batch": 2, "precision": "fp32", "seconds": 0.01, "rounds": 1},
    2_000,
    ("-m", "gpu", "-q", "-o", "addopts=", "--collect-only"),
    1,
)


def wait() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], seconds: float, least: int = 3) -> float:
    """Median seconds of one call, after one that is not counted."""
    rounds = in_turns({"": lambda number: work()}, seconds, wait=wait, least=least)
    return statistics.median(times[""] for times in rounds)


def device() -> torch.device:
    """The GPU, or the CPU of a rehearsal."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- the card --------------------------------------------------------------------------------------------------------


def card(scale: Scale) -> dict[str, Any]:
    """Rates of one large 3x3 convolution, forward and backward, which nothing here can surpass: FLOP/s."""
    images, channels, side = scale.conv
    rates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layer = layer.to(device(), dtype, memory_format=torch.channels_last)
        made = torch.randn(images, channels, side, side, device=device(), dtype=dtype)
        pixels = made.contiguous(memory_format=torch.channels_last).requires_grad_()
        gradient = torch.randn_like(pixels)
        seconds = timed(lambda layer=layer, x=pixels, g=gradient: layer(x).backward(g), min(scale.seconds, 3.0), 5)
        rates[name] = 3 * 2 * 9 * images * side**2 * channels**2 / seconds
    return {"rates": rates}


def tests(scale: Scale) -> dict[str, Any]:
    """What the tests that need a GPU say, in pytest's last line; files without such a test are not even imported."""
    files = [f"{file}" for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
    command = [sys.executable, "-m", "pytest", *scale.tests, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.MULTILINE)
    # on standard error is where a process was that crashed
    printed = done.stderr[-4000:] if done.returncode < 0 else ""
    summary = (done.stdout.strip().split("\n") or [""])[-1]
    return {"status": done.returncode, "summary": summary, "failed": failed, "printed": printed}


# ---- a step ----------------------------------------------------------------------------------------------------------


def bench_of(scale: Scale, precision: str, compiled: bool) -> Bench:
    """Both sides of a step under a precision; several of them may be made in one process."""
    AcceleratorState._reset_state()
    return Bench(scale.case, build_accelerator(precision), JobConfig(mixed_precision=precision, compile=compiled))


def step(scale: Scale, precision: str, compiled: bool, sides: tuple[str, ...]) -> dict[str, Any]:
    """Seconds, ratios and peak memory of the sides of a step, and the operations of its passes."""
    bench = bench_of(scale, precision, compiled)
    made = {side: bench.sides()[side]() for side in sides}
    rounds = in_turns(made, scale.seconds, wait=wait, least=3)
    peaks = {}
    for side in sides:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        made[side](0)
        peaks[side] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    counter = FlopCounterMode(display=False)
    with counter:
        bench_of(scale, precision, False).passes()(0)
    return launches(made["ours"]) | {
        "seconds": {side: statistics.median(times[side] for times in rounds) for side in sides},
        "to_passes": {side: ratio(rounds, side, "passes") for side in sides},
        "peak_bytes": peaks,
        "rounds": len(rounds),
        "images": 2 * scale.case.batch,
        "flop": counter.get_total_flops(),
    }


def step_fp32(scale: Scale) -> dict[str, Any]:
    """In float32, beside the plain implementation."""
    return step(scale, "no", False, ("plain", "ours", "passes"))


def step_bf16(scale: Scale) -> dict[str, Any]:
    """In bfloat16."""
    return step(scale, "bf16", False, ("ours", "passes"))


def step_compiled(scale: Scale) -> dict[str, Any]:
    """In bfloat16, networks compiled (not in a rehearsal, where compiling would take minutes)."""
    return step(scale, "bf16", scale is not DRY, ("ours", "passes"))


WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("LaunchKernel", "GraphLaunch")


def profiled(work: Callable[[], Any]) -> Any:
    """The profiler's averages of a piece of work, and of the profiler's own end, where it waits for the device."""
    with torch.profiler.profile() as profile:
        work()
    return profile.key_averages()


def launches(ours: Callable[[int], None], steps: int = 3) -> dict[str, Any]:
    """Launches and waits of a step that has run before, and the kernels (CPU: operators) that take the most time."""

    def work() -> None:
        for number in range(steps):
            ours(number)

    own = {event.key: event.count for event in profiled(lambda: None)}
    events = profiled(work)
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    top = sorted(on_device or events, key=lambda event: getattr(event, key), reverse=True)[:10]
    total = sum(getattr(event, key) for event in (on_device or events))
    waits = {event.key: event.count - own.get(event.key, 0) for event in events if event.key in WAITS}
    return {
        "launches": sum(event.count for event in events if any(name in event.key for name in LAUNCHES)) / steps,
        "waits": {name: count / steps for name, count in waits.items() if count},
        "device_ms": sum(event.self_device_time_total for event in on_device) / steps / 1000,
        "top": [{"kernel": event.key[:80], "share": getattr(event, key) / total} for event in top],
    }


def epoch(scale: Scale) -> dict[str, Any]:
    """Seconds of an epoch of both networks on as many images as CIFAR-10 has, half of them in P: bf16, compiled.

    What is trained on are pixels made up, which take as long as real ones. The plain side is a few steps, scaled.
    """
    case = scale.case
    steps = -(-scale.epoch_images // (2 * case.batch))
    bench = bench_of(scale, "bf16", scale is not DRY)
    training, ours = bench.training("reference"), {}
    pixels = torch.from_numpy(waves(scale.epoch_images, case.size, case.channels, np.random.default_rng(0)))
    views = Augmentation(case.size, case.size // 8, True, mean=MEAN, std=STD)
    everyone = TrainingImages(
        pixels.permute(0, 3, 1, 2).contiguous().to(device()), torch.arange(len(pixels)), views, device(), seed=0
    )

    def networks() -> None:
        for turn in (0, 1):
            training.number = turn
            for number in range(steps):
                training.learn(bench.made("reference", number), bench.job.lr)

    def division() -> None:
        for net in training.nets:
            predict(net, everyone, "weak", ("division",), 4 * case.batch)

    for name, work in (("networks", networks), ("division", division)):
        work()  # compiles
        wait()
        start = time.perf_counter()
        work()
        wait()
        ours[name] = time.perf_counter() - start
    plain = bench_of(scale, "no", False).plain()
    plain(0)
    return ours | {"plain": 2 * steps * timed(lambda: plain(0), 0.0, 3), "steps": 2 * steps}


# ---- everything else -------------------------------------------------------------------------------------------------


def views(scale: Scale) -> dict[str, Any]:
    """Images a second of views made on the device."""
    size, rates = 32, {}
    for batch in scale.view_batches:
        pixels = torch.from_numpy(waves(batch, size, 3, np.random.default_rng(0))).permute(0, 3, 1, 2).contiguous()
        images, rows = pixels.to(device()), torch.arange(batch, device=device())
        aug = Augmentation(size, size // 8, True, mean=MEAN, std=STD)
        for kind in ("weak", "strong", "pico_weak", "cr_strong"):
            made = timed(lambda a=aug, k=kind, i=images, r=rows: a.view(k, i, r, (0, k)), min(scale.seconds, 1.0))
            rates[f"{kind}, batches of {batch}"] = batch / made
    return rates


def annotation(scale: Scale) -> dict[str, Any]:
    """Images a second from JPEG files to blocks, beside the bare image tower."""
    from benchmarks import annotate  # open_clip may be missing where only this part needs it

    options = argparse.Namespace(workers=0 if scale is DRY else os.cpu_count(), **scale.annotate)
    with tempfile.TemporaryDirectory() as place:
        bare, whole = annotate.compare_speed(options, Path(place))
    return {"bare": float(bare["images/s"]), "whole": float(whole["images/s"]), "share": float(whole["share of it"])}


def tables(scale: Scale) -> dict[str, Any]:
    """Seconds of the processor for what is done outside the networks, for many images of 10 classes."""
    names = [name for name in growth.WORK if name.startswith("division")] + ["refinement: a round"]
    made = {name: growth.WORK[name](scale.table_images, 10, np.random.default_rng(0)) for name in names}
    seconds = {}
    for name, work in made.items():
        start = time.perf_counter()
        work()
        seconds[name] = time.perf_counter() - start
    return {"images": scale.table_images, "seconds": seconds}


def trainings(scale: Scale) -> dict[str, tuple[str, ...]]:
    """Scripts and options of the trainings on real images."""
    few = str(max(scale.epochs // 2, 1))
    tiny = ("--backbone", "preact_resnet_tiny", "--batch_size", "64") if scale is DRY else ()
    fast = ("--mixed_precision", "bf16", *(() if scale is DRY else ("--compile", "true")))
    half = ("train_coreg.py", *tiny, "--epochs", few, "--warmup_epochs", "2" if scale.epochs > 4 else few)
    whole = (*tiny, "--epochs", str(scale.epochs), *fast)
    return {
        f"Co-Reg, {few} epochs, float32": half,
        f"Co-Reg, {few} epochs, bf16": (*half, *fast),
        "Co-Reg": ("train_coreg.py", *whole, "--warmup_epochs", str(-(-scale.epochs // 4))),
        "partial cross-entropy": ("train_coreg.py", *whole, "--warmup_epochs", str(scale.epochs)),
        "ALIM-Onehot": ("baselines/pll.py", "--method", "alim_onehot", *whole),
    }


def accuracy(scale: Scale, images: Path, output: Path) -> dict[str, Any]:
    """Test accuracy on real images, from candidate sets drawn with q = 0.1 and eta = 0.2.

    What is finished is written at once.

    Args:
        images: zip file that `pack` made. output: JSON file.
    """
    from benchmarks.gpu import write_json  # the program imports this module

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(images) as packed:
            packed.extractall(f"{place}/images")
        store, classes = f"{place}/ann", Path(place) / "classes.txt"
        classes.write_text("\n".join(sorted(one.name for one in (Path(place) / "images" / "train").iterdir())))
        drawn = ("coreg.weak", "--images", f"{place}/images", "--classes", f"{classes}", "--output_dir", store)
        subprocess.run([sys.executable, "-m", *drawn, "--q", "0.1", "--eta", "0.2"], cwd=ROOT, check=True)
        for name, (script, *options) in trainings(scale).items():
            run, start = f"{place}/runs/{len(results)}", time.perf_counter()
            usual = ("--recipe", "cifar10", "--annotations", store, "--refine", "none", "--lr_horizon", "0")
            command = [sys.executable, script, *usual, *options, "--output_dir", run]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            results[name] = {"seconds": time.perf_counter() - start}
            if done.returncode:
                results[name]["error"] = (done.stderr.strip().split("\n") or ["nothing was printed"])[-1]
            else:
                report = read_record(Path(run) / "report.json")
                results[name]["accuracy"] = report["accuracy"]["test"]["ensemble"]
            write_json(output, results)
    return results


def pack(folder: Path, archive: Path, megabytes: float) -> int:
    """All test images and as many training images of every class as fit, as a zip file; gives their number a class.

    Args:
        folder: has train/CLASS/ and test/CLASS/.
    """
    test = sorted((folder / "test").glob("*/*"))
    classes = [sorted(one.iterdir()) for one in sorted((folder / "train").iterdir())]
    room, each = megabytes * 1e6 - sum(file.stat().st_size + 200 for file in test), 0
    while each < min(map(len, classes)):
        room -= sum(files[each].stat().st_size + 200 for files in classes)  # 200: of the file's entries in the archive
        if room < 0:
            break
        each += 1
    with zipfile.ZipFile(archive, "w") as packed:
        for file in (*test, *(file for files in classes for file in files[:each])):
            packed.write(file, file.relative_to(folder))
    return each
