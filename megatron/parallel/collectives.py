"""Collectives that autograd understands, among the ranks that share a layer.

Each is the identity when there is one such rank, and costs nothing then.
Forward and backward pairs follow Megatron-LM (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron.parallel.autograd import apply
from megatron.parallel.topology import Topology
from megatron.parallel.traced import traced_gather, traced_sum


def copy_to_tensor_ranks(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Hand a replicated tensor to work that is split: identity forward, sum backward."""
    if topology.tensor_size == 1:
        return tensor
    copied: torch.Tensor = apply(_Copy, tensor, topology)
    return copied


def sum_over_tensor_ranks(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Add the parts that the ranks hold: sum forward, identity backward."""
    if topology.tensor_size == 1:
        return tensor
    total: torch.Tensor = apply(_Sum, tensor, topology)
    return total


def gather_last_dimension(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Concatenate the ranks' last dimensions: gather forward, own slice backward."""
    if topology.tensor_size == 1:
        return tensor
    gathered: torch.Tensor = apply(_Gather, tensor, topology)
    return gathered


def reduce_in_place(
    tensor: torch.Tensor, topology: Topology, operation: Any = dist.ReduceOp.SUM
) -> torch.Tensor:
    """All-reduce ``tensor`` among the tensor ranks, outside autograd; return the result.

    It is written over ``tensor``.  In compiled code, which has sums alone, it is another tensor.
    """
    if topology.tensor_size > 1:
        if torch.compiler.is_compiling():
            return traced_sum(tensor, topology)
        dist.all_reduce(tensor, op=operation, group=topology.tensor_group)
    return tensor


def broadcast_from_last_stage(tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Overwrite ``tensor`` with that of the pipeline's last stage, outside autograd."""
    if topology.pipe_size > 1:
        place = topology.coordinates
        source = topology.layout.rank_at(
            pipe=topology.pipe_size - 1, data=place.data, tensor=place.tensor
        )
        dist.broadcast(tensor, src=source, group=topology.pipe_group)
    return tensor


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
        ctx.topology = topology
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return reduce_in_place(_own(gradient), ctx.topology), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
        return reduce_in_place(_own(tensor), topology)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, topology: Topology) -> torch.Tensor:
        ctx.topology = topology
        if torch.compiler.is_compiling():
            return traced_gather(tensor, topology).movedim(0, -2).flatten(-2)
        parts = [torch.empty_like(tensor) for _ in range(topology.tensor_size)]
        dist.all_gather(parts, tensor.contiguous(), group=topology.tensor_group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        topology: Topology = ctx.topology
        return gradient.chunk(topology.tensor_size, dim=-1)[topology.tensor_rank], None


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy, which may be written over."""
    return tensor.clone(memory_format=torch.contiguous_format)
