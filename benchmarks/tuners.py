"""A training step of every tuner beside the bare passes that it needs, its memory beside full tuning, and PEFT's LoRA.

    python -m benchmarks.tuners [--seconds 30] [--mixed_precision bf16]
    python -m benchmarks.tuners --network vit_small_patch16_224 --size 224 --batch 4

bare       what no tuner can do without: forward through the frozen network, and backward to the tokens that go into it, or
           to the weights as well for `full`, and with as many tokens as `vpt_deep` has; no losses, inserted modules or
           optimiser. What trains no block, or the last ones alone, needs less.
peft       LoRA by PEFT with as high a rank, on the layer that makes queries, keys and values.

Each takes turns with its bare passes alone. On a CPU the C library keeps the memory that it once got: else it depends on
what ran before in the process whether a side gives its own back in every step, and pays in page faults, up to 7% of
its time.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.tables import as_markdown, environment
from benchmarks.turns import in_turns, ratio
from coreg.nets.tuners.apply import apply_tuners
from coreg.nets.tuners.frozen import halve_frozen
from coreg.nets.tuners.tower import TunerOptions

CUDA = torch.cuda.is_available()
CLASSES = 100
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's numbers for `mallopt`
TUNED = {
    "full": "all",
    "linear": "all",
    "bias": "all",
    "ln": "all",
    "ssf_attn": "all",
    "mask": "all",
    "lora": "all",
    "adaptformer": "all",
    "vpt_deep": "all",
    "lora, last:4": "last:4",
}


@dataclass(frozen=True)
class Case:
    """What is tuned: a vision transformer of timm, on images of `size` pixels; `half`: in bf16, frozen weights as well."""

    network: str = "vit_base_patch16_224" if CUDA else "vit_tiny_patch16_224"
    size: int = 224 if CUDA else 96
    batch: int = 64 if CUDA else 16
    half: bool = False


def _network(side: str, case: Case) -> nn.Module:
    """With its tuner; of `bare` and `peft`, as these have it."""
    torch.manual_seed(0)
    net = timm.create_model(case.network, img_size=case.size, num_classes=CLASSES)
    if side in ("bare", "bare vpt_deep"):
        net.requires_grad_(False)
    elif side == "peft":
        net = get_peft_model(net, LoraConfig(r=4, lora_alpha=1, target_modules=["qkv"], modules_to_save=["head"]))
    elif side != "bare full":
        net.tuners = apply_tuners(net, [side.partition(",")[0]], TUNED[side], TunerOptions(CLASSES, bottleneck=4))
    if case.half:
        halve_frozen(net)
    return net.to("cuda" if CUDA else "cpu")


def step_of(side: str, case: Case) -> Callable[[int], None]:
    """One step as a function of its number."""
    net = _network(side, case)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.size, case.size, generator=generator).to("cuda" if CUDA else "cpu")
    classes = torch.randint(CLASSES, (case.batch,), generator=generator).to(images.device)
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, fused=True) if weights and not side.startswith("bare") else None
    if side in ("bare", "bare vpt_deep"):
        more = TunerOptions(CLASSES).prompt_tokens if side == "bare vpt_deep" else 0

        def begin(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            tokens = torch.cat([inputs[0], inputs[0].new_zeros(case.batch, more, inputs[0].shape[2])], 1)
            return (tokens.detach().requires_grad_(),)

        net.blocks[0].register_forward_pre_hook(begin)

    def passes() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=case.half):
            logits = net(images)
        return logits.sum() if optimizer is None else nn.functional.cross_entropy(logits.float(), classes)

    def step(number: int) -> None:
        passes().backward()
        if optimizer is None:
            net.zero_grad(set_to_none=True)
        else:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def _peak_megabytes(side: str | None, case: Case) -> float:
    """Of a process that makes two steps: on the GPU where there is one, else resident."""
    if side is not None:
        step = step_of(side, case)
        for number in range(2):
            step(number)
    return (torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e6


def _keep_memory() -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        library.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


def _in_turns(sides: Sequence[str], case: Case, seconds: float) -> list[dict[str, float]]:
    """Rounds of some sides alone."""
    _keep_memory()
    wait = torch.cuda.synchronize if CUDA else lambda: None
    clock = time.perf_counter if CUDA or torch.get_num_threads() > 1 else time.process_time
    return in_turns({side: step_of(side, case) for side in sides}, seconds, clock, wait)


def measure(seconds: float, case: Case = Case()) -> list[dict[str, Any]]:
    """One row for each tuner and PEFT: trained weights, time by that of the bare passes and of `full`, peak memory.

    Every measurement is made in a process of its own, and peaks are above that of one that does nothing.
    """
    context = multiprocessing.get_context("spawn" if CUDA else "forkserver")
    if not CUDA:
        context.set_forkserver_preload(["coreg.nets.tuners.apply", "coreg.nets.tuners.lora"])

    def apart(function: Callable[..., Any], *arguments: Any) -> Any:
        with context.Pool(1) as pool:
            return pool.apply(function, arguments)

    nothing, rows, full = apart(_peak_megabytes, None, case), [], {}
    for side in [*TUNED, "peft"]:
        floor = f"bare {side}" if side in ("full", "vpt_deep") else "bare"
        rounds = apart(_in_turns, sorted({side, floor, "bare"}), case, seconds / (len(TUNED) + 1))
        megabytes = apart(_peak_megabytes, side, case) - nothing
        full = full or {"time": ratio(rounds, side, "bare"), "memory": megabytes}
        weights = sum(weight.numel() for weight in _network(side, case).parameters() if weight.requires_grad)
        rows.append(
            {
                "tuner": "PEFT's lora" if side == "peft" else side,
                "trained weights": f"{weights:,}",
                "images/s": f"{case.batch / statistics.median(times[side] for times in rounds):,.1f}",
                "time / bare": f"{ratio(rounds, side, floor):.2f}",
                "time / full": f"{ratio(rounds, side, 'bare') / full['time']:.2f}",
                "peak MB": f"{megabytes:,.0f}",
                "memory / full": f"{megabytes / full['memory']:.2f}",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="for the rounds")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="with frozen weights in bfloat16")
    parser.add_argument("--network", default=Case.network, help="any vision transformer of timm")
    parser.add_argument("--size", type=int, default=Case.size, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=Case.batch, help="images a step")
    args = parser.parse_args(argv)
    case = Case(args.network, args.size, args.batch, args.mixed_precision == "bf16")
    print(environment() + "\n\n" + as_markdown(measure(args.seconds, case)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
