"""Copies that share weights, and what frozen weights save: half their memory in mixed precision.

Frozen blocks before the first trained one keep no graph by themselves: nothing that goes into them wants a gradient.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def sharing_copy(net: Net) -> Net:
    """A copy without gradient that shares the frozen weights of `net` and has the others of its own."""
    shared = {id(weight): weight for weight in net.parameters() if not weight.requires_grad}
    return copy.deepcopy(net, shared).requires_grad_(False)


def moving_weights(copied: nn.Module, net: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights of a `sharing_copy` that are its own, and those of `net` that they follow."""
    pairs = [pair for pair in zip(copied.parameters(), net.parameters()) if pair[1].requires_grad]
    return [own for own, _ in pairs], [followed for _, followed in pairs]


def halve_frozen(net: nn.Module, *copies: nn.Module) -> None:
    """Keep the frozen weights of linear layers and convolutions in bfloat16.

    To be used under autocast to bfloat16, which would round them in every pass: nothing else is computed.

    Args:
        copies: of `net`, in which the same weights are frozen.
    """
    frozen = {name for name, weight in net.named_parameters() if not weight.requires_grad}
    for module in (net, *copies):
        for place, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                # masked weights are in a submodule
                for name, weight in layer.named_parameters(place):
                    if name in frozen:
                        weight.data = weight.data.bfloat16()
