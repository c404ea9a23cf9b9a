"""Tuners by name: what of a network trains, what is inserted, and one network in which it is merged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from coreg.errors import UserError
from coreg.nets.tuners import inserts, own, tokens
from coreg.nets.tuners.tower import Tower, TunerOptions
from coreg.plaintext import did_you_mean

Tuner = Callable[[Tower, TunerOptions], nn.ModuleDict]
# in the order in which they act where several change the same layer
TUNERS: dict[str, Tuner] = {
    "full": own.full,
    "linear": own.linear,
    "bias": own.bias,
    "ln": own.ln,
    "bn": own.bn,
    "mask": own.mask,
    "vpt_shallow": tokens.vpt_shallow,
    "vpt_deep": tokens.vpt_deep,
    "ssf_attn": inserts.ssf_attn,
    **{name: partial(inserts.beside_blocks, name) for name in inserts.BESIDE},
}
NO_WEIGHTS = {"vpt_shallow", "vpt_deep", "adapter", "adaptformer"}  # they add to tokens, whatever the weights


def check_tuners(names: Sequence[str]) -> None:
    """Find wrong names before any work is done.

    Raises:
        UserError: no such tuner, or two that exclude each other.
    """
    for name in names:
        if name not in TUNERS:
            raise UserError(f"--tuner {name} is none of {', '.join(TUNERS)}{did_you_mean(name, TUNERS)}")
    if {"vpt_shallow", "vpt_deep"} <= set(names):
        raise UserError("--tuner has both vpt_shallow and vpt_deep, which exclude each other; leave out one")


def apply_tuners(backbone: nn.Module, names: Sequence[str], blocks: str, options: TunerOptions) -> nn.ModuleDict:
    """Freeze a timm network but for its classifier, and let the tuners say what trains.

    What is inserted works by hooks: the network's own forward passes stay, and so do the names of its weights (but for mask
    tuning, where they are `parametrizations.NAME.original`). Random numbers come from torch's generator.

    Args:
        names: of `TUNERS`, in whatever order. blocks: which transformer blocks, see `parse_blocks`.

    Returns:
        what was inserted, all of which trains: by tuner, number of the block, and layer.

    Raises:
        UserError: a tuner or blocks that do not fit the network.
    """
    check_tuners(names)
    tower = Tower(backbone, blocks)
    backbone.requires_grad_(False)
    inserted = {name: tuner(tower, options) for name, tuner in TUNERS.items() if name in names}
    classifier = backbone.get_classifier()
    if isinstance(classifier, nn.Module):
        classifier.requires_grad_(True)
    return nn.ModuleDict({name: modules for name, modules in inserted.items() if modules})


def merge(backbone: nn.Module, tuners: nn.ModuleDict) -> nn.Module:
    """A copy of the network with what the tuners learned in its own weights and nothing inserted.

    Args:
        backbone, tuners: what went into `apply_tuners` and came out of it; they stay as they are.

    Raises:
        UserError: a tuner that is no change of weights, such as prompts or adapters.
    """
    for name in set(tuners) & NO_WEIGHTS:
        raise UserError(f"what {name} inserted is no change of the network's weights and cannot be merged into them")
    backbone, tuners = copy.deepcopy((backbone, tuners))
    for weight in backbone.parameters():
        if weight.dtype == torch.bfloat16:
            weight.data = weight.data.float()
    mine = set(tuners.modules())
    for layer in backbone.modules():
        for key, hook in list(layer._forward_hooks.items()):
            if getattr(hook, "__self__", None) in mine:
                hook.__self__.fold(layer)
                del layer._forward_hooks[key]
    return backbone
