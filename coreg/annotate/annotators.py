"""Annotators turn images into votes, probabilities and features: models of the CLIP family here, chat models in `chat`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import Normalize, ToTensor

from coreg.annotate.models import PRECISIONS, ModelSpec, load_open_clip, load_transformers, one_line
from coreg.annotate.prompts import CLASSNAME, PHOTO, plain_names, prompts
from coreg.annotate.scores import TextSide, description_texts, judging_texts
from coreg.annotate.texts import compare_texts
from coreg.errors import UserError
from coreg.store.texts import TextFeatures

SAME = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}  # features of length 1 that differ by rounding


class Annotator(Protocol):
    """What `annotate_vlm.py` asks of an annotator; a new one is a class with these six."""

    features: int | None  # D, the length of the feature vectors that `annotate` gives, or None when it gives none
    preprocessing: dict[str, Any]  # for the manifest
    notes: list[str]  # for the person, a line each, before the work begins
    # what one image becomes in a decoding process; it is sent there, so it holds no model
    preprocess: Callable[[Image.Image], Any]
    collate: Callable[[list[Any]], Any]  # list of what `preprocess` gave -> a batch

    def annotate(self, batch: Any) -> dict[str, torch.Tensor | list]:
        """Judge a batch of n images under every template.

        Returns:
            `votes` int16 (n, T), the class that each template names or -1; `probs` float16 (n, C), mean over the
            templates of the class probabilities; `features` float16 (n, D) where there are any; `answers`, a list of n
            lists of T texts, where a model answers in words. Tensors may stay on the device.
        """
        ...


def load_annotator(
    model: ModelSpec,
    templates: Sequence[str],
    class_names: Sequence[str],
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    chat_mode: str = "likelihood",
    descriptions: Mapping[str, Sequence[str]] | None = None,
    temperature: float = 1.0,
) -> Annotator:
    """The annotator for a model.

    Args:
        chat_mode: of chat models. descriptions, temperature: of models of the CLIP family.

    Raises:
        UserError: the model cannot be had.
    """
    if model.kind == "chat":
        from coreg.annotate.chat import ChatAnnotator

        with _usable(model):
            return ChatAnnotator(model, templates, class_names, device, precision, chat_mode)
    if model.kind == "run":
        from coreg.annotate.exported import RunAnnotator

        return RunAnnotator(model.name, class_names, device)
    return ClipAnnotator(model, templates, class_names, device, precision, descriptions, temperature)


@dataclass
class EightBit:
    """A preprocessing whose last steps, to floats and to the training data's mean and spread, are left to the device.

    What travels from a decoding process is then a quarter as large, and takes less time to make.
    """

    steps: Sequence[Callable[[Image.Image], Image.Image]]
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """PIL image -> uint8 (H, W, 3)."""
        for step in self.steps:
            image = step(image)
        return torch.from_numpy(np.array(image))

    def floats(self, batch: torch.Tensor) -> torch.Tensor:
        """uint8 (n, H, W, 3) on any device -> float32 (n, 3, H, W), with the arithmetic of the steps that were left out."""
        mean, std = torch.tensor([self.mean, self.std]).to(batch.device, non_blocking=True).view(2, -1, 1, 1)
        pixels = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return pixels.div_(255).sub_(mean).div_(std)


def eight_bit(preprocess: Callable) -> EightBit | None:
    """The preprocessing of open_clip in two parts, where its last steps are the usual ones."""
    *steps, convert, normalise = getattr(preprocess, "transforms", (None, None))
    if isinstance(convert, ToTensor) and isinstance(normalise, Normalize):
        return EightBit(steps, normalise.mean, normalise.std)
    return None


@dataclass
class Towers:
    """A model of the CLIP family, reduced to what annotating needs."""

    network: torch.nn.Module  # the model itself, in evaluation mode and frozen, on the device
    image: Callable[[torch.Tensor], torch.Tensor]  # float (n, 3, H, W) on the device -> (n, D), of any length and dtype
    # m texts -> `input_ids` int64 (m, L) on the device and whatever else the text side reads
    tokenize: Callable[[list[str]], dict[str, torch.Tensor]]
    context: int  # tokens that the text side reads at most
    cut: Callable[[list[str]], torch.Tensor]  # m texts -> bool (m,), those that have more
    text: Callable[[dict[str, torch.Tensor]], torch.Tensor]  # what `tokenize` gave -> features (m, D)
    preprocess: Callable[[Image.Image], torch.Tensor]  # PIL image -> float32 (3, H, W)
    # the same in two parts where that is possible: what a decoding process makes of an image, and the rest of a batch
    eight_bit: EightBit | None
    scale: float  # factor s of the cosine, exp(logit_scale)
    bias: float | None  # logit_bias of models trained with a sigmoid, None for all others
    preprocessing: dict[str, Any]  # for the manifest


@contextlib.contextmanager
def _usable(model: ModelSpec) -> Iterator[None]:
    """Errors of libraries as one line: what a configuration file asks for may be possible to load and not to use."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{model.spec} cannot be used: {one_line(error)}; get its files again, or choose another model"
        ) from None


def load_towers(model: ModelSpec, device: torch.device, precision: str) -> Towers:
    """Load a model of the CLIP family, and let one blank image and one short text go through it.

    Raises:
        UserError: it cannot be had, or not be used.
    """
    with _usable(model):
        towers = (transformers_towers if model.kind == "transformers" else open_clip_towers)(model, device, precision)
        with torch.no_grad():
            pixels = towers.preprocess(Image.new("RGB", (64, 64)))
            towers.image(pixels[None].to(device, PRECISIONS[precision]))
            towers.text(towers.tokenize(["a"]))
    return towers


def open_clip_towers(model: ModelSpec, device: torch.device, precision: str) -> Towers:
    """Load an open_clip model.

    Raises:
        UserError: it cannot be had.
    """
    network, preprocess, tokenizer = load_open_clip(model)
    scale, bias = _scale_and_bias(network)
    network.to(device, PRECISIONS[precision])
    context = tokenizer([""]).shape[1]

    def cut(texts: list[str]) -> torch.Tensor:
        read, whole = tokenizer(texts), tokenizer(texts, context_length=4 * context)
        # a text that goes on has another token where the shorter one has to end, or more than padding after it
        return (whole[:, :context] != read).any(dim=1) | (whole[:, context:] != whole[:, -1:]).any(dim=1)

    return Towers(
        network=network,
        image=network.encode_image,
        tokenize=lambda texts: {"input_ids": tokenizer(texts).to(device)},
        context=context,
        cut=cut,
        text=lambda tokens: network.encode_text(tokens["input_ids"]),
        preprocess=preprocess,
        eight_bit=eight_bit(preprocess),
        scale=scale,
        bias=bias,
        preprocessing=json.loads(json.dumps(network.visual.preprocess_cfg)),
    )


def _scale_and_bias(network: torch.nn.Module) -> tuple[float, float | None]:
    """exp(logit_scale) and logit_bias of a model that is still in float32: in bfloat16 a scale of 100 would become 98.9."""
    bias = getattr(network, "logit_bias", None)
    return float(network.logit_scale.detach().double().exp()), None if bias is None else float(bias.detach())


@dataclass
class _Pixels:
    """The image side of a transformers processor as a function of one image."""

    processor: Callable

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def transformers_towers(model: ModelSpec, device: torch.device, precision: str) -> Towers:
    """Load a CLIP or SigLIP model, or one built alike, that transformers saved.

    Raises:
        UserError: it cannot be loaded, or has no text and image features in one space.
    """
    remedy = "save model and processor with transformers"
    processor, network = load_transformers(model, "AutoModel", torch.float32, "", remedy)
    if not (hasattr(network, "get_image_features") and hasattr(network, "logit_scale")):
        kind = type(network).__name__
        raise UserError(f"{model.spec} is a {kind}, not of the CLIP family; for chat models write chat:FOLDER")
    scale, bias = _scale_and_bias(network)
    network = network.eval().requires_grad_(False).to(device, PRECISIONS[precision])
    # SigLIP was trained on texts padded to their full length, CLIP reads the last token wherever it is
    padding = "max_length" if bias is not None else True

    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        return dict(processor.tokenizer(texts, padding=padding, truncation=True, return_tensors="pt").to(device))

    def cut(texts: list[str]) -> torch.Tensor:
        whole = processor.tokenizer(texts, verbose=False)["input_ids"]
        return torch.tensor([len(ids) > processor.tokenizer.model_max_length for ids in whole])

    return Towers(
        network=network,
        image=lambda images: _pooled(network.get_image_features(pixel_values=images)),
        tokenize=tokenize,
        context=processor.tokenizer.model_max_length,
        cut=cut,
        text=lambda tokens: _pooled(network.get_text_features(**tokens)),
        preprocess=_Pixels(processor.image_processor),
        eight_bit=None,
        scale=scale,
        bias=bias,
        preprocessing=json.loads(processor.image_processor.to_json_string()),
    )


def _pooled(output: Any) -> torch.Tensor:
    """The feature vectors, which newer versions of transformers wrap."""
    return output if torch.is_tensor(output) else output.pooler_output


class ClipAnnotator(TextSide):
    """A model of the CLIP family with its text side encoded once.

    Image features r are rounded to float16 before they are judged, so that what is stored is what was judged: scoring the
    stored features again gives the same votes.
    """

    collate = staticmethod(torch.stack)

    def __init__(
        self,
        model: ModelSpec,
        templates: Sequence[str],
        class_names: Sequence[str],
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        descriptions: Mapping[str, Sequence[str]] | None = None,
        temperature: float = 1.0,
    ) -> None:
        """Load the model and encode the T*C prompts.

        Args:
            descriptions: class name -> texts, see `judging_texts`.

        Raises:
            UserError: the model cannot be had, or two classes are the same to it under every template.
        """
        self.device, self.dtype = torch.device(device), PRECISIONS[precision]
        self.towers = load_towers(model, self.device, precision)
        self.preprocess, self.preprocessing = self.towers.eight_bit or self.towers.preprocess, self.towers.preprocessing
        self.encoded: list[tuple[list[str], torch.Tensor]] = []
        with _usable(model):
            text = judging_texts(self._encode, templates, class_names, descriptions)
        if not torch.isfinite(text).all():
            raise UserError(
                f"{model.spec} gives text features that are not finite; its weights are damaged, get them again"
            )
        super().__init__(text, len(class_names), self.towers.scale, self.towers.bias, temperature)
        self.class_names = class_names
        cut = self._cut(prompts(templates, class_names)).view(self.shape).any(dim=0)
        if descriptions is not None:
            texts, classes = description_texts(class_names, descriptions)
            cut[classes[self._cut(texts)]] = True
        self.notes = compare_texts(self.text, cut, templates, class_names, model.spec, SAME[self.dtype])

    def _cut(self, texts: list[str]) -> torch.Tensor:
        """bool (m,): the texts that are longer than what the model reads."""
        cut = torch.zeros(len(texts), dtype=torch.bool)
        # no tokenizer makes more of plain letters than a token each, a first and a last one, and one for the beginning
        some = [i for i, text in enumerate(texts) if not text.isascii() or len(text) + 3 > self.towers.context]
        for at in range(0, len(some), 256):
            cut[some[at : at + 256]] = self.towers.cut([texts[i] for i in some[at : at + 256]])
        return cut

    @torch.inference_mode()
    def _encode(self, texts: list[str]) -> torch.Tensor:
        parts = [self.towers.text(self.towers.tokenize(texts[at : at + 256])) for at in range(0, len(texts), 256)]
        features = torch.nn.functional.normalize(torch.cat(parts).float(), dim=-1)
        self.encoded.append((texts, features))
        return features

    def kept_texts(self) -> TextFeatures:
        """What of the text side belongs into a store: all texts that were encoded, and the two that heads begin with."""
        for template in (PHOTO, CLASSNAME):
            self._encode(prompts([template], plain_names(self.class_names)))
        first: dict[str, int] = {}
        for place, text in enumerate(text for texts, _ in self.encoded for text in texts):
            first.setdefault(text, place)
        features = torch.cat([features for _, features in self.encoded]).cpu().numpy()
        return TextFeatures(list(first), features[list(first.values())], self.scale, self.bias)

    @torch.inference_mode()
    def annotate(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Judge a batch of images under every template.

        Args:
            batch: of what `preprocess` gave for an image.

        Returns:
            votes int16 (n, T); probs float16 (n, C), computed in float32; features float16 (n, D) of length 1.
        """
        features = self.encode(batch)
        return self.score(features) | {"features": features}

    @torch.inference_mode()
    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        """Features float16 (n, D) of length 1 of a batch of what `preprocess` gave, or float32 (n, 3, H, W)."""
        images = batch.to(self.device, non_blocking=True)
        if self.towers.eight_bit is not None and images.dtype == torch.uint8:
            images = self.towers.eight_bit.floats(images)
        return torch.nn.functional.normalize(self.towers.image(images.to(self.dtype)).float(), dim=-1).half()
