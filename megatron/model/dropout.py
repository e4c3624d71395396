"""Dropout of the residual stream with masks that can be drawn again."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from megatron.parallel.rng import DropoutRng


class Dropout(nn.Module):
    """Dropout of values that every tensor rank holds alike, so that all drop the same.

    Where the sequence is divided, ranks hold different tokens and draw masks of their own.
    """

    def __init__(
        self, *, rate: float, layer: int, place: str, rng: DropoutRng, divided: bool = False
    ) -> None:
        """Make the dropout at ``place`` ("attention", "mlp") of layer ``layer``.

        ``divided``: tensor ranks hold different values here even with the sequence whole.
        """
        super().__init__()
        self.rate = rate
        self.layer = layer
        self.place = place
        self.rng = rng
        self.divided = divided
        self._seed: torch.Tensor | None = None

    def prepare(self, device: torch.device) -> None:
        """Take up this micro-batch's seed, for a compiled pass: it can draw, but not look names up.

        Its masks are others than those of a pass that is not compiled.
        """
        # Filled, not copied from the host: nothing waits for the device.
        self._seed = torch.full((), self._seed_of_now(), dtype=torch.int64, device=device)

    def _seed_of_now(self) -> int:
        return self.rng.seed(self.layer, "hidden", self.place, split=self._split)

    @property
    def _split(self) -> bool:
        return self.divided or self.rng.topology.splits_sequence

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop values of ``x`` while training."""
        if not self.training or self.rate == 0.0:
            return x
        if torch.compiler.is_compiling():
            assert self._seed is not None
            return hashed_dropout(x, self.rate, self._seed)
        with self.rng.masks(x.device, self.layer, "hidden", self.place, split=self._split):
            return F.dropout(x, self.rate)


def hashed_dropout(x: torch.Tensor, rate: float, seed: torch.Tensor) -> torch.Tensor:
    """Drop values of ``x`` by a hash of their places: arithmetic alone, which a compiler fuses.

    Number i of a stream is SplitMix64's, mix((seed + i) γ) (Steele et al. 2014, figure 17), in
    int64, which wraps around.

    Args:
        x: of any shape.
        rate: share of it that is dropped, from 0 to 1.
        seed: int64 scalar on the device of ``x``.
    """
    if rate >= 1.0:
        return x * 0.0
    place = torch.arange(x.numel(), device=x.device).view(x.shape)
    # Added first: the compiler would multiply places by itself, in numbers that do not wrap.
    z = (seed + place) * _GAMMA
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    z = z ^ _shifted(z, 31)
    kept = z >= int(rate * 2.0**64) - 2**63
    return torch.where(kept, x * (1.0 / (1.0 - rate)), 0.0)


# As signed numbers of 64 bits.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift to the right with zeros coming in, as of an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
