"""Blocks of an annotation store: one file each that carries its own checksum and appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from coreg.files import write_atomically


class DamagedBlockError(Exception):
    """A block file that is not what its writer wrote; the message says what is wrong with it."""


def _checksum(tensors: dict[str, np.ndarray], job: str, index: int, errors: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([job, index, errors], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def write_block(path: Path, index: int, job: str, tensors: dict[str, np.ndarray], errors: dict[int, str]) -> None:
    """Write block `index` of job `job` (hex) with its checksum; `errors` maps rows of the whole list to reasons."""
    told = {str(row): reason for row, reason in sorted(errors.items())}
    head = {"job": job, "index": index, "errors": told, "sha256": _checksum(tensors, job, index, told)}
    # One metadata key: safetensors does not keep the order of several, and equal blocks are to be equal files.
    content = save(tensors, metadata={"coreg": json.dumps(head, sort_keys=True)})
    write_atomically(path, content, "what is written is kept: free some space and run the same command again")


def read_block(path: Path, index: int, job: str) -> tuple[dict[str, np.ndarray], dict[int, str], str]:
    """Read and verify a block.

    Returns:
        Its tensors (see the module's text), the reasons of its unreadable rows, and its checksum (hex).

    Raises:
        DamagedBlockError: it cannot be read, belongs to another job or place, or its bytes are not those written.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            head = json.loads((file.metadata() or {})["coreg"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        errors, checksum = dict(head["errors"]), head["sha256"]
        if (head["job"], head["index"]) != (job, index):
            raise DamagedBlockError("it belongs to another job or place")
        if _checksum(tensors, job, index, errors) != checksum:
            raise DamagedBlockError("its checksum does not match")
        return tensors, {int(row): reason for row, reason in errors.items()}, checksum
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedBlockError(f"it cannot be read ({' '.join(str(error).split())})") from None


def read_errors(path: Path) -> dict[int, str]:
    """The reasons of a block's unreadable rows, from its header alone and without verifying the block.

    Raises:
        DamagedBlockError: the header cannot be read.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return {int(row): reason for row, reason in json.loads((file.metadata() or {})["coreg"])["errors"].items()}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedBlockError(f"it cannot be read ({' '.join(str(error).split())})") from None


def pack_answers(answers: list[list[str]]) -> np.ndarray:
    """The raw answers of a chat model, n images by T templates, as uint8 (B,): JSON, so that no answer can break it."""
    return np.frombuffer(json.dumps(answers, ensure_ascii=False).encode("utf-8", "replace"), dtype=np.uint8)


def unpack_answers(packed: np.ndarray) -> list[list[str]]:
    """The inverse of `pack_answers`."""
    return json.loads(packed.tobytes())
