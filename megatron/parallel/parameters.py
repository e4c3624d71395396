"""Parameters whose initial values depend on the seed and their global name alone.

A value is drawn on the parameter's full shape and then cut to the rank's part, so the same
model starts from the same weights in every layout, with or without a pipeline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from megatron.parallel.partition import Partition
from megatron.parallel.rng import generator
from megatron.parallel.topology import Topology

Initializer = Callable[[tuple[int, ...], np.random.Generator], torch.Tensor]
"""Draws a full parameter, float32 on the CPU, from its shape and a generator of its own."""


@dataclass(frozen=True, kw_only=True)
class ParameterScope:
    """A place in the tree of parameter names, which makes the parameters that live there.

    Attributes:
        seed: the run's seed.
        topology: decides which part of a divided parameter this rank holds.
        name: global name of this place ("3.attention.dense"); empty at the root.
        dtype: type of the parameters made.
        device: where they are made; on "meta" nothing is drawn.
    """

    seed: int
    topology: Topology
    name: str = ""
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def child(self, name: str) -> ParameterScope:
        """Return the scope of the sub-module called ``name``."""
        return dataclasses.replace(self, name=self._join(name))

    def parameter(
        self,
        name: str,
        shape: Sequence[int],
        initializer: Initializer,
        partition: Partition | None = None,
    ) -> nn.Parameter:
        """Make the parameter ``name`` of this place.

        Args:
            name: local name ("weight").
            shape: full shape, before any division or padding.
            initializer: draws the full value.
            partition: how the tensor ranks divide it; None if each holds all of it.

        Returns:
            This rank's part, with ``partition`` as an attribute.

        Raises:
            ConfigError: the partition does not go into the number of tensor ranks.
        """
        full_name, full_shape = self._join(name), tuple(shape)
        ranks = self.topology.tensor_size
        if partition is not None:
            partition.check(full_name, ranks)
        if self.device == "meta":
            value = torch.empty(full_shape, dtype=self.dtype, device="meta")
        else:
            value = initializer(full_shape, generator(self.seed, "parameter", full_name))
        if partition is not None:
            value = partition.part(partition.pad(value), self.topology.tensor_rank, ranks)
        parameter = nn.Parameter(value.to(dtype=self.dtype, device=self.device).contiguous())
        # Read by whatever joins or re-divides checkpoints.
        setattr(parameter, "partition", partition)  # noqa: B010
        if partition is not None and ranks > 1:
            # DeepSpeed's norms count a parameter without this mark on tensor rank 0 only.
            setattr(parameter, "tensor_model_parallel", True)  # noqa: B010
        return parameter

    def _join(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name


def zeros(shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
    """Start at zero (biases)."""
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
    """Start at one (norm scales)."""
    return torch.ones(shape)
