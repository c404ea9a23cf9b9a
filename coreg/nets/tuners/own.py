"""Tuning a network's own weights: all of them, biases, normalisation, or a random few entries (mask tuning).

Nothing is inserted but what mask tuning scatters; each function says which weights train and returns what was inserted.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreg.errors import UserError
from coreg.nets.tuners.tower import Tower, TunerOptions


def full(tower: Tower, options: TunerOptions) -> nn.ModuleDict:
    """All weights of the chosen blocks; with all blocks chosen those outside of them too: the whole network."""
    for part in [tower.network] if len(tower.chosen) == tower.depth else tower.chosen.values():
        part.requires_grad_(True)
    return nn.ModuleDict()


def linear(tower: Tower, options: TunerOptions) -> nn.ModuleDict:
    """Nothing but the classifier, which always trains (linear probing)."""
    return nn.ModuleDict()


def bias(tower: Tower, options: TunerOptions) -> nn.ModuleDict:
    """Every bias in the chosen blocks (Ben Zaken et al., "BitFit", ACL 2022), of a ResNet every bias."""
    return _train("bias", tower, [w for part in tower.parts() for n, w in part.named_parameters() if n.endswith("bias")])


def ln(tower: Tower, options: TunerOptions) -> nn.ModuleDict:
    """Weight and bias of every layer normalisation in the chosen blocks."""
    return _train("ln", tower, _weights_of(tower, nn.LayerNorm))


def bn(tower: Tower, options: TunerOptions) -> nn.ModuleDict:
    """Weight and bias of every batch normalisation."""
    return _train("bn", tower, _weights_of(tower, nn.modules.batchnorm._BatchNorm))


def _weights_of(tower: Tower, kind: type[nn.Module]) -> list[nn.Parameter]:
    return [w for part in tower.parts() for m in part.modules() if isinstance(m, kind) for w in m.parameters()]


def _train(name: str, tower: Tower, weights: list[nn.Parameter]) -> nn.ModuleDict:
    if not weights:
        raise UserError(
            f"--tuner {name} finds nothing to train in {tower.kind}; choose another tuner, such as full or linear"
        )
    for weight in weights:
        weight.requires_grad_(True)
    return nn.ModuleDict()


def default_mask_ratio(n_classes: int, depth: int, width: int) -> float:
    """max(0.001, K / 12LD rounded down to thousandths), for K classes and L blocks of width D."""
    return max(0.001, math.floor(n_classes / (12 * depth * width) / 0.001) * 0.001)


def mask(tower: Tower, options: TunerOptions) -> nn.ModuleDict:
    """A random few entries of weights and biases of every linear layer in the chosen blocks.

    The entries are drawn by one generator that begins with seed 0 and goes through the blocks in order.
    """
    ratio = options.mask_ratio or default_mask_ratio(options.n_classes, tower.depth, tower.width)
    generator = torch.Generator().manual_seed(0)
    inserted = nn.ModuleDict()
    for number, block in tower.transformer("mask").items():
        layers = {name.replace(".", "_"): m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
        inserted[str(number)] = nn.ModuleDict({n: MaskedEntries(m, ratio, generator) for n, m in layers.items()})
    return inserted


class MaskedEntries(nn.Module):
    """The entries of one linear layer that train: `weight_values` (m,) and `bias_values` (b,), in row-major order.

    They are put into the frozen weight before it is read, whoever reads it. Which they are is in the buffers
    `weight_mask` and `bias_mask`, and so in every checkpoint.
    """

    def __init__(self, layer: nn.Linear, ratio: float, generator: torch.Generator) -> None:
        super().__init__()
        (rows, columns), has_bias = layer.weight.shape, layer.bias is not None
        # the bias is the last column of one matrix with the weight
        count = rows * (columns + has_bias)
        drawn = torch.zeros(count, dtype=torch.bool)
        drawn[torch.randperm(count, generator=generator)[: int(count * ratio)]] = True
        drawn = drawn.view(rows, -1).to(layer.weight.device)
        for name, chosen in {"weight": drawn[:, :columns], "bias": drawn[:, -1]}.items():
            if getattr(layer, name) is not None and chosen.any():
                self.register_buffer(f"{name}_mask", chosen.clone())
                self.register_parameter(f"{name}_values", nn.Parameter(getattr(layer, name).detach()[chosen]))
                parametrize.register_parametrization(layer, name, _Scattered(self, name), unsafe=True)


class _Scattered(nn.Module):
    """A frozen tensor with the entries that train in their places."""

    def __init__(self, entries: MaskedEntries, name: str) -> None:
        super().__init__()
        # no submodule: the entries belong to the tuners alone
        self._entries, self._name = (entries,), name

    def forward(self, frozen: Tensor) -> Tensor:
        entries = self._entries[0]
        values = getattr(entries, f"{self._name}_values")
        return frozen.masked_scatter(getattr(entries, f"{self._name}_mask"), values.to(frozen.dtype))
