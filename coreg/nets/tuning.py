"""What of a backbone is tuned and which head it gets, as plain values: the same for a training and for an export of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from coreg.errors import UserError
from coreg.nets.heads import ClassText, GatedHeads, Head, back_projected, has_one_linear_classifier, put_head, random_weight
from coreg.nets.tuners.apply import apply_tuners, merge
from coreg.nets.tuners.tower import TunerOptions

COSINE_SCALE = 25.0
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Tuning:
    """What is tuned, and how logits come from pooled features."""

    tuners: tuple[str, ...] = ()  # of `coreg.nets.tuners.apply.TUNERS`; none: the whole network is trained
    blocks: str = "all"  # that they change
    bottleneck: int = 0  # as in `TunerOptions`, and so are the next two
    prompt_tokens: int = 10
    mask_ratio: float = 0.0
    head: str = "linear"  # timm's own classifier, or a kind of `Head`
    head_scale: float = 0.0  # of a cosine; 0: 25, or the annotator's own where features are projected

    def apply(self, backbone: nn.Module, n_classes: int, text: ClassText | None = None) -> nn.ModuleDict | None:
        """Give a timm model of `n_classes` its head, and freeze what is not tuned.

        Args:
            text: where the weights of the head start; at random without it.

        Returns:
            what the tuners inserted; None where the whole network is trained.

        Raises:
            UserError: tuners or head do not fit the network.
        """
        if self.head != "linear":
            put_head(backbone, self._head(backbone, n_classes, text))
        elif text is not None:
            start_head(backbone, back_projected(text.features, text.projection))
        return self._insert(backbone, n_classes) if self.tuners else None

    def separated(self, backbone: nn.Module, tuners: nn.ModuleDict, plain: nn.Module) -> tuple[nn.Module, Tuning, Tensors]:
        """A tuned network as a plain timm model, and what that cannot compute.

        What tuners changed of the weights is merged into them. Where some inserted what is no change of weights, all that
        was inserted stays beside them. The classifier of the plain model is the nearest one to the head (`Head.as_linear`).

        Args:
            backbone: what `apply` was given. tuners: what was inserted; none is none. plain: as it was made by timm.

        Returns:
            `plain` with weights in float32 on the CPU; how the rest is put into it; the rest likewise, `head.NAME`,
            `tuners.NAME`.
        """
        kept, left = (), nn.ModuleDict()
        if self.tuners:
            try:
                backbone = merge(backbone, tuners)
            except UserError:  # prompts, for example, are no change of weights
                kept, left = self.tuners, tuners
        weights, head = plain_weights(backbone), backbone.get_classifier()
        rest = {f"tuners.{name}": value for name, value in left.state_dict().items()}
        rule = replace(self, tuners=kept)
        if isinstance(head, Head | GatedHeads):
            (place,) = [name for name, module in backbone.named_modules() if module is head]
            weights |= {f"{place}.{name}": value for name, value in head.as_linear().items()}
            rest |= {f"head.{name}": value for name, value in head.state_dict().items()}
            rule = replace(rule, head_scale=head.scale)
        own = plain.state_dict()
        # frozen batch normalisation counts no batches
        plain.load_state_dict({name: weights.get(name, own[name]) for name in own})
        return plain, rule, _in_float32(rest)

    def restore(self, plain: nn.Module, rest: Tensors) -> None:
        """Put into a plain timm model what `separated` gave beside it.

        Raises:
            RuntimeError, KeyError: it is something else.
        """
        gated = "head.gate.weight" in rest
        first = "head.head." if gated else "head."
        if self.head != "linear":
            projection = (rest[first + "projection"], rest[first + "shift"]) if self.head == "projected" else None
            head = Head(self.head, rest[first + "weight"], self.head_scale, projection)
            head.bias = rest.get(first + "bias")
            put_head(plain, head)
        if gated:
            put_head(plain, GatedHeads(plain.get_classifier()))
            plain.get_classifier().load_state_dict(_below("head.", rest))
        if self.tuners:
            plain.tuners = self._insert(plain, plain.num_classes)
            plain.tuners.load_state_dict(_below("tuners.", rest))

    def _insert(self, backbone: nn.Module, n_classes: int) -> nn.ModuleDict:
        options = TunerOptions(n_classes, self.bottleneck, self.prompt_tokens, self.mask_ratio)
        return apply_tuners(backbone, self.tuners, self.blocks, options)

    def _head(self, backbone: nn.Module, n_classes: int, text: ClassText | None) -> Head:
        if self.head == "projected":
            if text is None:
                raise UserError("--head projected needs --backbone annotator and --head_init text, whose embedding it is")
            return Head("projected", text.features, self.head_scale or text.scale, (text.projection, text.shift))
        if text is None:
            weight = random_weight(n_classes, backbone.head_hidden_size)
        else:
            weight = back_projected(text.features, text.projection)
        return Head(self.head, weight, self.head_scale or COSINE_SCALE)


def _below(prefix: str, tensors: Tensors) -> Tensors:
    """Those whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def plain_weights(backbone: nn.Module) -> Tensors:
    """Weights by the names of timm, where tuners may have put something in between; float32 on the CPU."""
    state = {
        name.replace("parametrizations.", "").removesuffix(".original") if "parametrizations." in name else name: value
        for name, value in backbone.state_dict().items()
    }
    return _in_float32(state)


def _in_float32(tensors: Tensors) -> Tensors:
    """On the CPU; other than floating numbers stay of their kind."""
    return {
        name: value.detach().cpu().float().contiguous() if value.is_floating_point() else value.cpu().contiguous()
        for name, value in tensors.items()
    }


@torch.no_grad()
def start_head(backbone: nn.Module, weight: Tensor) -> None:
    """Let the classifier of a timm model start from a weight (C, d), without bias.

    Raises:
        UserError: it has no single linear classifier.
    """
    if not has_one_linear_classifier(backbone):
        raise UserError(
            f"a {type(backbone).__name__} has no single linear classifier that could start from given weights; choose "
            f"--head_init random, or another --backbone"
        )
    classifier = backbone.get_classifier()
    classifier.weight.copy_(weight)
    if getattr(classifier, "bias", None) is not None:
        classifier.bias.zero_()
