"""Random projection with signs that are computed when they are needed, not stored.

A matrix of +1 and −1 for ten million parameters and 8,192 directions would take 80 GB as bytes.
Here a sign is a bit of a hash (SplitMix64, :mod:`megatron.data.permutation`) of its place and a
key: it is the same in every process, on every device and for every size of block.  Inner products
survive such a projection (Johnson & Lindenstrauss 1984; with signs: Achlioptas 2003).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron.data.permutation import hash_key

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = 64
_BLOCK_SIGNS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Projection:
    """From gradients of all parameters to a few directions.

    Attributes:
        dimension: d, how many directions.
        seed: another one gives other signs.
    """

    dimension: int
    seed: int

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return float32 [n, d], ``rows · R / √d``; ``rows`` are [n, parameters]."""
        count = rows.shape[1]
        block = max(1, _BLOCK_SIGNS // self.dimension)
        total = torch.zeros(rows.shape[0], self.dimension, device=rows.device)
        for first in range(0, count, block):
            last = min(first + block, count)
            total += rows[:, first:last].float() @ self.signs(first, last, rows.device)
        return total / math.sqrt(self.dimension)

    def signs(self, first: int, last: int, device: torch.device) -> torch.Tensor:
        """Return rows [first, last) of R, float32 of +1 and −1.

        The sign in row r and column c is bit c mod 64 of the r·⌈d/64⌉ + c div 64-th word.
        """
        words = -(-self.dimension // _WORD)
        counter = torch.arange(first * words, last * words, dtype=torch.int64, device=device)
        key = hash_key("less-projection", self.seed)
        hashed = _mix(_signed(key) + (counter + 1) * _signed(_GOLDEN))
        packed = hashed.view(torch.uint8)[:, None]
        places = torch.arange(8, dtype=torch.uint8, device=device)
        bits = (packed >> places) & 1
        signs = bits.view(last - first, words * _WORD)[:, : self.dimension].float()
        return signs.mul_(2).sub_(1)


def _mix(value: torch.Tensor) -> torch.Tensor:
    """Hash 64 bits to 64 bits, as :func:`megatron.data.permutation.mix` does; products wrap."""
    value = (value ^ _shifted(value, 30)) * _signed(_MIX_1)
    value = (value ^ _shifted(value, 27)) * _signed(_MIX_2)
    return value ^ _shifted(value, 31)


def _shifted(value: torch.Tensor, by: int) -> torch.Tensor:
    """Shift to the right and fill up with zeros, which torch's own shift of int64 does not."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
