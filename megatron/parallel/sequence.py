"""Sequence parallelism: between shared layers each tensor rank holds a part of the sequence.

Norms, dropout and residual sums work on ``[B, S / tensor_size, H]`` instead of doing the same
work on every tensor rank (Korthikanti et al. 2022, section 4.2.2): the sum that ends a shared
region is a reduce-scatter, the copy that begins one an all-gather, and their gradients are
each other.  What is sent is what the all-reduces sent that they replace.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron.parallel.autograd import apply
from megatron.parallel.collectives import (
    copy_to_tensor_ranks,
    reduce_in_place,
    sum_over_tensor_ranks,
)
from megatron.parallel.products import input_gradient, linear, weight_gradient
from megatron.parallel.topology import Topology
from megatron.parallel.traced import traced_gather, traced_scatter

# torch 2.13 renamed them; both names work on gloo and on NCCL.
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def enter_shared(x: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Hand ``x`` to work that the tensor ranks share out among themselves.

    Args:
        x: ``[B, S / tensor_size, …]`` if the sequence is divided; otherwise ``[B, S, …]``, the
            same on every tensor rank.
        topology: the ranks.

    Returns:
        ``[B, S, …]``; each rank's gradient of it is added up on the way back.
    """
    if not topology.splits_sequence:
        return copy_to_tensor_ranks(x, topology)
    whole: torch.Tensor = apply(_GatherSequence, x, topology)
    return whole


def leave_shared(partial: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Add up what the tensor ranks' shares of a piece of work came to.

    Args:
        partial: ``[B, S, …]``, one term of the sum.
        topology: the ranks.

    Returns:
        The sum: this rank's part of the sequence if it is divided, else all of it.

    Raises:
        ValueError: the sequence is to be divided and its length does not divide.
    """
    if not topology.splits_sequence:
        return sum_over_tensor_ranks(partial, topology)
    own: torch.Tensor = apply(_ScatterSequence, partial, topology)
    return own


def gather_sequence(part: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Return all of the sequence of what no gradient flows through, ``[B, S, …]``."""
    return _Gather(part, topology).wait() if topology.splits_sequence else part


def shared_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, topology: Topology
) -> torch.Tensor:
    """Return ``enter_shared(x) weightᵀ + bias``.

    Where the sequence is divided only this rank's part of ``x`` is kept for backward, and
    gathered a second time there.
    """
    if not topology.splits_sequence:
        return linear(copy_to_tensor_ranks(x, topology), weight, bias)
    y: torch.Tensor = apply(_GatheredLinear, x, weight, bias, topology)
    return y


def whole_gradients(topology: Topology, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return parameters that every tensor rank holds, to be used on its part of the sequence.

    Each rank's gradient covers its own tokens only; the sum over the ranks is taken as it
    flows back, once for every use, so whatever accumulates or divides gradients later finds
    the same on all of them.
    """
    if not topology.splits_sequence or not torch.is_grad_enabled():
        return parameters
    used: tuple[torch.Tensor, ...] = apply(_WholeGradients, topology, *parameters)
    return used


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, topology: Topology) -> torch.Tensor:
        ctx.topology = topology
        return _Gather(part, topology).wait()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Scatter(gradient, ctx.topology).wait(), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, topology: Topology) -> torch.Tensor:
        ctx.topology = topology
        return _Scatter(partial, topology).wait()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Gather(gradient, ctx.topology).wait(), None


class _GatheredLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        part: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        topology: Topology,
    ) -> torch.Tensor:
        ctx.topology = topology
        ctx.save_for_backward(part, weight)
        return linear(_Gather(part, topology).wait(), weight, bias)

    @staticmethod
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        part, weight = ctx.saved_tensors
        part_needed, weight_needed, bias_needed, _ = ctx.needs_input_grad
        # Each exchange runs beside the matrix product that does not wait for it.
        gathering = _Gather(part, ctx.topology) if weight_needed else None
        scattering = (
            _Scatter(input_gradient(gradient, weight), ctx.topology) if part_needed else None
        )
        rows = gradient.flatten(0, 1)
        by_weight = (
            None if gathering is None else weight_gradient(rows, gathering.wait().flatten(0, 1))
        )
        by_bias = rows.sum(dim=0) if bias_needed else None
        return None if scattering is None else scattering.wait(), by_weight, by_bias, None


class _WholeGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, topology: Topology, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.topology = topology
        # Copies: a view would hold on to the buffer that ZeRO-3 gathers parameters in.
        return tuple(parameter.clone() for parameter in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        sizes = [gradient.numel() for gradient in gradients]
        parts = torch.split(reduce_in_place(flat, ctx.topology), sizes)
        return None, *(
            part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)
        )


class _Gather:
    """An all-gather of ``[B, S / ranks, …]`` along the sequence, under way."""

    def __init__(self, part: torch.Tensor, topology: Topology) -> None:
        self._work: Any = None
        if torch.compiler.is_compiling():
            self._whole = traced_gather(part, topology)
            return
        self._part = part.contiguous()
        self._whole = part.new_empty(topology.tensor_size, *part.shape)
        self._work = _ALL_GATHER(
            self._whole.flatten(0, 1), self._part, group=topology.tensor_group, async_op=True
        )

    def wait(self) -> torch.Tensor:
        """Return ``[B, S, …]``."""
        if self._work is not None:
            self._work.wait()
        return self._whole.transpose(0, 1).flatten(1, 2)


class _Scatter:
    """A reduce-scatter of ``[B, S, …]`` along the sequence, under way."""

    def __init__(self, whole: torch.Tensor, topology: Topology) -> None:
        ranks, (batch, length, *rest) = topology.tensor_size, whole.shape
        if length % ranks:
            raise ValueError(
                f"a sequence of {length} tokens cannot be divided among {ranks} tensor ranks "
                "(sequence_parallel); pad it to a multiple"
            )
        self._whole = (
            whole.reshape(batch, ranks, length // ranks, *rest).transpose(0, 1).contiguous()
        )
        self._work: Any = None
        if torch.compiler.is_compiling():
            self._own = traced_scatter(self._whole, topology)
            return
        self._own = whole.new_empty(self._whole.shape[1:])
        self._work = _REDUCE_SCATTER(
            self._own, self._whole.flatten(0, 1), group=topology.tensor_group, async_op=True
        )

    def wait(self) -> torch.Tensor:
        """Return this rank's part of the sum, ``[B, S / ranks, …]``."""
        if self._work is not None:
            self._work.wait()
        return self._own
