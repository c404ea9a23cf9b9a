"""Random numbers that are a function of a key: the same draw wherever, whenever and in whatever company it is made.

A stream (`torch.Generator`, `np.random.seed`) gives a sample other numbers when the batch, the worker or the number of
processes changes. Here every number is a hash of (key, row, column), so that N processes draw what one process draws,
and a resumed run needs no generator state. The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast
splittable pseudorandom number generators", OOPSLA 2014; constants of Stafford's Mix13) in counter mode.
"""

from __future__ import annotations

import math
import operator
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, odd: the increment of SplitMix64
_MUL1 = 0xBF58476D1CE4E5B9
_MUL2 = 0x94D049BB133111EB
_ROUNDS = 8  # of the Feistel network; four are enough for a random function (Luby and Rackoff, 1988)
_INT, _STR = 1, 2  # what a part of a key is, so that "a" and crc32(b"a") are different parts


def _parts(key: Sequence[int | str]) -> list[tuple[int, int]]:
    """(kind, value in [0, 2**64)) of every part of a key; negative integers in two's complement."""
    parts = []
    for part in key:
        if isinstance(part, str):
            parts.append((_STR, zlib.crc32(part.encode("utf-8", "surrogatepass"))))
            continue
        value = operator.index(part)
        if not -(1 << 63) <= value <= _MASK:
            raise ValueError(f"key part {value} does not fit in 64 bits")
        parts.append((_INT, value & _MASK))
    return parts


def _state(key: Sequence[int | str]) -> int:
    """64 bits that are a function of the key."""
    parts = _parts(key)
    state = _mix_int((len(parts) * _GOLDEN) & _MASK)
    for kind, value in parts:
        state = _mix_int(_mix_int((state + kind * _GOLDEN) & _MASK) ^ value)
    return state


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MUL1) & _MASK
    z = ((z ^ (z >> 27)) * _MUL2) & _MASK
    return z ^ (z >> 31)


def _signed(value: int) -> int:
    """The int64 with the bits of a number in [0, 2**64): torch has no full set of operators for uint64."""
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift of int64: torch's `>>` copies the sign bit, the mask takes the copies away."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(_MUL1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MUL2)
    return z ^ _shift_right(z, 31)


def keyed_uniform(key: Sequence[int | str], rows: Tensor, draws: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on nothing but (key, row, column).

    Args:
        key: integers of at most 64 bits and strings, e.g. `(seed, "train", epoch, "net1", "weak1")`. Order, length and
            type of the parts count.
        rows: int64 (n,), sample indices, in any order, repeated or not; on any device.
        draws: how many numbers each row gets. Column j is the same whatever `draws` is.

    Returns:
        float32 (n, draws) on the device of `rows`, multiples of 2**-24, the same bits on every device.

    Raises:
        TypeError: `rows` is not int64, or a part of the key is neither an integer nor a string.
        ValueError: `rows` is not one-dimensional, `draws` is negative, or an integer of the key exceeds 64 bits.
    """
    if rows.dtype != torch.int64:
        raise TypeError(f"rows have to be int64 sample indices, not {rows.dtype}")
    if rows.ndim != 1 or draws < 0:
        raise ValueError(f"rows have to be one-dimensional and draws >= 0, got {tuple(rows.shape)} and {draws}")
    state = _state(key)
    # Two rounds of mixing on either side of the key's state: rows of neighbouring keys must not be shifted copies.
    per_row = _mix(_mix(rows * _signed(_GOLDEN)) ^ _signed(state))
    counter = torch.arange(1, draws + 1, dtype=torch.int64, device=rows.device) * _signed(_GOLDEN)
    bits = _mix(per_row.unsqueeze(1) + counter)
    # float32 holds 24 bits exactly; more would round up to 1.0.
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def keyed_generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator (Philox) for the draws that belong to no sample: permutations, scalars, initial values.

    Args:
        key: integers of at most 64 bits and strings; the same key gives the same generator in every process and run.

    Raises:
        TypeError: a part is neither an integer nor a string.
        ValueError: an integer exceeds 64 bits.
    """
    parts = _parts(key)
    # Fixed-width words after the length: SeedSequence pads with zeros, so that [1] and [1, 0] would be one seed.
    words = [len(parts)]
    for kind, value in parts:
        words += [kind, value & 0xFFFFFFFF, value >> 32]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def keyed_order(key: Sequence[int | str], n: int, places: np.ndarray) -> np.ndarray:
    """What stands at some places of an order of 0 .. n-1 that the key draws, without making the whole order.

    A Feistel network over Z_a x Z_b with a b >= n, additions in the place of exclusive or (Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", CT-RSA 2002, method "generalised Feistel"): a bijection of 0 .. a b - 1, walked along from
    a place until it comes back below n. a b - n is below the square root of n, so that hardly any place walks.

    Args:
        key: see `keyed_uniform`. places: int64 (m,), in 0 .. n-1.

    Returns:
        int64 (m,), all different where the places are; all of 0 .. n-1 for all places.
    """
    state = _state(key)
    left = math.isqrt(max(n - 1, 0)) + 1
    sizes = np.array([left, -(-n // left)], dtype=np.uint64)

    def through(numbers: np.ndarray) -> np.ndarray:
        halves = list(np.divmod(numbers, sizes[1]))
        for number in range(_ROUNDS):
            side = number % 2
            added = _mix_array(halves[1 - side] + np.uint64((state + (number + 1) * _GOLDEN) & _MASK))
            halves[side] = (halves[side] + added % sizes[side]) % sizes[side]
        return halves[0] * sizes[1] + halves[1]

    at = through(places.astype(np.uint64))
    while (outside := np.flatnonzero(at >= n)).size:
        at[outside] = through(at[outside])
    return at.astype(np.int64)


def _mix_array(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser of uint64, which wrap around."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MUL1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MUL2)
    return z ^ (z >> np.uint64(31))
