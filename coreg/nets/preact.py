"""PreAct ResNet for small images, in the variant that the papers use, registered with timm.

It differs from the textbook: an identity shortcut carries the activated tensor, and neither normalisation nor activation
follows the last stage. Registered names: `preact_resnet18` (the papers'), `preact_resnet_tiny` (the demo's, 0.3 M weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Literal["batch", "group", "none"]


def _norm(kind: Norm, width: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(width)
    return nn.GroupNorm(min(8, width // 4), width) if kind == "group" else nn.Identity()


class PreActBlock(nn.Module):
    """a = relu(norm1(x)); conv2(relu(norm2(conv1(a)))) + shortcut(a)."""

    def __init__(self, width_in: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.norm1 = _norm(norm, width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=norm == "none")
        self.norm2 = _norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=norm == "none")
        same = stride == 1 and width_in == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm1(x))
        return self.conv2(F.relu(self.norm2(self.conv1(a)))) + self.shortcut(a)


class PreActResNet(nn.Module):
    """Images (n, in_chans, H, W) to logits (n, num_classes), with timm's interface to features and head.

    Args:
        num_classes: C; 0 gives the features.
        in_chans: 1 or 3.
        widths, depths: channels and blocks of each stage; every stage but the first halves the resolution.
        stem_kernel, stem_stride: of the first convolution.
        first_stride: stride of the first stage (2 for 64x64 inputs in the papers).
        norm: `batch`, `group` (the same on any number of processes), or `none`.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        stem_kernel: int = 3,
        stem_stride: int = 1,
        first_stride: int = 1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.conv1 = nn.Conv2d(in_chans, widths[0], stem_kernel, stem_stride, (stem_kernel - 1) // 2, bias=norm == "none")
        self.norm1 = _norm(norm, widths[0])
        stages, width_in = [], widths[0]
        for i, (width, depth) in enumerate(zip(widths, depths)):
            strides = [first_stride if i == 0 else 2] + [1] * (depth - 1)
            blocks = []
            for stride in strides:
                blocks.append(PreActBlock(width_in, width, stride, norm))
                width_in = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Identity()
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(F.relu(self.norm1(self.conv1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        h = x.mean(dim=(2, 3))
        return h if pre_logits else self.fc(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# no weights to download; timm wants to know the inputs' shape and range and which layers come first and last
_CFG = {
    "url": "",
    "num_classes": 1000,
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "first_conv": "conv1",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs(
    {
        "preact_resnet18.untrained": _CFG,
        "preact_resnet_tiny.untrained": _CFG | {"input_size": (1, 16, 16)},
    }
)


def _build(name: str, pretrained: bool, **kwargs: Any) -> PreActResNet:
    return build_model_with_cfg(PreActResNet, name, pretrained, pretrained_filter_fn=None, **kwargs)


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """The papers' student: four stages of two blocks, 11.2 M weights."""
    return _build("preact_resnet18", pretrained, **kwargs)


@register_model
def preact_resnet_tiny(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """The demo's student: stem of stride 2, three stages of one block, for 16x16 images."""
    small = {"widths": (32, 64, 128), "depths": (1, 1, 1), "stem_kernel": 4, "stem_stride": 2}
    return _build("preact_resnet_tiny", pretrained, **(small | kwargs))
