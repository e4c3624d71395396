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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop values of ``x`` while training."""
        if not self.training or self.rate == 0.0:
            return x
        split = self.divided or self.rng.topology.splits_sequence
        with self.rng.masks(x.device, self.layer, "hidden", self.place, split=split):
            return F.dropout(x, self.rate)
