"""Checkpoints: complete, checksummed, renamed into place, the last two kept; a damaged one falls back to the one before."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from coreg.errors import UserError

KEPT = 2


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def save(folder: Path, number: int, state: dict[str, Any]) -> None:
    """Write `state` (nested dicts and lists of tensors, numbers and strings) as checkpoint `number`.

    Raises:
        UserError: it could not be written; the checkpoints before it are untouched.
    """
    final, temporary = folder / f"{number:08d}", folder / f".{number:08d}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        weights = temporary / "state.pt"
        with weights.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        (temporary / "state.json").write_text(json.dumps({"sha256": _digest(weights), "number": number}))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        # behind torch's RuntimeError about its own bookkeeping stands what the system said
        cause = error if isinstance(error, OSError) else error.__context__
        reason = getattr(cause, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"cannot write a checkpoint to {folder} ({reason}); "
            "the earlier ones are intact: free some space and give the same command again"
        ) from None
    for old in _numbers(folder)[:-KEPT]:
        shutil.rmtree(folder / f"{old:08d}", ignore_errors=True)


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if path.is_dir() and path.name.isdigit())


def latest(folder: Path) -> int | None:
    """Number of the newest checkpoint whose checksum holds, or None where there is none at all.

    Damaged ones are passed over with a warning.

    Raises:
        UserError: there are checkpoints and all are damaged.
    """
    numbers = _numbers(folder)
    for number in reversed(numbers):
        path = folder / f"{number:08d}"
        try:
            recorded = json.loads((path / "state.json").read_text())["sha256"]
            if recorded == _digest(path / "state.pt"):
                return number
            problem = "its checksum is wrong"
        except (OSError, ValueError, KeyError) as error:
            problem = str(error)
        warnings.warn(f"checkpoint {path} is damaged ({problem}); falling back to the one before it", stacklevel=2)
    if numbers:
        raise UserError(f"no checkpoint in {folder} can be read; delete {folder} to start the training anew")
    return None


def load(folder: Path, number: int) -> dict[str, Any]:
    """Checkpoint `number` on the CPU."""
    return torch.load(folder / f"{number:08d}" / "state.pt", map_location="cpu", weights_only=True)
