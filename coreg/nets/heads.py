"""Heads: from pooled features (n, d) to logits (n, C), and where their weights start.

PartialCLIP's classifiers (cosine, l2, layernorm): the weight of a class counts by its direction alone. A head takes the
place of a timm model's own classifier, so that the model's `forward` computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from coreg.errors import UserError

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
            reason = " ".join(str(error).split())[:150]
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
        # none of its own: a method's correction of all logits may be put here
        self.register_buffer("bias", weight.new_zeros(len(weight)))
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
        return self.scale * F.linear(h, F.normalize(self.weight, dim=-1)) + self.bias

    @torch.no_grad()
    def as_linear(self) -> dict[str, Tensor]:
        """`weight` (C, d) and `bias` (C,) of a linear classifier that ranks the classes of every image as this head does.

        Its logits are this head's (`l2`), or those times a positive number that depends on the image. Where there is a
        bias, that is so near the images for which this number is 1 alone.
        """
        weight, bias = self.scale * F.normalize(self.weight, dim=-1), self.bias
        if self.kind == "projected":
            weight, bias = weight @ self.projection, bias + weight @ self.shift
        elif self.kind == "layernorm":
            weight = weight - weight.mean(dim=1, keepdim=True)
        return {"weight": weight, "bias": bias}


def random_weight(n_classes: int, width: int) -> Tensor:
    """(C, d) rows of length 1, uniform in a cube, from torch's generator."""
    return F.normalize(torch.empty(n_classes, width).uniform_(-1, 1), dim=1)


def class_features(texts: Tensor, classes: Tensor, n_classes: int) -> Tensor:
    """Mean over the texts of each class of their features, brought to length 1: (m, e), int64 (m,) -> (C, e)."""
    sums = torch.zeros(n_classes, texts.shape[1], dtype=texts.dtype)
    sums.index_add_(0, classes, F.normalize(texts, dim=-1))
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
