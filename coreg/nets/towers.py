"""Image towers of open_clip and of transformers in timm's form, so that they are backbones like every other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import byobnet, vision_transformer
from torch import Tensor, nn

from coreg.errors import UserError

# timm's names by the number of blocks of each stage of a CLIP ResNet
RESNETS = {
    (3, 4, 6, 3): "resnet50_clip",
    (3, 4, 23, 3): "resnet101_clip",
    (4, 6, 10, 6): "resnet50x4_clip",
    (6, 8, 18, 8): "resnet50x16_clip",
    (3, 15, 36, 10): "resnet50x64_clip",
}
# a ViT of whatever size is one of these with other arguments, which differ in the epsilon of their normalisation
CLIP, SIGLIP = "vit_base_patch32_clip_224", "vit_base_patch16_siglip_224"
ACTIVATIONS = {
    "QuickGELU": "quick_gelu",
    "QuickGELUActivation": "quick_gelu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
}
TRANSFORMERS = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "pre_layrnorm.": "norm_pre.",
    "post_layernorm.": "norm.",
    "encoder.layers.": "blocks.",
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
    "self_attn.out_proj.": "attn.proj.",
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj.": "attn_pool.proj.",
    "head.layernorm.": "attn_pool.norm.",
    "head.mlp.": "attn_pool.mlp.",
}
Weights = dict[str, Tensor]


@dataclass
class ImageTower:
    """An image tower as a timm model without a classifier."""

    architecture: str  # timm's name
    arguments: dict[str, Any]  # that the model was made with
    network: nn.Module
    # P (e, d) and b (e,), which make of pooled features what is compared with texts; None where that is not linear
    projection: tuple[Tensor, Tensor] | None


def timm_tower(clip: nn.Module, size: int) -> ImageTower:
    """The image tower of a model of the CLIP family, on the CPU in evaluation mode.

    Args:
        clip: of open_clip or transformers, in float32 on the CPU. size: side of its images in pixels.

    Raises:
        UserError: it is of a kind that is not known here.
        Exception: of any other kind, where weights do not fit the network that they should.
    """
    visual = getattr(clip, "visual", None)
    visual = visual if visual is not None else getattr(clip, "vision_model", None)
    kinds = {
        "VisionTransformer": _of_open_clip,
        "TimmModel": _of_timm,
        "ModifiedResNet": _of_resnet,
        "CLIPVisionModel": _of_transformers,
        "CLIPVisionTransformer": _of_transformers,
        "SiglipVisionModel": _of_transformers,
        "SiglipVisionTransformer": _of_transformers,
    }
    kind = type(visual).__name__
    if kind not in kinds:
        raise UserError(f"a {kind} is neither a ViT nor a ResNet of the CLIP family")
    architecture, arguments, weights, projection = kinds[kind](visual, size)
    network = timm.create_model(architecture, num_classes=0, **arguments)
    if kind == "VisionTransformer":
        weights = vision_transformer.checkpoint_filter_fn(weights, network)
    elif kind == "ModifiedResNet":
        weights = byobnet.checkpoint_filter_fn(weights, network)
    own = ("head.weight", "head.bias", "head.proj.weight", "head.proj.bias")  # of the classifier
    network.load_state_dict({name: value for name, value in weights.items() if name not in own})
    if hasattr(clip, "visual_projection"):
        projection = _linear(clip.visual_projection)
    return ImageTower(architecture, arguments, network.eval(), projection)


Parts = tuple[str, dict[str, Any], Weights, tuple[Tensor, Tensor] | None]


def _of_open_clip(visual: nn.Module, size: int) -> Parts:
    block = visual.transformer.resblocks[0]
    arguments = _shape(size, visual.conv1, visual.transformer.resblocks, block.attn.num_heads, block.mlp.c_fc)
    arguments["act_layer"] = ACTIVATIONS[type(block.mlp.gelu).__name__]
    if visual.pool_type == "avg":
        arguments |= {"global_pool": "avg", "fc_norm": visual.final_ln_after_pool}
    projection = visual.proj.detach().T, torch.zeros(visual.proj.shape[1])
    return CLIP, arguments, {f"visual.{name}": value for name, value in visual.state_dict().items()}, projection


def _of_resnet(visual: nn.Module, size: int) -> Parts:
    depths = tuple(len(getattr(visual, f"layer{stage}")) for stage in (1, 2, 3, 4))
    weights = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    return RESNETS[depths], {"img_size": size}, weights, _linear(visual.attnpool.c_proj)


def _of_timm(visual: nn.Module, size: int) -> Parts:
    trunk = visual.trunk
    arguments: dict[str, Any] = {}
    if hasattr(trunk, "patch_embed"):
        arguments = {"img_size": size, "global_pool": trunk.global_pool}
        if hasattr(trunk, "fc_norm"):
            arguments["fc_norm"] = not isinstance(trunk.fc_norm, nn.Identity)
    own = trunk.get_classifier()
    after = dict(visual.head.named_children())
    projection = None
    if isinstance(own, nn.Linear):  # the projection is timm's own classifier
        projection = _linear(own)
    elif "proj" in after:
        projection = _linear(after["proj"])
    elif not after:
        width = trunk.head_hidden_size
        projection = torch.eye(width), torch.zeros(width)
    classifier = {f"{name}." for name, module in trunk.named_modules() if module is own and name}
    weights = {name: w for name, w in trunk.state_dict().items() if not name.startswith(tuple(classifier))}
    return trunk.pretrained_cfg["architecture"], arguments, weights, projection


def _of_transformers(visual: nn.Module, size: int) -> Parts:
    visual = getattr(visual, "vision_model", visual)
    layers = visual.encoder.layers
    heads, patches = visual.config.num_attention_heads, visual.embeddings.patch_embedding
    arguments = _shape(size, patches, layers, heads, layers[0].mlp.fc1)
    arguments["act_layer"] = ACTIVATIONS[type(layers[0].mlp.activation_fn).__name__]
    weights: Weights = {}
    for name, value in visual.state_dict().items():
        for theirs, ours in TRANSFORMERS.items():
            name = name.replace(theirs, ours)
        weights[name] = value
    for name in [name for name in weights if ".self_attn.q_proj." in name]:
        parts = [weights.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        weights[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
    for kind in ("weight", "bias"):
        if (packed := weights.pop(f"head.attention.in_proj_{kind}", None)) is not None:
            q, k, v = packed.chunk(3)
            weights |= {f"attn_pool.q.{kind}": q, f"attn_pool.kv.{kind}": torch.cat([k, v])}
    weights["pos_embed"] = weights["pos_embed"][None]
    if "cls_token" not in weights:
        width = arguments["embed_dim"]
        return SIGLIP, arguments, weights, (torch.eye(width), torch.zeros(width))
    weights["cls_token"] = weights["cls_token"].view(1, 1, -1)
    return CLIP, arguments, weights, None


def _shape(size: int, patches: nn.Conv2d, blocks: nn.ModuleList, heads: int, first: nn.Linear) -> dict[str, Any]:
    """The arguments that make a timm ViT of this shape."""
    return {
        "img_size": size,
        "patch_size": patches.kernel_size[0],
        "embed_dim": patches.out_channels,
        "depth": len(blocks),
        "num_heads": heads,
        "mlp_ratio": first.out_features / first.in_features,
    }


def _linear(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
    return layer.weight.detach(), bias
