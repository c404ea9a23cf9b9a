"""The demo's annotator: a tiny open_clip CLIP, shipped compactly and unpacked into an ordinary open_clip model folder.

The shipped folder (`glyph_clip/`) keeps half-precision weights and only those rows of the token table that training has
seen. `local_dir` scatters the rows into CLIP's full table, once, into the user's cache, so that the model is loaded like
every other one: `open_clip.create_model_and_transforms("local-dir:" + local_dir())`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from coreg.errors import UserError
from coreg.files import making_folder
from coreg.plaintext import one_line

SHIPPED = Path(__file__).parent / "glyph_clip"
CONFIG_FILE = "open_clip_config.json"  # open_clip's own name, in the compact and in the full folder
COMPACT_FILE = "compact.safetensors"
FULL_FILE = "open_clip_model.safetensors"  # what open_clip tries first
TOKEN_TABLE = "token_embedding.weight"
TOKEN_IDS = "token_ids"
REMEDY = "it takes about 14 MB in a folder of yours: name another cache with: export XDG_CACHE_HOME=FOLDER"
TEMPLATES_FILE = Path(__file__).parent / "templates.txt"


def demo_templates() -> list[str]:
    """The demo's prompt templates, each with one `{}` for the class name."""
    return TEMPLATES_FILE.read_text(encoding="utf-8").split("\n")[:-1]


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/coreg`, or `~/.cache/coreg`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coreg"


def save_compact(folder: Path, config: dict, state: dict[str, torch.Tensor], token_ids: torch.Tensor) -> None:
    """Write a compact model folder.

    Args:
        folder: must exist; its files of the same names are replaced.
        config: `model_cfg` (with the full vocabulary size) and `preprocess_cfg` as open_clip reads them.
        state: state dict of the compact model, whose token table has one row per entry of `token_ids`.
        token_ids: int64 (V,), sorted, the rows of the full token table.
    """
    tensors = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in state.items()}
    (folder / COMPACT_FILE).write_bytes(save(tensors | {TOKEN_IDS: token_ids.to(torch.int32)}))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_compact(folder: Path) -> tuple[dict, dict[str, torch.Tensor], torch.Tensor]:
    """Read a compact model folder.

    Returns:
        config dict; state dict in float32 with a token table of V rows; token ids int64 (V,).

    Raises:
        UserError: where the folder does not hold such a model.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / COMPACT_FILE)
        token_ids = tensors.pop(TOKEN_IDS).long()
        vocabulary = config["model_cfg"]["text_cfg"]["vocab_size"]
        rows = tensors[TOKEN_TABLE].shape[0]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = one_line(error)
        raise UserError(
            f"{folder} holds no compact annotator ({type(error).__name__}: {reason}); expected {CONFIG_FILE} and "
            f"{COMPACT_FILE}; write one with: python -m coreg.demo.pretrain --output NEW_FOLDER"
        ) from None
    if rows != len(token_ids) or not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocabulary:
        raise UserError(
            f"{folder / COMPACT_FILE} has {rows} token rows and {len(token_ids)} token ids for a vocabulary of "
            f"{vocabulary}; expected one id a row; write it anew with: python -m coreg.demo.pretrain"
        )
    return config, {name: value.float() for name, value in tensors.items()}, token_ids


def local_dir(folder: Path = SHIPPED, cache_dir: Path | None = None) -> str:
    """Unpack a compact model folder into a folder that open_clip loads by `local-dir:<path>`, unless that is done already.

    The target is named by a hash of the compact files: any number of processes may call this at the same time.

    Args:
        folder: compact model folder, by default the shipped one.
        cache_dir: where unpacked models are kept, by default `default_cache_dir()`.

    Returns:
        absolute path of the unpacked folder, without open_clip's prefix.

    Raises:
        UserError: where `folder` is no compact model or the cache cannot be written.
    """
    config, state, token_ids = load_compact(folder)
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, COMPACT_FILE):
        digest.update((folder / name).read_bytes())
    cache = (cache_dir or default_cache_dir()).absolute()
    target = cache / f"glyph_clip-{digest.hexdigest()[:16]}"
    if target.is_dir():
        return str(target)
    # Tokens that training never saw stay zero: they carry no meaning rather than a random one.
    table = torch.zeros(config["model_cfg"]["text_cfg"]["vocab_size"], state[TOKEN_TABLE].shape[1])
    table[token_ids] = state[TOKEN_TABLE]
    state[TOKEN_TABLE] = table
    try:
        with making_folder(target, REMEDY) as unfinished:
            (unfinished / FULL_FILE).write_bytes(save(state))
            (unfinished / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    except UserError:
        if not target.is_dir():  # another process may have been faster: its folder holds the same bytes
            raise
    return str(target)
