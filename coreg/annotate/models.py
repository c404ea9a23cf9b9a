"""Which model an annotator uses: spellings of `--vlm`, what they mean, and loading open_clip models safely."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import open_clip
import torch
import transformers
from PIL import Image

from coreg.annotate.settings import GLYPH_CLIP
from coreg.errors import UserError
from coreg.hub import cache_only, hub_answers

SPELLINGS = "NAME/TAG such as ViT-B-32/openai, local-dir:FOLDER, hf-hub:ORG/NAME, transformers:FOLDER or chat:FOLDER"
WEIGHT_FILES = (".safetensors", ".bin", ".pth")


@dataclass(frozen=True)
class ModelSpec:
    """Which model an annotator uses.

    Attributes:
        spec: what identifies it, folders made absolute.
        name: open_clip's model name, with its `local-dir:` or `hf-hub:` prefix, or the folder of a transformers model.
        tag: open_clip's name of the pretrained weights, None for folders.
        weights: the tag, or the sha256 of a folder's files.
        kind: `open_clip`, `transformers` (CLIP, SigLIP and what is built alike) or `chat` (image-text-to-text).
    """

    spec: str
    name: str
    tag: str | None
    weights: str
    kind: str = "open_clip"


def resolve(spec: str) -> ModelSpec:
    """Find out what `spec` means without loading it.

    Args:
        spec: of open_clip, NAME/TAG, local-dir:FOLDER, hf-hub:ORG/NAME or builtin:glyph-clip; of transformers,
            transformers:FOLDER (CLIP, SigLIP and the like) or chat:FOLDER (LLaVA and other chat models).

    Raises:
        UserError: no such model, or a folder that holds none.
    """
    if spec == GLYPH_CLIP:
        from coreg.demo.annotator import local_dir

        folder = local_dir()
        return ModelSpec(spec, f"local-dir:{folder}", None, _folder_hash(Path(folder)))
    if spec.startswith("local-dir:"):
        folder = Path(spec.removeprefix("local-dir:")).expanduser().resolve()
        _check_open_clip(folder)
        return ModelSpec(f"local-dir:{folder}", f"local-dir:{folder}", None, _folder_hash(folder))
    kind = spec.partition(":")[0]
    if kind in ("transformers", "chat"):
        folder = Path(spec.partition(":")[2]).expanduser().resolve()
        _check_transformers(folder)
        return ModelSpec(f"{kind}:{folder}", str(folder), None, _folder_hash(folder), kind)
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


def _check_open_clip(folder: Path) -> None:
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


def _check_transformers(folder: Path) -> None:
    wanted = f"a model folder holds config.json and .safetensors weights (hf download ORG/NAME --local-dir {folder})"
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; {wanted}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{folder}/config.json is missing or not a transformers configuration; {wanted}")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no .safetensors weights; {wanted}")


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".txt", ".model", ".jinja", *WEIGHT_FILES):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as content:
                while piece := content.read(1 << 24):
                    digest.update(piece)
    return f"sha256 {digest.hexdigest()}"


# ---- loading --------------------------------------------------------------------------------------------------------


def load_open_clip(model: ModelSpec) -> tuple[torch.nn.Module, Callable[[Image.Image], torch.Tensor], Callable]:
    """Load an open_clip model with its weights in float32 on the CPU, in eval mode.

    What lies in the cache is used without asking the network; only then is the network tried, for seconds and not for
    minutes. Weights are read as safetensors or with `weights_only`; no code of a model is ever run.

    Returns:
        the model; its preprocessing, PIL image -> float32 (3, H, W); its tokenizer, list of texts -> int64 (n, L).

    Raises:
        UserError: the model cannot be had.
    """
    try:
        with quiet(), cache_only(model.tag is not None or model.name.startswith("hf-hub:")):
            return _load(model)
    except Exception as error:
        if model.name.startswith("local-dir:"):
            raise UserError(f"cannot load {model.spec}: {one_line(error)}; save it again with open_clip") from None
    offline = f"use a machine with network, or save the model there and give --vlm local-dir:FOLDER instead of {model.spec}"
    if not hub_answers():
        raise UserError(
            f"{model.spec} is not in the cache and {huggingface_hub.constants.ENDPOINT} cannot be reached; {offline}"
        )
    try:
        with quiet():
            return _load(model)
    except Exception as error:
        raise UserError(f"cannot load {model.spec}: {one_line(error)}; {offline}") from None


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


def one_line(error: Exception) -> str:
    """Kind and text of an error without line breaks, shortened to 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and log lines of the model libraries, which come before an error told in one line."""
    before, bars = logging.root.manager.disable, transformers.utils.logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()
