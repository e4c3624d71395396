"""What the distance between a query and a key adds to their score: ALiBi, and T5's buckets."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from megatron.errors import ConfigError
from megatron.model.init import xavier_normal
from megatron.model.spec import ModelSpec, head_size
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.partition import Partition
from megatron.parallel.topology import Topology


def alibi_slopes(heads: int) -> list[float]:
    """Return how fast the score of each head falls with distance (Press et al. 2022, section 3).

    A geometric sequence from 2^(−8/n) for n a power of two; other numbers of heads take that of
    the next lower power, and then every second slope of the next higher one.
    """
    lower = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / lower) for head in range(lower)]
    between = [2.0 ** (-4.0 * (head + 1) / lower) for head in range(0, 2 * lower, 2)]
    return slopes + between[: heads - lower]


def own_slopes(spec: ModelSpec, topology: Topology) -> torch.Tensor:
    """Return the ALiBi slopes of this tensor rank's heads, float32."""
    every = torch.tensor(alibi_slopes(spec.num_attention_heads), dtype=torch.float32)
    return every.chunk(topology.tensor_size)[topology.tensor_rank]


def distance_buckets(length: int, *, buckets: int, furthest: int) -> torch.Tensor:
    """Return the bucket of every distance, int64 ``[length]`` (Raffel et al. 2020, section 2.1).

    Half of the buckets hold one distance each, the others grow in a geometric sequence; the last
    takes all from ``furthest`` on.
    """
    exact = buckets // 2
    distance = torch.arange(length)
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(furthest / exact)
    grown = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    return torch.where(distance < exact, distance, grown)


class RelativeBias(nn.Module):
    """A learned bias per head and bucket of distances, one table for all blocks, as in T5.

    The table's entries are multiplied by √head_size, as GPT-NeoX does: they then stand beside
    the product of query and key before its division, where T5 adds them.
    """

    def __init__(self, scope: ParameterScope, spec: ModelSpec) -> None:
        """Make the table, whose heads the tensor ranks divide.

        Raises:
            ConfigError: buckets and distances leave nothing to learn.
        """
        super().__init__()
        self.buckets, self.furthest = spec.rpe_num_buckets, spec.rpe_max_distance
        if self.buckets < 2 or self.furthest <= self.buckets // 2:
            raise ConfigError(
                f"rpe_max_distance {self.furthest} is not above half of rpe_num_buckets "
                f"{self.buckets}, whose first half holds one distance each"
            )
        self.scale = math.sqrt(head_size(spec))
        heads = spec.num_attention_heads
        self.weight = scope.parameter(
            "weight", (self.buckets, heads), xavier_normal(), Partition(dim=1, blocks=(heads,))
        )

    def forward(self, length: int) -> torch.Tensor:
        """Return the bias of this rank's heads at distances 0, 1, …: ``[heads, length]``."""
        bucket = distance_buckets(length, buckets=self.buckets, furthest=self.furthest)
        return self.weight[bucket.to(self.weight.device)].T.contiguous() * self.scale


def sinusoids(length: int, width: int) -> torch.Tensor:
    """Return sinusoidal positions, float32 ``[length, width]`` (Vaswani et al. 2017, section 3.5).

    All sines first, then all cosines, as GPT-NeoX orders them; the paper takes turns.
    """
    frequency = 10_000.0 ** -(np.arange(0, width, 2) / width)
    angle = np.arange(length)[:, None] * frequency
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)[:, :width]
    return torch.from_numpy(table.astype(np.float32))
