"""Annotators of the CLIP family: every open_clip model turns images into votes, probabilities and features."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
from PIL import Image

from coreg.annotate.prompts import prompts
from coreg.errors import UserError

GLYPH_CLIP = "builtin:glyph-clip"
SPELLINGS = "NAME/TAG such as ViT-B-32/openai, local-dir:FOLDER or hf-hub:ORG/NAME"
WEIGHT_FILES = (".safetensors", ".bin", ".pth")
SCORES_AT_ONCE = 1 << 24  # logits of a batch that are held at the same time: 64 MB of float32
NETWORK_SECONDS = 8.0


@dataclass(frozen=True)
class ModelSpec:
    """Which open_clip model an annotator uses.

    Attributes:
        spec: what identifies it, folders made absolute.
        name: open_clip's model name, with its `local-dir:` or `hf-hub:` prefix.
        tag: open_clip's name of the pretrained weights, None for folders.
        weights: the tag, or the sha256 of a folder's files.
    """

    spec: str
    name: str
    tag: str | None
    weights: str


def resolve(spec: str) -> ModelSpec:
    """Find out what `spec` means without loading it: NAME/TAG, local-dir:FOLDER, hf-hub:ORG/NAME or builtin:glyph-clip.

    Raises:
        UserError: no such model, or a folder that holds none.
    """
    if spec == GLYPH_CLIP:
        from coreg.demo.annotator import local_dir

        folder = local_dir()
        return ModelSpec(spec, f"local-dir:{folder}", None, _folder_hash(Path(folder)))
    if spec.startswith("local-dir:"):
        folder = Path(spec.removeprefix("local-dir:")).expanduser().resolve()
        _check_folder(folder)
        return ModelSpec(f"local-dir:{folder}", f"local-dir:{folder}", None, _folder_hash(folder))
    if spec.startswith("hf-hub:"):
        return ModelSpec(spec, spec, None, "hub")
    name, _, tag = spec.rpartition("/")
    known = open_clip.list_models()
    if spec in known:
        tags = open_clip.list_pretrained_tags_by_model(spec)
        if tags:
            raise UserError(f"--vlm {spec} says no weights; write --vlm {spec}/{tags[0]} (tags: {', '.join(tags)})")
        raise UserError(f"open_clip has no weights for {spec}; give one of its other models or a local-dir:FOLDER")
    if name in known:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if tag in tags:
            return ModelSpec(spec, name, tag, f"tag {tag}")
        raise UserError(f"{name} has no weights {tag!r}{_near(tag, tags)} (tags: {', '.join(tags) or 'none'})")
    named = [f"{model}/{weights}" for model, weights in open_clip.list_pretrained()]
    near = _near(spec, [*named, GLYPH_CLIP]) or _near(name or spec, known)
    raise UserError(f"unknown model {spec}{near}; write --vlm {SPELLINGS}")


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {near[0]}?" if near else ""


def _check_folder(folder: Path) -> None:
    config = folder / "open_clip_config.json"
    wanted = f"a model folder holds open_clip_config.json and weights ({', '.join(WEIGHT_FILES)})"
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; {wanted}")
    try:
        model = json.loads(config.read_text(encoding="utf-8"))["model_cfg"]
        complete = {"embed_dim", "vision_cfg", "text_cfg"} <= set(model)
    except FileNotFoundError:
        raise UserError(f"{config} does not exist; {wanted}") from None
    except (OSError, ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise UserError(f"{config} is not an open_clip configuration with a model_cfg; {wanted}")
    if not any(file.suffix in WEIGHT_FILES for file in folder.iterdir()):
        raise UserError(f"{folder} holds no weights; {wanted}")
    for file in folder.glob("*.json"):
        # transformers would offer to run code that such a tokenizer or text tower brings along
        if b"auto_map" in (content := file.read_bytes()) or b"trust_remote_code" in content:
            raise UserError(f"{file} asks to run code of its own, which is never done; use a model without auto_map")


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".txt", ".model", *WEIGHT_FILES):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as content:
                while piece := content.read(1 << 24):
                    digest.update(piece)
    return f"sha256 {digest.hexdigest()}"


# ---- loading --------------------------------------------------------------------------------------------------------


def load_model(model: ModelSpec) -> tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor], Callable]:
    """Load an open_clip model with its weights in float32 on the CPU, in eval mode.

    What lies in the cache is used without asking the network; only then is the network tried, for seconds and not for
    minutes. Weights are read as safetensors or with `weights_only`; no code of a model is ever run.

    Returns:
        the model; its preprocessing, PIL image -> float32 (3, H, W); its tokenizer, list of texts -> int64 (n, L).

    Raises:
        UserError: the model cannot be had.
    """
    try:
        with _quiet(), _offline(model.tag is not None or model.name.startswith("hf-hub:")):
            return _load(model)
    except Exception as error:
        if model.name.startswith("local-dir:"):
            raise UserError(f"cannot load {model.spec}: {_one_line(error)}; save it again with open_clip") from None
    offline = f"use a machine with network, or save the model there and give --vlm local-dir:FOLDER instead of {model.spec}"
    if not _hub_answers():
        raise UserError(
            f"{model.spec} is not in the cache and {huggingface_hub.constants.ENDPOINT} cannot be reached; {offline}"
        )
    try:
        with _quiet():
            return _load(model)
    except Exception as error:
        raise UserError(f"cannot load {model.spec}: {_one_line(error)}; {offline}") from None


def _load(model: ModelSpec) -> tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor], Callable]:
    tagged = open_clip.get_pretrained_cfg(model.name, model.tag) if model.tag else {}
    # open_clip only warns when a tag was trained with QuickGELU and the model's name does not say so (ViT-B-32/openai).
    network, preprocess = open_clip.create_model_from_pretrained(
        model.name,
        pretrained=model.tag,
        force_quick_gelu=bool(tagged.get("quick_gelu", False)),
        weights_only=True,
    )
    text = (open_clip.get_model_config(model.name) or {}).get("text_cfg", {})
    safely = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    return network.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(model.name, **safely)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines of open_clip and huggingface_hub, which come before an error that we report in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _offline(enabled: bool) -> Iterator[None]:
    """Let huggingface_hub look into its cache only, and other downloads give up soon."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, socket.getdefaulttimeout()
    if enabled:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        socket.setdefaulttimeout(NETWORK_SECONDS)
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before[0]
        socket.setdefaulttimeout(before[1])


def _hub_answers() -> bool:
    """Whether the model hub answers at all; in a thread, because a dead name server ignores every timeout."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=NETWORK_SECONDS / 2).close()
        except urllib.error.HTTPError:
            pass  # an answer, if not a friendly one
        except OSError:
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(NETWORK_SECONDS)
    return answered.is_set() and not huggingface_hub.constants.HF_HUB_OFFLINE


# ---- annotating -----------------------------------------------------------------------------------------------------


class ClipAnnotator:
    """A model of the CLIP family with its text side encoded once, as one (T*C, D) matrix.

    Templates are judged one by one, as in the papers' multi-template union: p_t = softmax(s * r . E_t) with image feature
    r and text features E_t of length 1; template t votes argmax p_t, and the mean over t of p_t is the averaged
    probability (an average of probabilities, not CLIP's average of text embeddings). s is the model's own exp(logit_scale),
    about 100 for trained CLIP models, where the papers' code has the constant 100. Models trained with a sigmoid (SigLIP)
    are read by the same softmax: their logit_bias shifts all classes alike and changes neither votes nor softmax.
    """

    def __init__(
        self, model: ModelSpec, templates: Sequence[str], class_names: Sequence[str], device: torch.device | str = "cpu"
    ) -> None:
        """Load the model and encode the T*C prompts.

        Raises:
            UserError: the model cannot be had.
        """
        network, self.preprocess, tokenizer = load_model(model)
        self.device = torch.device(device)
        self.network = network.to(self.device)
        self.shape = (len(templates), len(class_names))
        self.scale = float(network.logit_scale.exp())
        self.text = self._encode(prompts(templates, class_names), tokenizer)
        if not torch.isfinite(self.text).all():
            raise UserError(
                f"{model.spec} gives text features that are not finite; its weights are damaged, get them again"
            )

    @property
    def features(self) -> int:
        """D, the length of an image's feature vector."""
        return self.text.shape[1]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of a preprocessed image."""
        size = self.preprocessing["size"]
        return (3, *size) if isinstance(size, list) else (3, size, size)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Size, mean, standard deviation, interpolation and resize mode that the model wants, for the manifest."""
        return json.loads(json.dumps(self.network.visual.preprocess_cfg))

    @torch.inference_mode()
    def _encode(self, texts: list[str], tokenizer: Callable) -> torch.Tensor:
        parts = [
            self.network.encode_text(tokenizer(texts[start : start + 256]).to(self.device), normalize=True)
            for start in range(0, len(texts), 256)
        ]
        return torch.cat(parts).float()

    @torch.inference_mode()
    def annotate(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Judge a batch of images under every template.

        Args:
            images: float32 (n, 3, H, W), preprocessed.

        Returns:
            votes int16 (n, T), the class that each template names; probs float16 (n, C), mean over the templates of the
            class probabilities, computed in float32; features float16 (n, D) of length 1. All on the CPU.
        """
        images = images.to(self.device, non_blocking=True)
        features = self.network.encode_image(images, normalize=True).float()
        templates, classes = self.shape
        votes = torch.empty(len(images), templates, dtype=torch.int16, device=self.device)
        probs = torch.zeros(len(images), classes, device=self.device)
        step = max(1, SCORES_AT_ONCE // (max(1, len(images)) * classes))
        for start in range(0, templates, step):
            text = self.text[start * classes : (start + step) * classes]
            logits = (self.scale * features @ text.T).view(len(images), -1, classes)
            votes[:, start : start + step] = logits.argmax(dim=2).to(torch.int16)
            probs += logits.softmax(dim=2).sum(dim=1)
        return votes.cpu(), (probs / templates).half().cpu(), features.half().cpu()
