"""Positions that are added to the token's vector: learned, or sines and cosines."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from megatron.model.init import initializer
from megatron.model.relative import sinusoids
from megatron.model.spec import ModelSpec, position_rows
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.sequence import whole_gradients
from megatron.parallel.topology import Topology


class LearnedPositions(nn.Module):
    """One vector per position, the same table on every tensor rank (Radford et al. 2018).

    Attributes:
        weight: ``[max_position_embeddings + opt_pos_emb_offset, hidden]``.
    """

    def __init__(self, scope: ParameterScope, spec: ModelSpec) -> None:
        """Make the table."""
        super().__init__()
        self.topology = scope.topology
        self.offset = spec.opt_pos_emb_offset
        shape = (position_rows(spec), spec.hidden_size)
        self.weight = scope.parameter(
            "weight", shape, initializer(spec.init_method, spec, hidden=False)
        )

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Look up int64 ``[B or 1, S]``: this rank's part of S if the sequence is divided."""
        (weight,) = whole_gradients(self.topology, self.weight)
        return F.embedding(own_part(positions + self.offset, self.topology), weight)


class SinusoidalPositions(nn.Module):
    """Sines and cosines of the position, in float32 until they are added; no parameters."""

    def __init__(self, spec: ModelSpec, topology: Topology) -> None:
        """Make the module; the table grows with what is asked for."""
        super().__init__()
        self.topology = topology
        self.offset, self.width = spec.opt_pos_emb_offset, spec.hidden_size
        self._tables: dict[torch.device, torch.Tensor] = {}

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Look up int64 ``[B or 1, S]``: this rank's part of S if the sequence is divided."""
        wanted = positions + self.offset
        longest = int(wanted.max()) + 1
        table = self._tables.get(positions.device)
        if table is None or table.shape[0] < longest:
            table = sinusoids(longest, self.width).to(positions.device)
            self._tables[positions.device] = table
        return table[own_part(wanted, self.topology)]


def build_positions(scope: ParameterScope, spec: ModelSpec) -> nn.Module | None:
    """Make what is added to the embedding; None where positions come in elsewhere."""
    if spec.pos_emb == "learned":
        return LearnedPositions(scope, spec)
    if spec.pos_emb == "sinusoidal":
        return SinusoidalPositions(spec, scope.topology)
    return None


def own_part(whole: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Return this rank's part of ``[B, S]`` where the sequence is divided, else all of it."""
    if not topology.splits_sequence:
        return whole
    return whole.chunk(topology.tensor_size, dim=1)[topology.tensor_rank]
