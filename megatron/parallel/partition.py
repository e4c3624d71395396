"""Which part of a parameter a tensor-parallel rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Partition:
    """How a parameter is divided among tensor-parallel ranks along one dimension.

    Attributes:
        dim: the dimension that is divided.
        blocks: sizes of the blocks that the dimension is a concatenation of.  Every block is
            divided by itself, so that a rank holds its share of each: ``[q|k|v]`` for
            grouped-query attention, ``[up|gate]`` for a gated MLP.
    """

    dim: int
    blocks: tuple[int, ...]

    def check(self, name: str, ranks: int) -> None:
        """Check that every block can be divided.

        Raises:
            ConfigError: a block's size is not a multiple of ``ranks``.
        """
        for block in self.blocks:
            if block % ranks:
                raise ConfigError(
                    f"parameter {name} has a block of {block} rows that model_parallel_size "
                    f"{ranks} does not divide; choose a size that divides it"
                )

    def part(self, full: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
        """Return the part of ``full`` that ``rank`` of ``ranks`` holds."""
        if ranks == 1:
            return full
        parts = [
            block.narrow(self.dim, rank * (block.shape[self.dim] // ranks), size // ranks)
            for block, size in zip(
                torch.split(full, list(self.blocks), dim=self.dim), self.blocks, strict=True
            )
        ]
        return torch.cat(parts, dim=self.dim)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the full parameter from every rank's part, in rank order."""
        sizes = [block // len(parts) for block in self.blocks]
        split = [torch.split(part, sizes, dim=self.dim) for part in parts]
        blocks = [
            torch.cat([part[index] for part in split], dim=self.dim)
            for index in range(len(self.blocks))
        ]
        return torch.cat(blocks, dim=self.dim)
