"""Which model an annotator uses: spellings of `--vlm`, what they mean, and loading open_clip models safely."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import torch
import transformers
from PIL import Image

from coreg.annotate.settings import GLYPH_CLIP
from coreg.errors import UserError
from coreg.hub import cache_only, hub_answers, without_foreign_code
from coreg.plaintext import did_you_mean
from coreg.records import Maybe, Number, RecordError, read_record
from coreg.store.manifest import REFINED

SPELLINGS = (
    "NAME/TAG such as ViT-B-32/openai, local-dir:FOLDER, hf-hub:ORG/NAME, transformers:FOLDER, chat:FOLDER or run:FOLDER"
)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WEIGHT_FILES = (".safetensors", ".bin", ".pth")
# parts of an open_clip configuration that name a model for transformers to load
OPEN_CLIP_TEXT = {"hf_model_name": Maybe(str), "hf_tokenizer_name": Maybe(str)}
HUB = "https://huggingface.co/"
HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?"


@dataclass(frozen=True)
class ModelSpec:
    """Which model an annotator uses."""

    spec: str  # what identifies it, folders made absolute
    # open_clip's model name, with its `local-dir:` or `hf-hub:` prefix, or the folder of a transformers model or an export
    name: str
    tag: str | None  # open_clip's name of the pretrained weights, None for folders
    weights: str  # the tag, or the sha256 of a folder's files
    # or `transformers` (CLIP, SigLIP and what is built alike), `chat` (image-text-to-text), or `run` (what a run exported)
    kind: str = "open_clip"


def resolve(spec: str) -> ModelSpec:
    """Find out what `spec` means without loading it.

    Args:
        spec: of open_clip, NAME/TAG, local-dir:FOLDER, hf-hub:ORG/NAME or builtin:glyph-clip; of transformers,
            transformers:FOLDER (CLIP, SigLIP and the like) or chat:FOLDER (LLaVA and other chat models); run:FOLDER, what a
            finished run exported.

    Raises:
        UserError: no such model, or a folder that holds none.
    """
    if spec.startswith(REFINED):
        raise UserError(f"{spec!r} is evidence that was refined, and no model; use the store that it was refined from")
    if spec == GLYPH_CLIP:
        from coreg.demo.annotator import local_dir

        folder = local_dir()
        return ModelSpec(spec, f"local-dir:{folder}", None, _folder_hash(Path(folder)))
    if spec.startswith("local-dir:"):
        folder = Path(os.path.expanduser(spec.removeprefix("local-dir:"))).resolve()
        _check_open_clip(folder)
        return ModelSpec(f"local-dir:{folder}", f"local-dir:{folder}", None, _folder_hash(folder))
    kind = spec.partition(":")[0]
    if kind == "run":
        from coreg.annotate.exported import resolve_run

        export, weights = resolve_run(spec.partition(":")[2])
        run = export.parent if export.name == "export" else export
        return ModelSpec(f"run:{run}", str(export), None, weights, "run")
    if kind in ("transformers", "chat"):
        folder = Path(os.path.expanduser(spec.partition(":")[2])).resolve()
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
        raise UserError(f"{name} has no weights {tag!r}{did_you_mean(tag, tags)} (tags: {', '.join(tags) or 'none'})")
    named = [f"{model}/{weights}" for model, weights in open_clip.list_pretrained()]
    near = did_you_mean(spec, [*named, GLYPH_CLIP])
    if hint := _spelling(spec) or (not near and _download(spec)):
        raise UserError(f"unknown model {spec}{hint}")
    near = near or did_you_mean(name or spec, known)
    raise UserError(f"unknown model {spec}{near}; write --vlm {SPELLINGS}")


def _check_open_clip(folder: Path) -> None:
    config = folder / "open_clip_config.json"
    wanted = f"a model folder holds open_clip_config.json and weights ({', '.join(WEIGHT_FILES)})"
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; {wanted}")
    if not config.exists():
        raise UserError(f"{config} does not exist{_folder_hint(folder)}; {wanted}")
    try:
        text = read_record(
            config, {"model_cfg": {"embed_dim": Number(low=1), "vision_cfg": dict, "text_cfg": OPEN_CLIP_TEXT}}
        )["model_cfg"]["text_cfg"]
    except RecordError as error:
        raise UserError(f"{config} is not an open_clip configuration with a model_cfg ({error}); {wanted}") from None
    _check_files(folder)
    if not any(file.suffix in WEIGHT_FILES for file in folder.iterdir()):
        raise UserError(f"{folder} holds no weights; {wanted}")
    for key in OPEN_CLIP_TEXT:
        name = text.get(key)
        if name and not re.fullmatch(HUB_NAME, name):
            raise UserError(f"{config} has {key} {name!r}; a model folder may name models of the hub alone, as ORG/NAME")
        if name and Path(name).is_dir():  # transformers prefers a folder of that name to the hub
            _check_files(Path(name))


def _check_transformers(folder: Path) -> None:
    wanted = f"a model folder holds config.json and .safetensors weights (hf download ORG/NAME --local-dir {folder})"
    if not folder.is_dir():
        raise UserError(f"model folder {folder} does not exist; {wanted}")
    try:
        read_record(folder / "config.json", {"model_type": str})
    except RecordError as error:
        raise UserError(
            f"{folder}/config.json is missing or not a transformers configuration ({error}){_folder_hint(folder)}; {wanted}"
        ) from None
    _check_files(folder)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no .safetensors weights; {wanted}")


def _check_files(folder: Path) -> None:
    """Refuse a folder with what would hang its reader, or with a JSON file that asks to run code.

    Raises:
        UserError: the first such file.
    """
    for file in sorted(folder.rglob("*")):
        if file.is_dir():
            continue
        if not file.is_file():
            raise UserError(f"{file} is a pipe, a device or a broken link; a model folder holds files, copy it anew")
        if file.suffix != ".json":
            continue
        try:
            content = read_record(file, (dict, list))
        except RecordError as error:
            raise UserError(f"{file} cannot be read as JSON ({error}); copy the model folder anew") from None
        if _asks_for_code(content):
            raise UserError(
                f"{file} asks to run code of its own, which is never done; use a model without auto_map (or delete "
                f"auto_map from the file, where transformers has this kind of model itself)"
            )


def _asks_for_code(content: dict | list) -> bool:
    """Whether `auto_map` or `trust_remote_code` is set at any depth; a vocabulary may have the words, with a number."""
    waiting: list[object] = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("auto_map"), (dict, list, str)) or value.get("trust_remote_code") is True:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja", *WEIGHT_FILES):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
            try:
                with file.open("rb") as content:
                    while piece := content.read(1 << 24):
                        digest.update(piece)
            except OSError as error:
                raise UserError(f"cannot read {file} ({error.strerror}); copy the model folder anew") from None
    return f"sha256 {digest.hexdigest()}"


# ---- hints ----------------------------------------------------------------------------------------------------------


def _spelling(spec: str) -> str:
    """What to write for a spelling that other programs understand; "" where nothing comes near."""
    folder = Path(os.path.expanduser(spec))
    if folder.is_dir():
        return _folder_hint(folder) or f", a folder without a model ({SPELLINGS})"
    if spec.startswith((".", "~", "/")):
        return ", and there is no such folder"
    spec = spec.removeprefix(HUB).rstrip("/")
    for model, tag in open_clip.list_pretrained():
        if spec == str(open_clip.get_pretrained_cfg(model, tag).get("hf_hub")).rstrip("/"):
            return f"; write --vlm {model}/{tag}"
    names = {name.lower(): name for name in open_clip.list_models()}
    if clip := re.fullmatch(r"openai/clip-vit-(base|large)-patch(\d+)(-336)?", spec):
        spec = f"ViT-{clip[1][0]}-{clip[2]}{clip[3] or ''}"
    # OpenAI's own names: ViT-B/32, ViT-L/14@336px
    name = names.get(spec.replace("/", "-").replace("@", "-").removesuffix("px").lower())
    if name and (tags := open_clip.list_pretrained_tags_by_model(name)):
        return f"; write --vlm {name}/{tags[0]}"
    return ""


def _download(spec: str) -> str:
    """How to get a model of the hub, which ORG/NAME may be."""
    spec = spec.removeprefix(HUB)
    if "/" not in spec or not re.fullmatch(HUB_NAME, spec):
        return ""
    folder = spec.split("/")[1]
    return (
        f"; get a model of the hub with: hf download {spec} --local-dir {folder}, and write --vlm transformers:{folder} "
        f"(CLIP, SigLIP), chat:{folder} (chat models) or local-dir:{folder} (open_clip)"
    )


def _folder_hint(folder: Path) -> str:
    """How to write a folder, by what is in it; "" for one without a model."""
    if (folder / "open_clip_config.json").is_file():
        return f"; write --vlm local-dir:{folder}"
    if any((place / "coreg.json").is_file() for place in (folder, folder / "export")):
        return f"; write --vlm run:{folder}"
    try:
        config = read_record(folder / "config.json", {"model_type": str})
    except RecordError:
        return ""
    chat = any("For" in str(name) for name in config.get("architectures") or [])
    return f"; write --vlm {'chat' if chat else 'transformers'}:{folder}"


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
        with loading(), cache_only(model.tag is not None or model.name.startswith("hf-hub:")):
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
        with loading():
            return _load(model)
    except Exception as error:
        raise UserError(f"cannot load {model.spec}: {one_line(error)}; {offline}") from None


def load_transformers(model: ModelSpec, kind: str, dtype: torch.dtype, what: str, remedy: str) -> tuple[Any, Any]:
    """Processor and model of a folder that transformers saved; only safetensors are read and no code in it is run.

    Args:
        kind: name of transformers' class. what, remedy: of the error's line, what it was to be and what helps.

    Raises:
        UserError: they cannot be loaded.
    """
    safely = {"local_files_only": True, "trust_remote_code": False}
    try:
        with loading():
            processor = transformers.AutoProcessor.from_pretrained(model.name, **safely)
            load: Callable = getattr(transformers, kind).from_pretrained
            return processor, load(model.name, dtype=dtype, use_safetensors=True, **safely)
    except Exception as error:  # transformers lets every kind of error through
        raise UserError(f"cannot load {model.spec}{what}: {one_line(error)}; {remedy}") from None


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
def loading() -> Iterator[None]:
    """How models are loaded: no code of theirs is run, and without the libraries' progress bars and log lines.

    Those would stand before the one line of an error.
    """
    before, bars = logging.root.manager.disable, transformers.utils.logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        with without_foreign_code():
            yield
    finally:
        logging.disable(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()
