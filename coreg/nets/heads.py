"""Heads: from pooled features (n, d) to logits (n, C), and where their weights start.

PartialCLIP's classifiers (cosine, l2, layernorm): the weight of a class counts by its direction alone. A head takes the
place of a timm model's own classifier, so that the model's `forward` computes it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from coreg.errors import UserError
from coreg.plaintext import one_line

Kind = Literal["cosine", "l2", "layernorm", "projected"]
LAYER_NORM_EPS = 1e-12
TEXT = "text.safetensors"  # beside a tower in its folder


@dataclass(frozen=True)
class ClassText:
    """What the annotator's text side says of the classes, beside its image tower; all float32."""

    features: Tensor  # (C, e), mean over the texts of a class of their features of length 1
    projection: Tensor  # P (e, d), which brings pooled features h (d,) into the space of texts: P h + b
    shift: Tensor  # b (e,)
    scale: float  # of the cosine, by the model itself

    def write(self, folder: Path) -> None:
        """Into a folder with a tower."""
        tensors = {name: getattr(self, name).contiguous() for name in ("features", "projection", "shift")}
        save_file(tensors | {"scale": torch.tensor(self.scale)}, folder / TEXT)

    @classmethod
    def read(cls, folder: Path) -> ClassText:
        """What `write` wrote.

        Raises:
            UserError: the folder has none, or a damaged one.
        """
        try:
            tensors = load_file(folder / TEXT)
            return cls(tensors["features"], tensors["projection"], tensors["shift"], float(tensors["scale"]))
        except Exception as error:  # safetensors lets many kinds through
            reason = one_line(error)
            raise UserError(
                f"{folder / TEXT} holds no text features of classes ({reason}); delete {folder} and give the same command "
                f"again"
            ) from None


class Head(nn.Module):
    """Logits by the directions of the class weights, w_k = weight_k / |weight_k|.

    `cosine`: scale * cos(h, w_k); `l2`: h . w_k; `layernorm`: LN(h) . w_k, without weights of its own; `projected`: cosine
    of P h + b, the embedding in which a CLIP model compares images with texts.
    """

    def __init__(
        self, kind: Kind, weight: Tensor, scale: float = 25.0, projection: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Begin with a weight, of any length.

        Args:
            weight: (C, d), or (C, e) of the embedding. scale: of the cosine. projection: P (e, d) and b (e,), fixed, for
                `projected`.
        """
        super().__init__()
        self.kind, self.scale = kind, scale if kind in ("cosine", "projected") else 1.0
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("bias", None)  # (C,), added to the logits where it is set
        if kind == "projected":
            self.register_buffer("projection", projection[0].clone())
            self.register_buffer("shift", projection[1].clone())
        self.out_features = len(weight)
        self.in_features = (projection[0] if kind == "projected" else weight).shape[1]

    def forward(self, h: Tensor) -> Tensor:
        if self.kind == "projected":
            h = F.linear(h, self.projection, self.shift)
        if self.kind in ("cosine", "projected"):
            h = F.normalize(h, dim=-1)
        elif self.kind == "layernorm":
            h = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
        logits = self.scale * F.linear(h, F.normalize(self.weight, dim=-1))
        return logits if self.bias is None else logits + self.bias

    @torch.no_grad()
    def as_linear(self) -> dict[str, Tensor]:
        """`weight` (C, d) and `bias` (C,) of a linear classifier that ranks the classes of every image as this head does.

        Its logits are this head's (`l2`), or those times a positive number that depends on the image. A bias that a method
        has put here is left out: no linear classifier adds it to the cosine of every image.
        """
        weight = self.scale * F.normalize(self.weight, dim=-1)
        bias = weight.new_zeros(len(weight))
        if self.kind == "projected":
            weight, bias = weight @ self.projection, weight @ self.shift
        elif self.kind == "layernorm":
            weight = weight - weight.mean(dim=1, keepdim=True)
        return {"weight": weight, "bias": bias}


class GatedHeads(nn.Module):
    """Two heads on the same features, and a gate that weighs their predictions (Jia et al., "HTC", AAAI 2024).

    With z and z' the logits of head and tail and pi the class prior of the head's training: p = softmax(z - log(pi + 1e-5))
    and p' = softmax(z'); w = softmax(leaky_relu(gate([p, p']))), brought to length 1; w_1 p + w_2 p' are the logits.
    """

    def __init__(self, head: nn.Module) -> None:
        """Begin with a linear classifier or a `Head`; the tail is a copy of it, and the prior uniform."""
        super().__init__()
        n_classes = head.out_features
        self.head, self.tail = head, copy.deepcopy(head)
        self.gate = nn.Linear(2 * n_classes, 2)
        self.register_buffer("prior", torch.full((n_classes,), 1 / n_classes))
        self.out_features, self.in_features, self.scale = n_classes, head.in_features, getattr(head, "scale", 0.0)

    def forward(self, h: Tensor) -> Tensor:
        return self.fused(self.head(h), self.tail(h), self.prior)

    def fused(self, head: Tensor, tail: Tensor, prior: Tensor) -> Tensor:
        """Logits (n, C) from z and z' (n, C) and pi (C,)."""
        p = torch.softmax(head - torch.log(prior.to(head.dtype) + 1e-5), dim=1)
        q = torch.softmax(tail, dim=1)
        weights = F.normalize(torch.softmax(F.leaky_relu(self.gate(torch.cat([p, q], dim=1))), dim=1), dim=1)
        return weights[:, :1] * p + weights[:, 1:] * q

    def as_linear(self) -> dict[str, Tensor]:
        """`weight` (C, d) and `bias` (C,), if any, of the head alone as a linear classifier."""
        return self.head.as_linear() if isinstance(self.head, Head) else dict(self.head.state_dict())


def random_weight(n_classes: int, width: int) -> Tensor:
    """(C, d) rows of length 1, uniform in a cube, from torch's generator."""
    return F.normalize(torch.empty(n_classes, width).uniform_(-1, 1), dim=1)


def class_features(texts: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """Mean over the texts of each class of their features, which have length 1: (m, e), int64 (m,) -> (C, e)."""
    sums = torch.zeros(n_classes, texts.shape[1], dtype=texts.dtype)
    sums.index_add_(0, classes, texts)
    return sums / torch.bincount(classes, minlength=n_classes).clamp_min(1)[:, None]


def back_projected(text: Tensor, projection: Tensor) -> Tensor:
    """Class weights (C, d) before CLIP's projection P (e, d), of length 1, from text features (C, e): those of t P."""
    return F.normalize(text @ projection, dim=1)


def has_one_linear_classifier(backbone: nn.Module) -> bool:
    """Whether a timm model's logits are a linear function of its pooled features."""
    # two heads with averaged logits, a convolution, or VOLO's second head on all tokens, are none
    return getattr(backbone, "aux_head", None) is None and isinstance(backbone.get_classifier(), nn.Linear | Head)


def put_head(backbone: nn.Module, head: nn.Module) -> None:
    """Let a timm model compute its logits by `head`.

    Raises:
        UserError: it has no single linear classifier.
    """
    own = backbone.get_classifier()
    if not has_one_linear_classifier(backbone):
        raise UserError(
            f"a {type(backbone).__name__} has no single linear classifier in whose place another head could be put; "
            f"choose --head linear, or another --backbone"
        )
    (name,) = [name for name, module in backbone.named_modules() if module is own]
    parent, _, last = name.rpartition(".")
    setattr(backbone.get_submodule(parent), last, head)
