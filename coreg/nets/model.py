"""A classifier with a projection head: what every method here trains."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from coreg.errors import UserError
from coreg.hub import cache_only, hub_answers


def parse_backbone_args(text: str) -> dict[str, Any]:
    """The extra arguments of a backbone, given as JSON on the command line.

    Raises:
        UserError: the text is not a JSON object.
    """
    try:
        arguments = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f'--backbone_args {text} is not JSON ({error}); write for example \'{{"norm": "group"}}\''
        ) from None
    if not isinstance(arguments, dict):
        raise UserError(f'--backbone_args {text} is not a JSON object; write for example \'{{"norm": "group"}}\'')
    return arguments


def check_backbone(name: str, arguments: str = "{}") -> None:
    """Find a wrong name or wrong JSON before any work is done for it.

    Raises:
        UserError: no such model or folder, or `arguments` is not a JSON object.
    """
    parse_backbone_args(arguments)
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "config.json").is_file():
            raise UserError(f"backbone {name}: {folder} holds no config.json; give a folder that timm's save_for_hf wrote")
    elif not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown backbone {name}{hint} (timm.list_models() has them all; a folder is local-dir:PATH)")


def check_weights(name: str) -> None:
    """Find pretrained weights out of reach before any work is done for them; a hub that answers is believed to have them.

    Raises:
        UserError: there are none, neither in the cache nor on the hub.
    """
    if not name.startswith("local-dir:") and _needs_the_hub(name) and not hub_answers():
        raise UserError(
            f"the pretrained weights of {name} are not in the cache and {huggingface_hub.constants.ENDPOINT} cannot be "
            "reached; start on a machine with network, give --backbone local-dir:FOLDER, or train from scratch with "
            "--pretrained false"
        )


def _needs_the_hub(name: str) -> bool:
    """Whether the pretrained weights of a timm model are on the hub and not in its cache on this machine.

    Raises:
        UserError: it has none.
    """
    config = timm.get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(f"backbone {name} has no pretrained weights; train from scratch with --pretrained false")
    files = ("model.safetensors", "pytorch_model.bin")
    return bool(config.hf_hub_id) and not any(
        isinstance(huggingface_hub.try_to_load_from_cache(config.hf_hub_id, file), str) for file in files
    )


def trained_with(name: str) -> tuple[list[float], list[float]] | None:
    """Mean and deviation of the pixels, in 0..1, that a timm model's or folder's weights were trained with, if it tells."""
    if name.startswith("local-dir:"):
        try:
            config = json.loads((Path(name.removeprefix("local-dir:")) / "config.json").read_text(encoding="utf-8"))
            told = config.get("pretrained_cfg", config)
        except (ValueError, AttributeError):
            return None  # `create_backbone` says what is wrong with the folder
    else:
        told = timm.get_pretrained_cfg(name, allow_unregistered=True).to_dict()
    return (list(told["mean"]), list(told["std"])) if {"mean", "std"} <= told.keys() else None


def create_backbone(name: str, n_classes: int, channels: int, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    """Any timm model by name, or `local-dir:FOLDER` with weights, with a classifier of `n_classes`.

    Raises:
        UserError: no such model, an argument it does not take, or weights that cannot be had.
    """
    check_backbone(name)
    local = name.startswith("local-dir:")
    try:
        # what is in the cache is not looked for on the network again
        with cache_only(pretrained and not local and not _needs_the_hub(name)):
            return timm.create_model(
                name, pretrained=pretrained or local, num_classes=n_classes, in_chans=channels, **arguments
            )
    except TypeError as error:
        raise UserError(f"backbone {name} does not take these --backbone_args: {error}") from None
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        first_line = str(error).splitlines()[0]
        way_out = "check the folder" if local else "check the network, or train from scratch with --pretrained false"
        raise UserError(f"backbone {name} could not be loaded ({first_line}); {way_out}") from None


def evaluate_lone_values(net: nn.Module) -> None:
    """Let batch normalisation take its running statistics, as in evaluation, where it gets one value a channel.

    For processes that do not share batch statistics: a process's share of a small batch may be one image, and its feature
    map one pixel, which has no variance. What does share them sees the whole batch.
    """
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(_before_lone_value)
            module.register_forward_hook(_after_lone_value)


def _before_lone_value(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if module.training and inputs[0].numel() == inputs[0].shape[1]:
        module.training, module.lone_value = False, True


def _after_lone_value(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if getattr(module, "lone_value", False):
        module.training, module.lone_value = True, False


class CoRegNet(nn.Module):
    """Backbone, linear classifier and projector: images (n, c, H, W) to logits (n, C) and unit features q (n, dim).

    The projector is Linear(h, h), ReLU, Linear(h, dim), then L2 normalisation, on the pooled features h.
    """

    def __init__(self, backbone: nn.Module, dim: int = 128) -> None:
        super().__init__()
        self.backbone = backbone
        width = backbone.head_hidden_size
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)
        # normalised in float32 or wider, whatever the autocast: contrast divides by small temperatures
        q = self.projector(h)
        return self.backbone.get_classifier()(h), F.normalize(q if q.dtype == torch.float64 else q.float(), dim=-1)

    def logits(self, images: Tensor) -> Tensor:
        """(n, C) without the projector."""
        return self.backbone(images)
