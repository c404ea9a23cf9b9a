"""Candidate sets that several people gave to the same images: PLCIFAR10 (Wang et al., PLENCH, ICLR 2025)."""

from __future__ import annotations

import hashlib
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from coreg.errors import UserError
from coreg.plaintext import one_line
from coreg.records import Each, Number, RecordError, check_record, read_file, read_record

FILE = "plcifar10.pkl"
LARGEST = 1 << 28  # bytes
_IGNORED = {"PROTO", "FRAME", "STOP"}
_EMPTY = {"EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET", "EMPTY_DICT"}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_PUT, _GET = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
_APPEND, _SET = {"APPEND", "APPENDS", "ADDITEMS"}, {"SETITEM", "SETITEMS"}
_GATHER = {"LIST", "TUPLE", "DICT", "FROZENSET"}


def read_people(path: str, n_images: int, n_classes: int) -> list[list[list[int]]]:
    """Of each of the training images the sets that people gave to it, classes in [0, C).

    Args:
        path: a JSON file that maps the number of an image to its sets, {"0": [[3, 5], [3]], ...}; the same as a pickle of
            plain values, as PLCIFAR10 comes; or a folder that holds `plcifar10.pkl`.

    Raises:
        UserError: it cannot be read, holds anything else, or no class for an image.
    """
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        if file.suffix == ".json":
            sets = read_record(file, dict, LARGEST)
        else:
            sets = plain_pickle(read_file(file, LARGEST))
            sets = {str(key): value for key, value in sets.items()} if isinstance(sets, dict) else sets
        check_record(sets, Each([[Number(0, n_classes - 1)]]))
    except RecordError as error:
        raise UserError(
            f"cannot read candidate sets in {file}: {error}; give PLCIFAR10's {FILE}, or a .json file that maps the number "
            f'of each training image to the sets that people gave, {{"0": [[3, 5], [3]], ...}}'
        ) from None
    lacking = [number for number in range(n_images) if not any(sets.get(str(number), []))]
    if lacking or len(sets) != n_images:
        raise UserError(
            f"{file} has candidate sets of {len(sets)} images, and there are {n_images} training images"
            + (f" (image {lacking[0]} has none)" if lacking else "")
            + "; they have to be the same, numbered from 0 on"
        )
    return [sets[str(number)] for number in range(n_images)]


def aggregate(sets: list[list[list[int]]], n_classes: int) -> np.ndarray:
    """PLCIFAR10-Aggregate, bool (N, C): every class that somebody named."""
    table = np.zeros((len(sets), n_classes), dtype=bool)
    for row, given in zip(table, sets):
        row[[label for one in given for label in one]] = True
    return table


def vaguest(sets: list[list[list[int]]], n_classes: int) -> np.ndarray:
    """PLCIFAR10-Vaguest, bool (N, C): the largest set that one person gave, the first of several as large."""
    return aggregate([[max(given, key=len)] for given in sets], n_classes)


def validation_rows(n: int, share: float, seed: int) -> np.ndarray:
    """Positions int64 of the training images that PLENCH puts aside for validation, int(n * share) of n.

    They are the first of a shuffle of all by numpy's legacy generator, whose seed is the MD5 of "(seed,)" modulo 2^31.

    Args:
        seed: its trial seed.
    """
    digest = hashlib.md5(str((seed,)).encode(), usedforsecurity=False).hexdigest()
    order = np.arange(n)
    np.random.RandomState(int(digest, 16) % 2**31).shuffle(order)
    return order[: int(n * share)]


def plain_pickle(data: bytes) -> Any:
    """The dicts, lists and whole numbers that a pickle holds; nothing in it is ever run.

    The standard library lists its instructions without following them, and those that build such values are followed here;
    there are none among them that could name a function, let alone call it. Tuples and sets become lists.

    Raises:
        RecordError: it is no pickle, or holds anything else.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    try:
        for code, argument, _ in pickletools.genops(data):
            name = code.name
            if name == "MARK":
                marks.append(len(stack))
            elif name in _EMPTY:
                stack.append({} if name == "EMPTY_DICT" else [])
            elif name in _NUMBERS:
                stack.append(int(argument))
            elif name in _PUT:
                memo[len(memo) if argument is None else argument] = stack[-1]
            elif name in _GET:
                stack.append(memo[argument])
            elif name in _APPEND:
                items = _cut(stack, len(stack) - 1 if name == "APPEND" else marks.pop())
                stack[-1].extend(items)
            elif name in _SET:
                items = _cut(stack, len(stack) - 2 if name == "SETITEM" else marks.pop())
                stack[-1].update(zip(items[::2], items[1::2]))
            elif name in _GATHER:
                items = _cut(stack, marks.pop())
                stack.append(dict(zip(items[::2], items[1::2])) if name == "DICT" else items)
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                stack.append(_cut(stack, len(stack) - int(name[-1])))
            elif name not in _IGNORED:
                raise RecordError(f"it holds more than dicts, lists and whole numbers ({name})")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RecordError(f"it is no whole pickle ({one_line(error)})") from None
    if len(stack) != 1:
        raise RecordError("it is no whole pickle")
    return stack[0]


def _cut(stack: list[Any], start: int) -> list[Any]:
    """What lies on a stack from `start` on, taken away."""
    if start < 0:
        raise IndexError("it takes away what is not there")
    items = stack[start:]
    del stack[start:]
    return items
