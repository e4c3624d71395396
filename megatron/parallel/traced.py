"""Collectives as a compiler sees them: operations of a graph, with a result of their own.

The eager ones write in place and hand out handles to wait on, which a graph has no room for.
These are torch's functional collectives, by the names that it has kept; autograd is the callers'.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.parallel.topology import Topology


def traced_sum(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Return the sum over the tensor ranks."""
    reduced = _operations().all_reduce(tensor.contiguous(), "sum", _group(topology))
    return _waited(reduced)


def traced_gather(part: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Return the tensor ranks' parts along a new first dimension."""
    whole = _operations().all_gather_into_tensor(
        part.contiguous(), topology.tensor_size, _group(topology)
    )
    return _waited(whole).view(topology.tensor_size, *part.shape)


def traced_scatter(parts: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Return this rank's entry of the sum over the tensor ranks; the first dimension is theirs."""
    own = _operations().reduce_scatter_tensor(
        parts.contiguous().flatten(0, 1), "sum", topology.tensor_size, _group(topology)
    )
    return _waited(own).view(parts.shape[1:])


def _operations() -> Any:
    return torch.ops._c10d_functional


def _waited(tensor: torch.Tensor) -> torch.Tensor:
    done: torch.Tensor = _operations().wait_tensor(tensor)
    return done


def _group(topology: Topology) -> str:
    assert topology.tensor_group_name is not None
    return topology.tensor_group_name
