"""A classifier with a projection head: what every method here trains."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coreg.errors import UserError
from coreg.hub import cache_only, hub_answers
from coreg.nets.heads import has_one_linear_classifier
from coreg.nets.made_for import own_size
from coreg.nets.tuners.frozen import halve_frozen
from coreg.plaintext import did_you_mean, first_line
from coreg.records import RecordError, parse_record

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def parse_backbone_args(text: str) -> dict[str, Any]:
    """The extra arguments of a backbone, given as JSON on the command line.

    Raises:
        UserError: the text is not a JSON object.
    """
    try:
        return parse_record(text)
    except RecordError as error:
        raise UserError(
            f'--backbone_args {text} is not a JSON object ({error}); write for example \'{{"norm": "group"}}\''
        ) from None


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
        for path in (folder / file for file in WEIGHT_FILES):
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise UserError(f"backbone {name}: {path} is no file; give a folder that timm's save_for_hf wrote")
    elif not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
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
    return bool(config.hf_hub_id) and not any(
        isinstance(huggingface_hub.try_to_load_from_cache(config.hf_hub_id, file), str) for file in WEIGHT_FILES
    )


def on_the_hub(name: str, pretrained: bool) -> dict[str, str]:
    """`base_model`, what the weights that a network starts from are called on the hub; nothing where they are not there."""
    place = timm.get_pretrained_cfg(name) if pretrained and ":" not in name and timm.is_model(name) else None
    return {"base_model": str(place.hf_hub_id)} if place is not None and place.hf_hub_id else {}


def create_backbone(name: str, n_classes: int, channels: int, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    """Any timm model by name, or `local-dir:FOLDER` with weights, with a classifier of `n_classes`.

    Raises:
        UserError: no such model, an argument it does not take, or weights that cannot be had.
    """
    check_backbone(name)
    local = name.startswith("local-dir:")
    try:
        # what is in the cache is not asked for on the network again
        with cache_only(pretrained and not local and not _needs_the_hub(name)):
            return timm.create_model(
                name, pretrained=pretrained or local, num_classes=n_classes, in_chans=channels, **arguments
            )
    except UserError:
        raise
    except TypeError as error:
        raise UserError(f"backbone {name} does not take these --backbone_args: {first_line(error)}") from None
    except Exception as error:  # of whatever kind the architecture's own code raises
        way_out = "choose other --backbone_args or another --backbone"
        if local or pretrained:
            network = "check the network, or train from scratch with --pretrained false"
            way_out = "check the folder" if local else network
        raise UserError(f"backbone {name} could not be loaded ({first_line(error)}); {way_out}") from None


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


class Model(nn.Module):
    """Backbone with its head, and projector: images (n, c, H, W) to logits (n, C) and unit features q (n, dim).

    The projector is Linear(h, h), ReLU, Linear(h, dim), then L2 normalisation, on the pooled features h. The logits are
    those of the backbone's own `forward`, which is what an export computes.

    With tuners the backbone is frozen, but for what they put into it or set free, and for its head: what stays as it was is
    in no checkpoint (`trained`), and frozen batch normalisation keeps its statistics.
    """

    def __init__(self, backbone: nn.Module, dim: int = 128, tuners: nn.ModuleDict | None = None) -> None:
        """Join the parts.

        Args:
            backbone: a timm model with a classifier. dim: length of q.
            tuners: the modules by which it is tuned, which act by hooks (`coreg.nets.tuners.apply_tuners`); weights of the
                backbone that they train have a gradient, all others have none. None where all of it is trained.
        """
        super().__init__()
        self.backbone = backbone
        width = backbone.head_hidden_size
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
        self.linear_head = has_one_linear_classifier(backbone)
        self.tuners = nn.ModuleDict() if tuners is None else tuners
        self.frozen = frozenset() if tuners is None else _frozen(backbone) & self.state_dict().keys()
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.halved = False

    def halve(self, *copies: Model) -> None:
        """Keep frozen weights in bfloat16, here and in copies, and pass under autocast to it from now on."""
        halve_frozen(self, *copies)
        for net in (self, *copies):
            net.halved = True

    def arithmetic(self, images: Tensor) -> AbstractContextManager[object]:
        """What passes are made under, other than what the caller has chosen."""
        return torch.autocast(images.device.type, torch.bfloat16) if self.halved else nullcontext()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of images, or of their pooled features (n, d), where `features_are_fixed`."""
        with self.arithmetic(images):
            return self._outputs(images)

    def _outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.dim() == 2:
            return self.backbone.get_classifier()(images), self._projected(images)
        features = self.backbone.forward_features(images)
        h = self.backbone.forward_head(features, pre_logits=True)
        if self.linear_head:
            logits = self.backbone.get_classifier()(h)
        else:
            logits, h = self.backbone.forward_head(features), h.flatten(1)
        return logits, self._projected(h)

    def _projected(self, h: Tensor) -> Tensor:
        # normalised in float32 or wider, whatever the autocast: contrast divides by small temperatures
        q = self.projector(h)
        return F.normalize(q if q.dtype == torch.float64 else q.float(), dim=-1)

    def logits(self, images: Tensor) -> Tensor:
        """(n, C) without the projector."""
        with self.arithmetic(images):
            return self.backbone(images)

    @property
    def features_are_fixed(self) -> bool:
        """Whether of the backbone nothing but the classifier trains, nothing is inserted, and no dropout is in it."""
        if not (self.linear_head and self.frozen) or self.tuners:
            return False
        head = {id(weight) for weight in self.backbone.get_classifier().parameters()}
        trained = {id(weight) for weight in self.backbone.parameters() if weight.requires_grad}
        chances = (getattr(module, name, 0) for module in self.backbone.modules() for name in ("p", "prob", "drop_prob"))
        return trained <= head and not any(chances)

    def pooled(self, images: Tensor) -> Tensor:
        """Features h (n, d); given these, they are as they were."""
        if images.dim() == 2:
            return images
        with self.arithmetic(images):
            return self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True).flatten(1)

    def trained(self) -> dict[str, Tensor]:
        """What training changes, by name: weights, and statistics of normalisation; all there is of an untuned network."""
        return self.state_dict(keep_vars=True)

    def frozen_hash(self) -> str:
        """SHA-256 (hex) of what `trained` leaves out, which a training that goes on has to find as it was."""
        own, digest = dict(self.named_parameters()) | dict(self.named_buffers()), hashlib.sha256()
        for name in sorted(self.frozen):
            digest.update(name.encode())
            digest.update(own[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def train(self, mode: bool = True) -> Model:
        """Training mode, but for frozen batch normalisation."""
        super().train(mode)
        for name, module in self.backbone.named_modules() if self.frozen else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"backbone.{name}.running_mean" in self.frozen:
                module.eval()
        return self

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Frozen weights, which no state holds, are those that are there."""
        own = dict(self.named_parameters()) | dict(self.named_buffers())
        for name in self.frozen:
            state.setdefault(prefix + name, own[name])
        super()._load_from_state_dict(state, prefix, *rest)


def _frozen(backbone: nn.Module) -> frozenset[str]:
    """Names within a `Model` of what a tuned backbone has unchanged.

    Statistics change where weights of the same module do.
    """
    names = set()
    for place, module in backbone.named_modules(prefix="backbone"):
        weights = dict(module.named_parameters(recurse=False))
        still = {name for name, weight in weights.items() if not weight.requires_grad}
        if len(still) == len(weights):
            still |= dict(module.named_buffers(recurse=False)).keys()
        names |= {f"{place}.{name}" for name in still}
    return frozenset(names)


def _leave_out_frozen(model: Model, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]) -> None:
    for name in model.frozen:
        state.pop(prefix + name, None)


# ---- does it fit? ---------------------------------------------------------------------------------------------------


def check_network(name: str, n_classes: int, size: int, channels: int, arguments: dict[str, Any]) -> None:
    """Pass images through a network as training and an export will, before any work is done for it.

    Args:
        name, n_classes, channels, arguments: as for `create_backbone`. size: side of the images in pixels.

    Raises:
        UserError: they do not pass, or the logits that are trained are not those that an export gives. The message names
            what fits instead.
    """
    with torch.random.fork_rng(devices=[]):
        problem = _problem(name, n_classes, size, channels, arguments)
        if problem is None:
            return
        fitting = []
        own, resized = own_size(name), arguments | {"img_size": size}
        if own not in (None, size) and _fits(name, n_classes, own, channels, arguments):
            fitting.append(f"--image_size {own}")
        if resized != arguments and _fits(name, n_classes, size, channels, resized):
            fitting.append(f"--backbone_args '{json.dumps(resized)}'")
        if arguments and _fits(name, n_classes, size, channels, {}):
            fitting.append("no --backbone_args")
    advice = f"what fits: {' or '.join(fitting)}" if fitting else "choose another one, such as resnet18 or convnext_atto"
    raise UserError(f"backbone {name} cannot be trained on images of {size}x{size} pixels ({problem}); {advice}")


def _fits(name: str, n_classes: int, size: int, channels: int, arguments: dict[str, Any]) -> bool:
    try:
        return _problem(name, n_classes, size, channels, arguments) is None
    except UserError:
        return False


@torch.no_grad()
def _problem(name: str, n_classes: int, size: int, channels: int, arguments: dict[str, Any]) -> str | None:
    """Why a network cannot be trained on such images, in a few words."""
    backbone = create_backbone(name, n_classes, channels, arguments, pretrained=False)
    if not hasattr(backbone, "head_hidden_size") or not hasattr(backbone, "get_classifier"):
        return "it has no pooled features"
    # no constant: of zeros, a fresh network may make zeros on whatever way
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
    try:
        net = Model(backbone).eval()
        exported = net.logits(images[:1])
        if not isinstance(exported, Tensor) or exported.shape != (1, n_classes):
            return f"it gives more or other than {n_classes} logits"
        trained = net(images[:1])[0]
        if not torch.allclose(trained, exported, rtol=1e-3, atol=1e-4):
            return "its logits do not come from its head on pooled features"
        net.train()(images)
    except Exception as error:  # of whatever kind the architecture's own code raises
        return first_line(error)
    return None
