"""Rank arithmetic: integers only, so that a laptop can reason about 4,096 ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where a rank stands: its pipeline stage, data-parallel rank and tensor-parallel rank."""

    pipe: int
    data: int
    tensor: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How ``world_size`` ranks are arranged as pipe × data × tensor, tensor varying fastest.

    The order is that of DeepSpeed's ``PipeModelDataParallelTopology``, so a grid of theirs
    and a layout of ours agree about every rank.

    Attributes:
        world_size: number of ranks.
        tensor_size: ranks that share each layer (tensor parallelism).
        pipe_size: pipeline stages.
        expert_size: neighbouring data ranks that share experts out among themselves.

    Raises:
        ConfigError: a size is below 1, tensor × pipe does not divide the world, or the data
            ranks cannot be divided into groups that share experts out.
    """

    world_size: int
    tensor_size: int = 1
    pipe_size: int = 1
    expert_size: int = 1

    def __post_init__(self) -> None:
        """Check that the sizes fit."""
        for field in ("world_size", "tensor_size", "pipe_size", "expert_size"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} is {getattr(self, field)}; it must be at least 1")
        if self.world_size % (self.tensor_size * self.pipe_size):
            raise ConfigError(
                f"{self.world_size} ranks cannot be arranged as model_parallel_size "
                f"{self.tensor_size} × pipe_parallel_size {self.pipe_size} × data parallel: use a "
                f"number of ranks divisible by {self.tensor_size * self.pipe_size}"
            )
        if self.data_size % self.expert_size:
            raise ConfigError(
                f"moe_expert_parallel_size is {self.expert_size}, which does not divide the "
                f"{self.data_size} data-parallel ranks; use a size that does, or another number "
                "of ranks"
            )

    @property
    def data_size(self) -> int:
        """Number of data-parallel ranks."""
        return self.world_size // (self.tensor_size * self.pipe_size)

    def coordinates(self, rank: int) -> Coordinates:
        """Return where global ``rank`` stands."""
        self._check_rank(rank)
        outer, tensor = divmod(rank, self.tensor_size)
        pipe, data = divmod(outer, self.data_size)
        return Coordinates(pipe=pipe, data=data, tensor=tensor)

    def rank_at(self, *, pipe: int, data: int, tensor: int) -> int:
        """Return the global rank that stands at the given coordinates."""
        sizes = {"pipe": self.pipe_size, "data": self.data_size, "tensor": self.tensor_size}
        for axis, value in (("pipe", pipe), ("data", data), ("tensor", tensor)):
            if not 0 <= value < sizes[axis]:
                raise ValueError(f"{axis} coordinate {value} is outside 0…{sizes[axis] - 1}")
        return (pipe * self.data_size + data) * self.tensor_size + tensor

    def tensor_groups(self) -> list[list[int]]:
        """Return every set of ranks that share layers, each in tensor order."""
        size = self.tensor_size
        return [list(range(start, start + size)) for start in range(0, self.world_size, size)]

    def data_groups(self) -> list[list[int]]:
        """Return every set of ranks that hold the same parameters, each in data order."""
        return [
            [self.rank_at(pipe=pipe, data=data, tensor=tensor) for data in range(self.data_size)]
            for pipe in range(self.pipe_size)
            for tensor in range(self.tensor_size)
        ]

    def expert_groups(self) -> list[list[int]]:
        """Return every set of ranks that share experts out, each in data order."""
        size = self.expert_size
        return [
            ranks[start : start + size]
            for ranks in self.data_groups()
            for start in range(0, self.data_size, size)
        ]

    def expert_data_groups(self) -> list[list[int]]:
        """Return every set of ranks that hold the same experts, each in data order."""
        size = self.expert_size
        return [ranks[place::size] for ranks in self.data_groups() for place in range(size)]

    def pipe_groups(self) -> list[list[int]]:
        """Return every pipeline (one rank of each stage), each in stage order."""
        return [
            [self.rank_at(pipe=pipe, data=data, tensor=tensor) for pipe in range(self.pipe_size)]
            for data in range(self.data_size)
            for tensor in range(self.tensor_size)
        ]

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside 0…{self.world_size - 1}")
