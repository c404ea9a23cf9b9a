"""Small modules beside a transformer's own layers: adapters, AdaptFormer, LoRA, scaling and shifting (SSF).

Each is put in place by hooks that are its own methods, so that no forward pass is written again and a copy of a network
works with copies of its modules. `fold`, where there is one, moves what was learned into the layer's own weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from timm.layers import AttentionPool2d
from torch import Tensor, nn

from coreg.errors import UserError
from coreg.nets.tuners.tower import Tower, TunerOptions


def default_bottleneck(n_classes: int, depth: int) -> int:
    """2^max(0, floor(log2(K / 2L))) for K classes and a network of L blocks."""
    return 2 ** max(0, math.floor(math.log2(n_classes / (2 * depth))))


# ---- adapters -------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """A(u) = W_up relu(W_down norm(u) + b_down) + b_up, zero at first: (.., D) to (.., D)."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.down_proj, self.up_proj = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width)
        nn.init.kaiming_normal_(self.down_proj.weight, a=math.sqrt(5))
        for zero in (self.down_proj.bias, self.up_proj.weight, self.up_proj.bias):
            nn.init.zeros_(zero)

    def forward(self, tokens: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """`scale` times A, which is cheaper in the few weights of the last layer than in all of its outputs."""
        hidden = self.down_proj(self.ln(tokens)).relu()
        return nn.functional.linear(hidden, scale * self.up_proj.weight, scale * self.up_proj.bias)


class Adapter(Bottleneck):
    """m + A(m), where m is what the MLP adds to the tokens (Houlsby et al., ICML 2019)."""

    def __init__(self, block: nn.Module, width: int, bottleneck: int) -> None:
        super().__init__(width, bottleneck)
        block.drop_path2.register_forward_hook(self._add)  # after a layer scale, where there is one

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self(output)


class AdaptFormer(Bottleneck):
    """x + MLP(norm2(x)) + s A(x), s learned and 1 at first (Chen et al., "AdaptFormer", NeurIPS 2022)."""

    def __init__(self, block: nn.Module, width: int, bottleneck: int) -> None:
        super().__init__(width, bottleneck)
        self.scale = nn.Parameter(torch.ones(1))
        self._tokens: list[Tensor] = []
        block.norm2.register_forward_pre_hook(self._keep)
        block.drop_path2.register_forward_hook(self._add)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._tokens = [inputs[0]]

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (tokens,), self._tokens = self._tokens, []
        return output + self(tokens, self.scale)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """h A B / r for a linear layer's input h: A (in, r), uniform within 1 / sqrt(r) at first, and B (r, out), zero."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.empty(inputs, rank)), nn.Parameter(torch.zeros(rank, outputs))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @property
    def up(self) -> Tensor:
        """B / r."""
        return self.lora_B / self.lora_B.shape[0]


class LowRankLayer(LowRank):
    """Added to the output of a linear layer."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__(layer.in_features, layer.out_features, rank)
        layer.register_forward_hook(self._add)

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return _add_product(output, inputs[0] @ self.lora_A, self.up)

    @torch.no_grad()
    def fold(self, layer: nn.Linear) -> None:
        layer.weight += (self.lora_A @ self.up).T


class LowRankQueryValue(nn.Module):
    """Added to queries and values, with matrices of their own, where one layer makes queries, keys and values."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.q, self.v = (LowRank(layer.in_features, layer.out_features // 3, rank) for _ in range(2))
        layer.register_forward_hook(self._add)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        q, v = self.q.up, self.v.up
        none = torch.zeros_like(q)
        up = torch.cat([torch.cat([q, none, none], 1), torch.cat([none, none, v], 1)])
        return torch.cat([self.q.lora_A, self.v.lora_A], 1), up

    def _add(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down, up = self._matrices()
        return _add_product(output, inputs[0] @ down, up)

    @torch.no_grad()
    def fold(self, layer: nn.Linear) -> None:
        down, up = self._matrices()
        layer.weight += (down @ up).T


def _add_product(output: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`output` (.., out) + `down` (.., r) `up` (r, out), in one pass over the output."""
    return torch.addmm(output.flatten(0, -2), down.flatten(0, -2), up).view_as(output)


def _attention_layers(block: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of a block's attention by name: `qkv`, or `q_proj`, `k_proj` and `v_proj`, and `proj`."""
    if getattr(block.attn, "q_bias", None) is not None:
        # otherwise the weight of `qkv` is read without calling it, and no hook runs
        block.attn.qkv_bias_separate = True
    return _linear_layers(block.attn)


def _linear_layers(part: nn.Module) -> dict[str, nn.Linear]:
    return {name.replace(".", "_"): layer for name, layer in part.named_modules() if isinstance(layer, nn.Linear)}


def _lora(block: nn.Module, width: int, rank: int) -> nn.ModuleDict:
    layers = _attention_layers(block)
    if "qkv" in layers:
        return nn.ModuleDict({"qkv": LowRankQueryValue(layers["qkv"], rank)})
    return nn.ModuleDict({name: LowRankLayer(layers[name], rank) for name in ("q_proj", "v_proj")})


def _on_layers(layers: dict[str, nn.Module], make: Callable[[nn.Module], nn.Module]) -> nn.ModuleDict:
    return nn.ModuleDict({name: make(layer) for name, layer in layers.items()})


# ---- scaling and shifting -------------------------------------------------------------------------------------------


class ScaleShift(nn.Module):
    """y * scale + shift on a layer's output (Lian et al., NeurIPS 2022), at first from N(1, 0.02^2) and N(0, 0.02^2)."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        nn.init.normal_(self.scale, 1, 0.02)
        nn.init.normal_(self.shift, 0, 0.02)
        layer.register_forward_hook(self._change)

    def _change(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.addcmul(self.shift, output, self.scale).to(output.dtype)

    @torch.no_grad()
    def fold(self, layer: nn.Module) -> None:
        """Into a linear layer or a normalisation.

        Raises:
            UserError: it has no bias for the shift.
        """
        if getattr(layer, "bias", None) is None:
            raise UserError("ssf cannot be merged into layers without a bias; leave its modules beside the network")
        layer.weight *= self.scale.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.bias.copy_(layer.bias * self.scale + self.shift)


def ssf_attn(tower: Tower, options: TunerOptions) -> nn.ModuleDict:
    """After the projections of attention, or after a CLIP ResNet's attention pooling."""
    pool = getattr(tower.network, "head", None)
    if isinstance(pool, AttentionPool2d) and pool.v is not None:
        # its weights over the places add up to one, so that it makes no difference whether values or their mean are changed
        return nn.ModuleDict({"pool": nn.ModuleDict({"v": _after_linear(pool.v)})})
    blocks = tower.transformer("ssf_attn")
    return nn.ModuleDict({str(k): _on_layers(_attention_layers(block), _after_linear) for k, block in blocks.items()})


def _after_linear(layer: nn.Linear) -> ScaleShift:
    return ScaleShift(layer, layer.out_features)


# ---- beside each block ----------------------------------------------------------------------------------------------

# tuner -> (block of the tower, width of its tokens, width of adapters or rank) -> what is inserted beside it
BESIDE: dict[str, Callable[[nn.Module, int, int], nn.Module]] = {
    # after the linear layers of the MLP
    "ssf_mlp": lambda block, width, _: _on_layers(_linear_layers(block.mlp), _after_linear),
    # after the normalisations before attention and MLP
    "ssf_ln": lambda block, width, _: nn.ModuleDict(
        {name: ScaleShift(getattr(block, name), width) for name in ("norm1", "norm2")}
    ),
    # on queries and values (Hu et al., ICLR 2022), with alpha 1; PEFT's would adapt keys too, with A shared
    "lora": _lora,
    # on the linear layers of the MLP, with alpha 1
    "lora_mlp": lambda block, _, rank: _on_layers(_linear_layers(block.mlp), lambda m: LowRankLayer(m, rank)),
    # a bottleneck after the MLP
    "adapter": Adapter,
    # a bottleneck beside the MLP
    "adaptformer": AdaptFormer,
}


def beside_blocks(tuner: str, tower: Tower, options: TunerOptions) -> nn.ModuleDict:
    """What a tuner of `BESIDE` inserts, by the number of each chosen block."""
    blocks = tower.transformer(tuner)
    size = options.bottleneck or default_bottleneck(options.n_classes, tower.depth)
    return nn.ModuleDict({str(number): BESIDE[tuner](block, tower.width, size) for number, block in blocks.items()})
