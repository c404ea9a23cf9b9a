"""Checkpoints: complete, checksummed, renamed into place, the last two kept; a damaged one falls back to the one before."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from coreg.errors import UserError
from coreg.files import making_folder, sha256_of
from coreg.plaintext import one_line
from coreg.records import Number, RecordError, read_record

KEPT = 2
REMEDY = "the earlier ones are intact: free some space and give the same command again"
RECORD = {"sha256": str, "number": Number(0)}


def save(folder: Path, number: int, state: dict[str, Any]) -> None:
    """Write `state` (nested dicts and lists of tensors, numbers and strings) as checkpoint `number`.

    Raises:
        UserError: it could not be written; the checkpoints before it are untouched.
    """
    with making_folder(folder / f"{number:08d}", REMEDY, replace=True) as temporary:
        weights = temporary / "state.pt"
        with weights.open("wb") as file:  # torch says of a path what failed, of a file also why
            torch.save(state, file)
        (temporary / "state.json").write_text(json.dumps({"sha256": sha256_of(weights), "number": number}))
    for old in _numbers(folder)[:-KEPT]:
        shutil.rmtree(folder / f"{old:08d}", ignore_errors=True)


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if path.is_dir() and re.fullmatch("[0-9]{8,18}", path.name))


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
            record = read_record(path / "state.json", RECORD)
            if not (path / "state.pt").is_file():  # reading a pipe would never end
                raise RecordError("state.pt is no file")
            if record == {"sha256": sha256_of(path / "state.pt"), "number": number}:
                return number
            problem = "its checksum is wrong"
        except (OSError, RecordError) as error:
            problem = str(error)
        warnings.warn(f"checkpoint {path} is damaged ({problem}); falling back to the one before it", stacklevel=2)
    if numbers:
        raise UserError(f"no checkpoint in {folder} can be read; delete {folder} to start the training anew")
    return None


def load(folder: Path, number: int, mapped: bool = False) -> dict[str, Any]:
    """Checkpoint `number` on the CPU.

    Args:
        mapped: tables of the training images (`verdicts`) stay in the file and are read where they are used.

    Raises:
        RecordError: it holds anything but nested dicts and lists of tensors, numbers and strings.
    """
    try:
        state = torch.load(folder / f"{number:08d}" / "state.pt", map_location="cpu", weights_only=True, mmap=mapped)
        return _copied(state) if mapped else state
    except Exception as error:  # of the archive, of the restricted unpickler, or of whatever it was handed
        raise RecordError(f"{type(error).__name__}: {one_line(error)}") from None


def _copied(value: Any) -> Any:
    """With copies in the place of tensors that lie in a file, which the next checkpoints delete; `verdicts` as they are."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list):
        return [_copied(part) for part in value]
    if isinstance(value, dict):
        return {key: part if key == "verdicts" else _copied(part) for key, part in value.items()}
    return value
