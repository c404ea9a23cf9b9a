"""Tuning a network's own weights: all of them, biases, normalisation, or a random few entries (mask tuning).

Nothing is inserted but what mask tuning scatters; each function says which weights train and returns what was inserted.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
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


# On a CPU, a product and sum for each entry that trains takes less time than the matrix product that gives the gradients of
# all, as long as they are so few of them; a GPU is quicker with the matrix product.
FEW = 1 / 250


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
                self.register_buffer(f"{name}_places", _places(chosen), persistent=False)
                self.register_parameter(f"{name}_values", nn.Parameter(getattr(layer, name).detach()[chosen]))
                parametrize.register_parametrization(layer, name, _Scattered(self, name), unsafe=True)
        self.apart = False  # gradients of the weight's entries are made apart, in the pass that the layer is in
        if list(self.parameters()):
            layer.register_forward_pre_hook(self._begin)
            layer.register_forward_hook(self._end)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        for name, mask in list(self.named_buffers()):
            if name.endswith("_mask"):
                setattr(self, name.replace("_mask", "_places"), _places(mask))

    def _begin(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        few = hasattr(self, "weight_mask") and len(self.weight_values) <= FEW * self.weight_mask.numel()
        self.apart = few and inputs[0].device.type == "cpu" and not is_compiling()

    def _end(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.apart:
            self.apart = False
            return _EntriesAlone.apply(output, inputs[0], self.weight_values, self.weight_places)
        return output

    def fold(self, layer: nn.Module) -> None:
        """Make the layer's weights what they are computed to be."""
        for key, hook in list(layer._forward_pre_hooks.items()):
            if getattr(hook, "__self__", None) is self:
                del layer._forward_pre_hooks[key]
        tensors = {name: getattr(layer, name).detach() for name in layer.parametrizations}
        # torch's own function would change the class that copies share
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        for name, tensor in tensors.items():
            layer.register_parameter(name, nn.Parameter(tensor))


def _places(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().squeeze(1)


class _Scattered(nn.Module):
    """A frozen tensor with the entries that train in their places."""

    def __init__(self, entries: MaskedEntries, name: str) -> None:
        super().__init__()
        # no submodule: the entries belong to the tuners alone
        self._entries, self._name = (entries,), name

    def forward(self, frozen: Tensor) -> Tensor:
        entries = self._entries[0]
        values = getattr(entries, f"{self._name}_values").to(frozen.dtype)
        if entries.apart and self._name == "weight":
            values = values.detach()
        return frozen.flatten().index_copy(0, getattr(entries, f"{self._name}_places"), values).view_as(frozen)


class _EntriesAlone(torch.autograd.Function):
    """A linear layer's output (.., R) as it is, with gradients for m entries of its weight (R, C) and for no others."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, values: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, places)
        ctx.dtype = values.dtype
        return output.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, places = ctx.saved_tensors
        rows, columns = places // inputs.shape[-1], places % inputs.shape[-1]
        products = _columns(gradient, rows).to(ctx.dtype).mul_(_columns(inputs, columns))
        return gradient, None, products.sum(0), None


def _columns(tensor: Tensor, columns: Tensor) -> Tensor:
    return tensor.flatten(0, -2).index_select(1, columns)
