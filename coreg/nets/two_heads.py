"""A backbone with two linear classifiers and a gate that weighs their predictions, registered with timm as `two_heads`.

As HTC trains it (Jia et al., "Long-tailed Partial Label Learning by Head Classifier and Tail Classifier Cooperation",
AAAI 2024), and as it is exported: a network like every other, whose logits are the fused prediction.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import register_model
from torch import Tensor, nn
from torch.nn import functional as F


class TwoHeads(nn.Module):
    """Images (n, c, H, W) to logits (n, C), with timm's interface to features and head.

    With z and z' the logits of the head and of the tail classifier and pi the class prior of the head's training:
    p = softmax(z - log(pi + 1e-5)), p' = softmax(z'), w = softmax(leaky_relu(gate([p, p']))) / |.|, and w_1 p + w_2 p' are
    the logits.
    """

    def __init__(self, backbone: nn.Module) -> None:
        """Begin with a backbone of `num_classes` C whose classifier is one linear layer; it is the head's."""
        super().__init__()
        classes, width = backbone.get_classifier().out_features, backbone.get_classifier().in_features
        self.backbone = backbone
        self.tail = nn.Linear(width, classes)
        self.gate = nn.Linear(2 * classes, 2)
        self.register_buffer("prior", torch.full((classes,), 1 / classes))
        self.num_classes, self.num_features, self.head_hidden_size = classes, backbone.num_features, width

    def get_classifier(self) -> nn.Module:
        return nn.ModuleList([self.backbone.get_classifier(), self.tail, self.gate])

    def forward_features(self, x: Tensor) -> Tensor:
        return self.backbone.forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        h = self.backbone.forward_head(x, pre_logits=True)
        return h if pre_logits else self.fused(*self.heads(h), self.prior)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def heads(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """z and z' (n, C) of pooled features (n, d)."""
        return self.backbone.get_classifier()(h), self.tail(h)

    def fused(self, head: Tensor, tail: Tensor, prior: Tensor) -> Tensor:
        """The fused logits (n, C) of z and z' (n, C) and pi (C,)."""
        p = torch.softmax(head - torch.log(prior.to(head.dtype) + 1e-5), dim=1)
        q = torch.softmax(tail, dim=1)
        weights = F.normalize(torch.softmax(F.leaky_relu(self.gate(torch.cat([p, q], dim=1))), dim=1), dim=1)
        return weights[:, :1] * p + weights[:, 1:] * q

    @property
    def created_with(self) -> tuple[str, dict[str, Any]]:
        """Name and arguments by which `timm.create_model` makes such a network, beside `num_classes` and `in_chans`."""
        of_timm = ("num_classes", "in_chans")
        arguments = {name: value for name, value in self.backbone._model_args.items() if name not in of_timm}
        return "two_heads", {"backbone": self.backbone.pretrained_cfg["architecture"], "arguments": arguments}


@register_model
def two_heads(
    pretrained: bool = False,
    *,
    backbone: str,
    arguments: dict[str, Any] | None = None,
    num_classes: int = 1000,
    in_chans: int = 3,
    **_: Any,
) -> TwoHeads:
    """Any timm model of one linear classifier, with a second one and a gate, without weights.

    Args:
        backbone: its timm name. arguments: further ones of it. The rest is what timm gives every model.

    Raises:
        ValueError: timm has no such model.
    """
    if not timm.is_model(backbone):  # never a folder or a name on the hub: an export holds everything
        raise ValueError(f"timm has no model {backbone}")
    net = TwoHeads(timm.create_model(backbone, num_classes=num_classes, in_chans=in_chans, **(arguments or {})))
    net.pretrained_cfg = dict(net.backbone.pretrained_cfg) | {"architecture": "two_heads", "classifier": "gate"}
    return net
