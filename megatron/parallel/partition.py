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
        padded_from: size of the dimension before it was padded with zeros so that the ranks
            divide it (the vocabulary); None where nothing is padded.  What lies beyond is no
            part of the model: another number of ranks pads to another size.
    """

    dim: int
    blocks: tuple[int, ...]
    padded_from: int | None = None

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

    def pad(self, full: torch.Tensor) -> torch.Tensor:
        """Return the true parameter with the zeros that make its size ``sum(blocks)``."""
        missing = sum(self.blocks) - full.shape[self.dim]
        if missing == 0:
            return full
        shape = list(full.shape)
        shape[self.dim] = missing
        return torch.cat([full, full.new_zeros(shape)], dim=self.dim)

    def unpad(self, full: torch.Tensor) -> torch.Tensor:
        """Return the true parameter (a view) of a padded one."""
        if self.padded_from is None:
            return full
        return full.narrow(self.dim, 0, self.padded_from)

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
