"""Records from disk, which are checked before anything believes them."""

from __future__ import annotations

import hashlib
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreg.plaintext import one_line


class RecordError(Exception):
    """A record is not what its writer wrote; the message says what is wrong with it, and where."""


@dataclass(frozen=True)
class Number:
    """A finite number within bounds, a whole one unless `whole` is false."""

    low: float = float("-inf")
    high: float = float("inf")
    whole: bool = True


@dataclass(frozen=True)
class Maybe:
    """A value that may be missing or null, and has to be of `kind` otherwise."""

    kind: Any


@dataclass(frozen=True)
class Each:
    """An object with any names, whose values all have to be of `kind`."""

    kind: Any


def check_record(value: Any, kind: Any, where: str = "") -> None:
    """Compare a value read from JSON with what it has to be.

    Args:
        value: what was read.
        kind: a type (`str`, `bool`, `dict`, `list`); a `Number`; a dict of required entries, more of which may be there;
            an `Each`; a list of one kind, for a list of any length of it; a `Maybe`; or a tuple of kinds, of which one has
            to fit.
        where: the name of the value, for the message.

    Raises:
        RecordError: it is something else.
    """
    name = where or "its content"
    if isinstance(kind, Maybe):
        if value is not None:
            check_record(value, kind.kind, where)
    elif isinstance(kind, tuple):
        problems = []
        for one in kind:
            try:
                return check_record(value, one, where)
            except RecordError as error:
                problems.append(str(error))
        raise RecordError(problems[0])
    elif isinstance(kind, Number):
        fits = isinstance(value, int if kind.whole else (int, float)) and not isinstance(value, bool)
        if not (fits and kind.low <= value <= kind.high and abs(value) != float("inf")):
            raise RecordError(
                f"{name} is {_short(value)}, expected a {'whole ' if kind.whole else ''}number{_bounds(kind)}"
            )
    elif isinstance(kind, dict):
        check_record(value, dict, where)
        for key, inner in kind.items():
            if key not in value and not isinstance(inner, Maybe):
                raise RecordError(f"{f'{where} has no' if where else 'there is no'} {key!r}")
            check_record(value.get(key), inner, f"{where}.{key}" if where else key)
    elif isinstance(kind, Each):
        check_record(value, dict, where)
        for key, item in value.items():
            check_record(item, kind.kind, f"{where}.{key}" if where else key)
    elif isinstance(kind, list):
        check_record(value, list, where)
        for index, item in enumerate(value):
            check_record(item, kind[0], f"{name}[{index}]")
    elif not isinstance(value, kind):
        raise RecordError(f"{name} is {_short(value)}, expected {NAMES.get(kind) or f'a {kind.__name__}'}")


NAMES = {str: "a text", bool: "true or false", dict: "an object", list: "a list"}


def _bounds(kind: Number) -> str:
    low, high = kind.low != float("-inf"), kind.high != float("inf")
    if low and high:
        return f" from {kind.low:g} to {kind.high:g}"
    return f" of at least {kind.low:g}" if low else f" of at most {kind.high:g}" if high else ""


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else f"{text[:37]}..."


def parse_record(text: str | bytes, kind: Any = dict) -> Any:
    """The value that a JSON text holds, compared with `kind` (see `check_record`).

    Raises:
        RecordError: it is no JSON, is nested without end, or holds something else.
    """
    # as `write_atomically` writes it: file names that are no UTF-8 are kept as they are
    text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"it is no JSON ({one_line(error)})") from None
    check_record(value, kind)
    return value


def hash_of(value: Any) -> str:
    """sha256 (hex) of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksum_of(record: dict[str, Any]) -> str:
    """sha256 (hex) of everything in a record but its entry `checksum`, however the file is laid out."""
    return hash_of({name: value for name, value in record.items() if name != "checksum"})


def read_file(path: Path, largest: int | None = None) -> bytes:
    """What a regular file holds; pipes and devices, at which a reader would wait, are refused.

    Raises:
        RecordError: it is missing, no file, cannot be read, or has more than `largest` bytes.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RecordError("it is no file")
        if largest is not None and status.st_size > largest:
            raise RecordError(f"it has {status.st_size} bytes")
        return path.read_bytes()
    except OSError as error:
        raise RecordError(error.strerror or str(error)) from None


def read_record(path: Path, kind: Any = dict, largest: int = 1 << 28) -> Any:
    """A JSON file, compared with `kind` (see `check_record`).

    Args:
        largest: bytes; a larger file is refused without being read.

    Raises:
        RecordError: it is missing, cannot be read, is no JSON, or holds something else. The caller, who knows what the
            file is for, says so to the person.
    """
    return parse_record(read_file(path, largest), kind)
