"""The options of networks: what they are, what of them is tuned, and what they get of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from coreg.config import advanced, option
from coreg.errors import UserError
from coreg.views.operations import RANDAUGMENT

if TYPE_CHECKING:
    from coreg.nets.tuning import Tuning
    from coreg.views.augment import Augmentation

ANNOTATOR = "annotator"  # the backbone that is the image tower of what made the store


@dataclass
class Network:
    """backbone: what the networks are."""

    backbone: str = option(
        "preact_resnet18", "any timm model, preact_resnet18, local-dir:FOLDER, or annotator: what the store was made with"
    )
    pretrained: bool = option(False, "start from timm's pretrained weights")
    backbone_args: str = advanced("{}", "further arguments of the backbone, as JSON")


@dataclass
class TuningOptions:
    """tuning: what of a pretrained backbone is trained."""

    tuner: list[str] | None = option(
        None,
        "freeze the backbone but for its head, and train what these change: full, linear, bias, ln, bn, mask, vpt_shallow, "
        "vpt_deep, ssf_attn, ssf_mlp, ssf_ln, lora, lora_mlp, adapter, adaptformer (default: the whole network is trained)",
    )
    blocks: str = advanced(
        "all", "transformer blocks that tuners change: all, last:N, or the first and the last, such as 2-9"
    )
    bottleneck: int = advanced(0, "width of adapters, rank of LoRA; 0: by the number of classes and blocks", (0, 65_536))
    prompt_tokens: int = advanced(10, "prompt tokens of vpt_shallow and of each block of vpt_deep", (1, 65_536))
    mask_ratio: float = advanced(
        0.0, "share of weights that mask trains; 0: by the number of classes and the size of the network", (0, 1)
    )
    head: Literal["linear", "cosine", "l2", "layernorm", "projected"] = advanced(
        "linear",
        "how logits come from features: timm's own classifier; by the directions of the class weights; or projected, as "
        "the annotator compares images with texts",
    )
    head_scale: float = advanced(
        0.0, "factor of the cosine; 0: 25, and the annotator's own where --head is projected", (0, 1e6)
    )
    head_init: Literal["random", "text", "class_mean"] = advanced(
        "random",
        "where the head starts: random; text, of --backbone annotator; class_mean, mean features by candidate sets",
    )
    head_prompts: Literal["default", "classname", "ensemble", "descriptions", "annotator"] = advanced(
        "default",
        'texts of --head_init text: "a photo of a {}.", the class name alone, CLIP\'s 80 templates for ImageNet, the '
        "descriptions that the images were annotated with, or all that they were annotated with",
    )
    descriptions: str | None = advanced(
        None, "JSON file, class name to a list of texts, which --head_init text takes instead of prompts", job=False
    )


@dataclass
class Pixels:
    """images: what a network gets of an image."""

    image_size: int = option(32, "side in pixels to which images are resized", (1, 8192))
    channels: int = advanced(3, "1 for grey images, 3 for RGB", (1, 3))
    resize: Literal["squash", "crop"] = advanced(
        "squash", "how an image becomes a square: squashed, or its short side resized and the middle taken"
    )
    mean: list[float] = advanced([0.5], "mean of the pixels in 0..1, one number or one a channel", (0, 1))
    std: list[float] = advanced([0.5], "standard deviation of the pixels in 0..1, one number or one a channel", (0.001, 10))


@dataclass
class Views:
    """views: how images are changed at random."""

    flip: bool = option(True, "weak view: random horizontal flip")
    padding: int = advanced(4, "weak view: random crop with this zero padding", (0, 8192))
    strong_ops: list[str] = advanced(list(RANDAUGMENT), "strong view: operations to draw from")
    strong_count: int = advanced(1, "strong view: operations a view", (0, 100))
    cutout: float = advanced(0.5, "strong view: largest side of the cut out square, as a share of the image", (0, 1))
    cutout_fixed: int = advanced(0, "strong view: side in pixels of one square set to 0", (0, 8192))


@dataclass
class ImageConfig(Views, Pixels, TuningOptions, Network):
    """What the networks are, what of them is trained, and what they see."""

    def tuning(self) -> Tuning:
        """What is tuned, and the head."""
        from coreg.nets.tuning import Tuning

        names = ("blocks", "bottleneck", "prompt_tokens", "mask_ratio", "head", "head_scale")
        return Tuning(tuple(self.tuner or ()), **{name: getattr(self, name) for name in names})

    def augmentation(self) -> Augmentation:
        """The views these settings describe; `check_image_options` has refused impossible ones."""
        # here and not above: whatever can be said about settings is said before PyTorch is imported
        from coreg.views.augment import Augmentation

        return Augmentation(
            size=self.image_size,
            strong_ops=tuple(self.strong_ops),
            **{name: getattr(self, name) for name in ("padding", "flip", "strong_count", "cutout", "cutout_fixed")},
            mean=tuple(self.mean * (self.channels if len(self.mean) == 1 else 1)),
            std=tuple(self.std * (self.channels if len(self.std) == 1 else 1)),
        )


def check_image_options(image_options: ImageConfig) -> None:
    """Refuse images that cannot be made or seen like that.

    Raises:
        UserError: the first thing that is wrong.
    """
    unknown = [name for name in image_options.strong_ops if name not in RANDAUGMENT]
    if unknown:
        raise UserError(f"unknown --strong_ops {' '.join(unknown)} (there are: {', '.join(RANDAUGMENT)})")
    if image_options.head_init == "text" and image_options.backbone != ANNOTATOR:
        raise UserError(f"--head_init text needs --backbone annotator, whose text side it is, not {image_options.backbone}")
    if image_options.head == "projected" and image_options.head_init != "text":
        raise UserError(
            f"--head projected compares images with texts and needs --head_init text, not {image_options.head_init}"
        )
    check_pixels(image_options)


def check_pixels(pixels: Pixels) -> None:
    """Refuse other than grey or RGB images, and numbers that are neither one nor one a channel.

    Raises:
        UserError: the first thing that is wrong.
    """
    if pixels.channels not in (1, 3):
        raise UserError(f"--channels is {pixels.channels}; write 1 for grey or 3 for RGB images")
    for name in ("mean", "std"):
        values = getattr(pixels, name)
        if values is not None and len(values) not in (1, pixels.channels):
            raise UserError(f"--{name} has {len(values)} numbers for {pixels.channels} channels; give one or one each")
