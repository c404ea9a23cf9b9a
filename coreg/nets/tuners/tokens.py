"""Prompts among the tokens of a vision transformer (Jia et al., "Visual Prompt Tuning", ECCV 2022).

They stand after the network's own tokens and are taken away after its last block, so that the pooling, whatever it is,
reads what it was made for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from coreg.nets.tuners.tower import Tower, TunerOptions


class Prompts(nn.Module):
    """`prompt` (n, D), put after the tokens before a block; `_drop_last` takes n tokens away again."""

    def __init__(self, count: int, width: int, bound: float) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))

    def _append(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens, *others = inputs
        return torch.cat([tokens, self.prompt.to(tokens.dtype).expand(tokens.shape[0], -1, -1)], 1), *others

    def _replace(self, block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return self._append(block, (self._drop_last(block, (), inputs[0]), *inputs[1:]))

    def _drop_last(self, block: nn.Module, inputs: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        return tokens[:, : -len(self.prompt)]

    def _without_place(
        self, block: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Rotary positions (.., T, sine and cosine) get one for each prompt that turns nothing."""
        rope = named.get("rope")
        if rope is not None:
            still = rope.new_zeros(*rope.shape[:-2], len(self.prompt), rope.shape[-1])
            still[..., rope.shape[-1] // 2 :] = 1
            named = named | {"rope": torch.cat([rope, still], -2)}
        return inputs, named


def _install(tower: Tower, tuner: str, options: TunerOptions, deep: bool) -> nn.ModuleDict:
    chosen, patch = tower.transformer(tuner), tower.network.patch_embed.proj.weight[0].numel()
    bound = math.sqrt(6 / (patch + tower.width))
    first = min(chosen)
    inserted = nn.ModuleDict()
    for number in chosen if deep else [first]:
        prompts = inserted[str(number)] = Prompts(options.prompt_tokens, tower.width, bound)
        chosen[number].register_forward_pre_hook(prompts._append if number == first else prompts._replace)
    for block in tower.every[first:]:
        block.register_forward_pre_hook(inserted[str(first)]._without_place, with_kwargs=True)
    tower.every[-1].register_forward_hook(inserted[str(first)]._drop_last)
    return inserted


def vpt_shallow(tower: Tower, options: TunerOptions) -> nn.ModuleDict:
    """Prompts before the first chosen block; they go through all blocks from there on."""
    return _install(tower, "vpt_shallow", options, deep=False)


def vpt_deep(tower: Tower, options: TunerOptions) -> nn.ModuleDict:
    """Prompts of its own before each chosen block, in the place of those of the block before."""
    return _install(tower, "vpt_deep", options, deep=True)
