"""Rows on their way to the ranks that hold their experts, and back.

Experts are shared out among neighbouring data ranks, which together are an expert group: rank r
of e holds the experts from r · E / e on.  Rows that are sorted by expert are thus sorted by rank,
and one all-to-all sends them there (Lepikhin et al. 2021, section 3.2), any number to each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.parallel.autograd import apply
from megatron.parallel.topology import Topology


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """Rows at the ranks of their experts.

    Attributes:
        rows: ``[R, hidden]``, sorted by expert.
        counts: rows of each expert that this rank holds.
        order: place in ``rows`` of what arrived, ``[R]``; None where nothing was sent.
        sent: rows that went to each rank of the group.
        received: rows that came from each.
    """

    rows: torch.Tensor
    counts: list[int]
    order: torch.Tensor | None
    sent: list[int]
    received: list[int]


def to_experts(rows: torch.Tensor, counts: torch.Tensor, topology: Topology) -> Arrived:
    """Send rows to the ranks that hold their experts.

    Args:
        rows: ``[R, hidden]``, sorted by expert.
        counts: int64 ``[E]``, rows of each expert.
        topology: whose expert group shares the experts out.

    Returns:
        What arrived here; without an expert group, ``rows`` as they are.
    """
    ranks = topology.expert_size
    if ranks == 1:
        return Arrived(rows=rows, counts=counts.tolist(), order=None, sent=[], received=[])
    table = counts.view(ranks, -1)
    arriving = torch.empty_like(table)  # [source, expert of mine]
    dist.all_to_all_single(arriving, table.contiguous(), group=topology.expert_group)
    sent, received = table.sum(dim=1).tolist(), arriving.sum(dim=1).tolist()
    came: torch.Tensor = apply(_Exchange, rows, sent, received, topology)
    # From each source they come sorted by expert; here they are wanted by expert first.
    expert = torch.arange(table.shape[1], device=rows.device).repeat(ranks)
    expert = expert.repeat_interleave(arriving.flatten(), output_size=sum(received))
    order = expert.argsort(stable=True)
    return Arrived(
        rows=came[order],
        counts=arriving.sum(dim=0).tolist(),
        order=order,
        sent=sent,
        received=received,
    )


def from_experts(result: torch.Tensor, arrived: Arrived, topology: Topology) -> torch.Tensor:
    """Send the experts' results back to where the rows came from.

    Args:
        result: ``[R, hidden]``, one row for each of ``arrived.rows``.
        arrived: what :func:`to_experts` returned.
        topology: the same.

    Returns:
        One row for each row that was given to :func:`to_experts`, in its order.
    """
    if arrived.order is None:
        return result
    back = torch.empty_like(arrived.order)
    back[arrived.order] = torch.arange(len(back), device=back.device)
    returned: torch.Tensor = apply(
        _Exchange, result[back], arrived.received, arrived.sent, topology
    )
    return returned


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], topology: Topology
    ) -> torch.Tensor:
        ctx.way_back = received, sent, topology
        return _exchange(rows, sent, received, topology)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _exchange(gradient, *ctx.way_back), None, None, None


def _exchange(
    rows: torch.Tensor, sent: list[int], received: list[int], topology: Topology
) -> torch.Tensor:
    came = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(came, rows.contiguous(), received, sent, group=topology.expert_group)
    return came
