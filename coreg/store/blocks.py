"""Blocks of an annotation store: one file each that carries its own checksum and appears whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from coreg.errors import UserError
from coreg.files import write_atomically
from coreg.plaintext import one_line
from coreg.records import Number, RecordError, check_record, parse_record

HEAD = {"job": str, "index": Number(0), "errors": dict, "sha256": str}
REMEDY = "what is written is kept: free some space and run the same command again"


def stacked(parts: Iterable[np.ndarray], rows: int) -> np.ndarray:
    """Arrays (n, ...) of one kind one below the other, `rows` in all, copied as they come: never all of them twice."""
    parts = iter(parts)
    first = next(parts)
    whole, stop = np.empty((rows, *first.shape[1:]), dtype=first.dtype), 0
    for part in itertools.chain([first], parts):
        whole[stop : stop + len(part)] = part
        stop += len(part)
    return whole


class DamagedBlockError(Exception):
    """A block file that is not what its writer wrote; the message says what is wrong with it."""


class BadEvidenceError(Exception):
    """Evidence that nobody can learn from; the message says what is wrong with it.

    Attributes:
        row: the first image, as a row of the whole list, or None where it is not about one image.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


def _checksum(tensors: dict[str, np.ndarray], job: str, index: int, errors: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps([job, index, errors], sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def write_block(
    path: Path, index: int, job: str, tensors: dict[str, np.ndarray], errors: dict[int, str], remedy: str = REMEDY
) -> None:
    """Write block `index` of job `job` (hex) with its checksum; `errors` maps rows of the whole list to reasons."""
    reasons = {str(row): reason for row, reason in sorted(errors.items())}
    # safetensors takes the bytes as they lie in memory, whatever the order of the axes
    tensors = {name: np.ascontiguousarray(table) for name, table in tensors.items()}
    head = {"job": job, "index": index, "errors": reasons, "sha256": _checksum(tensors, job, index, reasons)}
    # One metadata key: safetensors does not keep the order of several, and equal blocks are to be equal files.
    content = save(tensors, metadata={"coreg": json.dumps(head, sort_keys=True)})
    write_atomically(path, content, remedy)


def _read(path: Path, with_tensors: bool) -> tuple[dict[str, Any], dict[int, str], dict[str, np.ndarray]]:
    """The header, the reasons in it, and the tensors or none."""
    try:
        if not path.is_file():
            raise RecordError("there is no such file")  # a pipe would be waited for
        with safe_open(path, framework="numpy") as file:
            head = parse_record((file.metadata() or {}).get("coreg", "null"), HEAD)
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
        for row, reason in head["errors"].items():
            check_record(reason, str, f"errors.{row}")
        return head, {int(row): reason for row, reason in head["errors"].items()}, tensors
    except Exception as error:  # safetensors lets many kinds through: damage can be anywhere
        raise DamagedBlockError(f"it cannot be read ({one_line(error)})") from None


def read_block(path: Path, index: int, job: str) -> tuple[dict[str, np.ndarray], dict[int, str], str]:
    """Read and verify a block.

    Returns:
        Its tensors (see the module's text), the reasons of its unreadable rows, and its checksum (hex).

    Raises:
        DamagedBlockError: it cannot be read, belongs to another job or place, or its bytes are not those written.
    """
    head, errors, tensors = _read(path, with_tensors=True)
    if (head["job"], head["index"]) != (job, index):
        raise DamagedBlockError("it belongs to another job or place")
    if _checksum(tensors, job, index, head["errors"]) != head["sha256"]:
        raise DamagedBlockError("its checksum does not match")
    return tensors, errors, head["sha256"]


def read_head(path: Path) -> tuple[str, dict[int, str]]:
    """The hash of the job that a block says it belongs to, and the reasons of its unreadable rows; it is not verified.

    Raises:
        DamagedBlockError: the header cannot be read.
    """
    head, errors, _ = _read(path, with_tensors=False)
    return head["job"], errors


def check_evidence(tensors: dict[str, np.ndarray], errors: dict[int, str], rows: range, manifest: dict[str, Any]) -> None:
    """Make sure that a block is evidence: types, shapes, ranges, and no NaN.

    Args:
        tensors: votes int16 (n, T) of -1..C-1, probs float16 (n, C) of 0..1 whose rows sum to 1 but for rounding,
            features float16 (n, D) where the manifest has their length, and tiles float16 (n, M, D) where it has grids;
            `answers` are not checked. Without templates only candidates bool (n, C), one at least in every row.
        errors: rows of the whole list that could not be read.
        rows: those of the block.
        manifest: of the store.

    Raises:
        BadEvidenceError: the first thing that is wrong.
    """
    classes, templates, features = len(manifest["class_names"]), len(manifest["templates"]), manifest.get("features")
    lengths = {"votes": templates, "probs": classes} if templates else {"candidates": classes}
    shapes = {name: (len(rows), length) for name, length in lengths.items()}
    shapes |= {"features": (len(rows), features)} if features else {}
    if features and manifest.get("tiles"):  # each of g x g parts for every side g
        shapes["tiles"] = (len(rows), sum(side**2 for side in manifest["tiles"]), features)
    if set(tensors) - {"answers"} != set(shapes):
        raise BadEvidenceError(f"it holds {', '.join(sorted(tensors))}, expected {', '.join(sorted(shapes))}")
    for name, shape in shapes.items():
        kind, there = np.dtype({"votes": np.int16, "candidates": bool}.get(name, np.float16)), tensors[name]
        if there.dtype != kind or there.shape != shape:
            raise BadEvidenceError(f"{name} are {there.dtype} {there.shape}, expected {kind} {shape}")
    if any(row not in rows for row in errors):
        raise BadEvidenceError("it names unreadable images of other blocks")
    if not templates:
        return _refuse(tensors["candidates"].any(axis=1), rows, "it has no candidate")
    votes, probs = tensors["votes"], tensors["probs"]
    # Bits of floats are compared as integers, many times faster: 0x3C00 is 1.0, 0x7C00 infinity, beyond it NaN.
    if probs.view(np.uint16).max() > 0x3C00:
        _refuse(((probs >= 0) & (probs <= 1)).all(axis=1), rows, "its probabilities are NaN or not between 0 and 1")
    # a rounding to 11 bits moves a sum by 2^-11, and by half the smallest number for every term below that; merging rounds
    # again, so several are allowed for
    slack = 2.0**-8 + classes * 2.0**-23
    _refuse(abs(probs.sum(axis=1, dtype=np.float32) - 1) <= slack, rows, "its probabilities do not sum to 1")
    if votes.min() < -1 or votes.max() >= classes:
        _refuse(((votes >= -1) & (votes < classes)).all(axis=1), rows, f"its votes are not between -1 and {classes - 1}")
    for name in shapes.keys() & {"features", "tiles"}:
        features = tensors[name]
        if features.view(np.int16).max() >= 0x7C00 or features.view(np.uint16).max() >= 0xFC00:
            finite = np.isfinite(features).reshape(len(features), -1).all(axis=1)
            _refuse(finite, rows, f"its {name if name == 'features' else 'features of tiles'} are not finite")


def _refuse(good: np.ndarray, rows: range, message: str) -> None:
    if not good.all():
        raise BadEvidenceError(message, rows[int(good.argmin())])


def pack_answers(answers: list[list[str]]) -> np.ndarray:
    """The raw answers of a chat model, n images by T templates, as uint8 (B,): JSON, so that no answer can break it."""
    return np.frombuffer(json.dumps(answers, ensure_ascii=False).encode("utf-8", "replace"), dtype=np.uint8)


def unpack_answers(packed: np.ndarray) -> list[list[str]]:
    """The inverse of `pack_answers`.

    Raises:
        UserError: these are no answers.
    """
    try:
        return parse_record(packed.tobytes(), [[str]])
    except RecordError as error:
        raise UserError(f"the answers in the annotation store are damaged: {error}; annotate again") from None
