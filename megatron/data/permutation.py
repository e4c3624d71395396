"""A shuffled order without a shuffle: the i-th element of a keyed permutation of 0 … n−1.

An epoch of a trillion-token domain has a billion windows; an array holding their order
would cost gigabytes and minutes.  A Feistel network computes any element of a fixed
pseudo-random bijection in constant time and memory instead.

The network works on Z_a × Z_b with a = ⌈√n⌉ and b = ⌈n/a⌉ (Black & Rogaway, "Ciphers with
Arbitrary Finite Domains", 2002, generalised Feistel): rounds add a keyed hash of one half to
the other, so every round, and with it the whole, is a bijection of a·b elements, fewer than a
of which are n or more; those are walked on along their cycle until they come back below n.
Integers only, so the order is the same on every machine and under every NumPy.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# NumPy scalars once, not at every use: mixing Python integers in would promote to float.
_U1, _U27, _U30, _U31 = (np.uint64(shift) for shift in (1, 27, 30, 31))
_UMIX_1, _UMIX_2 = np.uint64(_MIX_1), np.uint64(_MIX_2)


def hash_key(*parts: str | int) -> int:
    """Return a 64-bit key that depends on every part and on their order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(value: int) -> int:
    """Hash 64 bits to 64 bits (the finaliser of SplitMix64: Steele, Lea & Flood 2014)."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def derive(key: int, counter: int) -> int:
    """Return the ``counter``-th key of the family of ``key``."""
    return mix(key + (counter + 1) * _GOLDEN)


def permute_one(index: int, size: int, key: int) -> int:
    """Return the element at ``index`` of the permutation of ``range(size)`` keyed by ``key``."""
    if not 0 <= index < size:
        raise IndexError(f"index {index} of a permutation of {size}")
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    value = index
    while True:
        row, column = divmod(value, columns)
        for number in range(0, _ROUNDS, 2):
            row = ((mix(column + key + number * _GOLDEN) >> 1) + row) % rows
            column = ((mix(row + key + (number + 1) * _GOLDEN) >> 1) + column) % columns
        value = row * columns + column
        if value < size:
            return value


def permute(
    index: NDArray[np.int64], size: NDArray[np.int64], key: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Do :func:`permute_one` for whole arrays, each element under its own size and key.

    Args:
        index: [n] positions, ``0 <= index < size``.
        size: [n] sizes of the permutations, at most 2⁶².
        key: [n] keys.

    Returns:
        [n] elements.
    """
    if index.size and (int(index.min()) < 0 or bool((index >= size).any())):
        raise IndexError("an index lies outside its permutation")
    rows = _ceil_root(size)
    columns = -(-size // rows)
    value = index.astype(np.int64, copy=True)
    todo = np.arange(value.size)
    while todo.size:
        moved = _network(
            value[todo].astype(np.uint64),
            rows[todo].astype(np.uint64),
            columns[todo].astype(np.uint64),
            key[todo],
        )
        value[todo] = moved
        todo = todo[moved >= size[todo]]
    return value


def _network(
    value: NDArray[np.uint64],
    rows: NDArray[np.uint64],
    columns: NDArray[np.uint64],
    key: NDArray[np.uint64],
) -> NDArray[np.int64]:
    row, column = np.divmod(value, columns)
    for number in range(0, _ROUNDS, 2):
        first = np.uint64(number * _GOLDEN & _MASK)
        second = np.uint64((number + 1) * _GOLDEN & _MASK)
        row = ((mix_array(column + (key + first)) >> _U1) + row) % rows
        column = ((mix_array(row + (key + second)) >> _U1) + column) % columns
    return (row * columns + column).astype(np.int64)


def mix_array(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Do :func:`mix` for a whole array."""
    value = (value ^ (value >> _U30)) * _UMIX_1
    value = (value ^ (value >> _U27)) * _UMIX_2
    mixed: NDArray[np.uint64] = value ^ (value >> _U31)
    return mixed


def _ceil_root(size: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ⌈√size⌉ exactly; the float root is at most one off."""
    root = np.sqrt(size.astype(np.float64)).astype(np.int64)
    root -= root * root > size
    root += (root + 1) * (root + 1) <= size
    ceiling: NDArray[np.int64] = root + (root * root < size)
    return ceiling
