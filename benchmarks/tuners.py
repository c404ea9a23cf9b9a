"""A training step of every tuner beside the bare passes that it needs, its memory beside full tuning, and PEFT's LoRA.

    python -m benchmarks.tuners [--seconds 30] [--mixed_precision bf16]

bare       what no tuner can do without: forward through the frozen network, and backward to the tokens that go into it, or
           to the weights as well for `full`, and with as many tokens as `vpt_deep` has; no losses, inserted modules or
           optimiser. What trains no block, or the last ones alone, needs less.
peft       LoRA by PEFT with as high a rank, on the layer that makes queries, keys and values.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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
NAME, SIZE, CLASSES, BATCH = ("vit_base_patch16_224", 224, 100, 64) if CUDA else ("vit_tiny_patch16_224", 96, 100, 16)
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


def _network(side: str, half: bool) -> nn.Module:
    """With its tuner; of `bare` and `peft`, as these have it."""
    torch.manual_seed(0)
    net = timm.create_model(NAME, img_size=SIZE, num_classes=CLASSES)
    if side in ("bare", "bare vpt_deep"):
        net.requires_grad_(False)
    elif side == "peft":
        net = get_peft_model(net, LoraConfig(r=4, lora_alpha=1, target_modules=["qkv"], modules_to_save=["head"]))
    elif side != "bare full":
        net.tuners = apply_tuners(net, [side.partition(",")[0]], TUNED[side], TunerOptions(CLASSES, bottleneck=4))
    if half:
        halve_frozen(net)
    return net.to("cuda" if CUDA else "cpu")


def _step(side: str, half: bool) -> Callable[[int], None]:
    """One step as a function of its number."""
    net = _network(side, half)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to("cuda" if CUDA else "cpu")
    classes = torch.randint(CLASSES, (BATCH,), generator=generator).to(images.device)
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, fused=CUDA) if weights and not side.startswith("bare") else None
    if side in ("bare", "bare vpt_deep"):
        more = TunerOptions(CLASSES).prompt_tokens if side == "bare vpt_deep" else 0

        def begin(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            tokens = torch.cat([inputs[0], inputs[0].new_zeros(BATCH, more, inputs[0].shape[2])], 1)
            return (tokens.detach().requires_grad_(),)

        net.blocks[0].register_forward_pre_hook(begin)

    def passes() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
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


def _peak_megabytes(side: str | None, half: bool) -> float:
    """Of a process that makes two steps: on the GPU where there is one, else resident."""
    if side is not None:
        step = _step(side, half)
        for number in range(2):
            step(number)
    return (torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e6


def _peaks(sides: Sequence[str], half: bool) -> dict[str, float]:
    """Peak megabytes of every side above a process that does nothing, each in a process of its own."""
    context = multiprocessing.get_context("spawn" if CUDA else "forkserver")
    if not CUDA:
        context.set_forkserver_preload(["coreg.nets.tuners.apply", "coreg.nets.tuners.lora"])
    megabytes = {}
    for side in (None, *sides):
        with context.Pool(1) as pool:
            megabytes[side] = pool.apply(_peak_megabytes, (side, half))
    return {side: megabytes[side] - megabytes[None] for side in sides}


def measure(seconds: float, half: bool = False) -> list[dict[str, Any]]:
    """One row for each tuner and PEFT: trained weights, time by that of the bare passes and of `full`, peak memory."""
    sides = ["bare", "bare full", "bare vpt_deep", *TUNED, "peft"]
    memory = _peaks(sides, half)
    steps = {side: _step(side, half) for side in sides}
    wait = torch.cuda.synchronize if CUDA else lambda: None
    clock = time.perf_counter if CUDA or torch.get_num_threads() > 1 else time.process_time
    rounds = in_turns(steps, seconds, clock, wait)
    rows = []
    for side in [*TUNED, "peft"]:
        floor = f"bare {side}" if side in ("full", "vpt_deep") else "bare"
        weights = sum(weight.numel() for weight in _network(side, half).parameters() if weight.requires_grad)
        rate = BATCH / statistics.median(times[side] for times in rounds)
        rows.append(
            {
                "tuner": "PEFT's lora" if side == "peft" else side,
                "trained weights": f"{weights:,}",
                "images/s": f"{rate:,.0f}",
                "time / bare": f"{ratio(rounds, side, floor):.2f}",
                "time / full": f"{ratio(rounds, side, 'full'):.2f}",
                "peak MB": f"{memory[side]:,.0f}",
                "memory / full": f"{memory[side] / memory['full']:.2f}",
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="for the rounds")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="with frozen weights in bfloat16")
    args = parser.parse_args(argv)
    print(environment() + "\n\n" + as_markdown(measure(args.seconds, args.mixed_precision == "bf16")), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
