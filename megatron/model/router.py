"""Which experts a token goes to, how much each counts, and what keeps them evenly used.

All of it looks at one sequence at a time, never at a micro-batch, so that no result depends on
how a batch is cut.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from megatron.errors import ConfigError
from megatron.model.init import initializer
from megatron.model.spec import ModelSpec
from megatron.parallel.collectives import reduce_in_place
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.rng import DropoutRng
from megatron.parallel.sequence import gather_sequence, whole_gradients
from megatron.parallel.topology import Topology

_SINKHORN_ROUNDS = 3
_LEAST = 1e-8


class Routed(NamedTuple):
    """Where this rank's tokens go.

    Attributes:
        weights: how much each chosen expert counts, ``[B, S, k]`` in the model's format.
        experts: the chosen ones, int64 ``[B, S, k]``.
        balance: the balancing loss, a scalar; of this rank's part of the sequence where it is
            divided (parts add up).  None where nobody trains.
        z: the z-loss, likewise.
    """

    weights: torch.Tensor
    experts: torch.Tensor
    balance: torch.Tensor | None = None
    z: torch.Tensor | None = None


class Router(nn.Module):
    """A linear map to one logit an expert, and the choice of the k experts of a token.

    "topk" takes the largest chances, softmax over all experts (Shazeer et al. 2017 without
    noise).  "sinkhorn" takes the largest in training after the logits have been scaled so that
    all experts are asked for alike (Clark et al. 2022, section 3.2), and plainly the largest
    afterwards, when a token must not depend on those around it; its weights are chances too, or
    with one expert a token the sigmoid of its logit, as in GPT-NeoX.

    Attributes:
        weight: ``[experts, hidden]``, whole on every rank.
    """

    def __init__(
        self, scope: ParameterScope, spec: ModelSpec, *, layer: int, rng: DropoutRng
    ) -> None:
        """Make the router of block ``layer``; ``rng`` draws the noise.

        Raises:
            ConfigError: the kind of router is unknown.
        """
        super().__init__()
        if spec.moe_router_type not in ("sinkhorn", "topk"):
            raise ConfigError(
                f"moe_router_type is '{spec.moe_router_type}'; use 'sinkhorn' or 'topk'"
            )
        self.topology, self.layer, self.rng = scope.topology, layer, rng
        self.experts, self.chosen = spec.moe_num_experts, spec.moe_top_k
        self.sinkhorn = spec.moe_router_type == "sinkhorn"
        self.normalize = spec.moe_normalize_expert_weights
        self.jitter = spec.moe_jitter_eps
        self.wide_balance = spec.moe_lbl_in_fp32
        self.weight = scope.parameter(
            "weight", (self.experts, spec.hidden_size), initializer(spec.init_method, spec)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Choose the experts of ``x`` ``[B, S, hidden]``, or this rank's part of the sequence.

        Returns:
            The parts of :class:`Routed`; hooks of ZeRO 3 see into a plain tuple alone.
        """
        if self.training and self.jitter:
            x = x * self._noise(x, self.jitter)
        (weight,) = whole_gradients(self.topology, self.weight)
        logits = F.linear(x, weight).float()
        chances = logits.softmax(dim=-1)
        counted = torch.sigmoid(logits) if self.sinkhorn and self.chosen == 1 else chances
        if self.sinkhorn and self.training:
            preferred = self._own(balanced(gather_sequence(logits.detach(), self.topology)))
        else:
            preferred = counted.detach()
        experts = preferred.topk(self.chosen, dim=-1).indices
        weights = counted.gather(-1, experts)
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        weights = weights.to(x.dtype)
        if not self.training:
            return weights, experts
        length = x.shape[1] * (self.topology.tensor_size if self.topology.splits_sequence else 1)
        chances = chances if self.wide_balance else chances.to(x.dtype)
        balance = balance_loss(chances, experts, length, self.topology)
        z = logits.logsumexp(dim=-1).square().sum() / (x.shape[0] * length)
        return weights, experts, balance, z

    def _noise(self, x: torch.Tensor, width: float) -> torch.Tensor:
        """Return factors within ``width`` of 1, the same for a token on every layout."""
        ranks = self.topology.tensor_size if self.topology.splits_sequence else 1
        shape = (x.shape[1] * ranks, x.shape[2])
        drawn = self.rng.by_slot(x.device, x.shape[0], shape, self.layer, "router")
        return self._own(1.0 + width * (2.0 * drawn - 1.0)).to(x.dtype)

    def _own(self, whole: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of ``[B, S, …]``."""
        if not self.topology.splits_sequence:
            return whole
        return whole.chunk(self.topology.tensor_size, dim=1)[self.topology.tensor_rank]


def balanced(logits: torch.Tensor) -> torch.Tensor:
    """Scale exp(logits) so that in each sequence all tokens and all experts weigh alike.

    Three rounds of Sinkhorn and Knopp's iteration, in the order of GPT-NeoX.

    Args:
        logits: float32 ``[B, S, E]``.

    Returns:
        float64 ``[B, S, E]``.
    """
    # A factor of the whole sequence changes nothing that follows, and float64 has room for rows
    # far below it.
    wide = logits.double()
    cost = torch.exp(wide - wide.amax(dim=(1, 2), keepdim=True))
    tokens, experts = cost.shape[1:]
    columns = 1.0 / (experts * cost.sum(dim=1, keepdim=True))
    rows = torch.ones_like(cost[..., :1])
    for _ in range(_SINKHORN_ROUNDS):
        rows = 1.0 / (tokens * ((columns * cost).sum(dim=2, keepdim=True) + _LEAST))
        columns = 1.0 / (experts * ((rows * cost).sum(dim=1, keepdim=True) + _LEAST))
    return columns * cost * rows


def balance_loss(
    chances: torch.Tensor, experts: torch.Tensor, length: int, topology: Topology
) -> torch.Tensor:
    """Return E · Σ f_i P_i, the mean over sequences (Fedus et al. 2022, equations 4 to 6).

    f_i is the share of a sequence's choices that fell on expert i and P_i the mean of its
    chances; 1 where all are used alike, E where one is used alone.

    Args:
        chances: ``[B, S, E]``, or this rank's part of the sequence.
        experts: the chosen ones, int64 ``[B, S, k]``.
        length: of the whole sequence.
        topology: whose tensor ranks may divide the sequence.

    Returns:
        A scalar; where the sequence is divided, this rank's term of the sum.
    """
    number = chances.shape[-1]
    hit = experts[..., None] == torch.arange(number, device=experts.device)
    share = hit.sum(dim=(1, 2)).float()
    if topology.splits_sequence:
        share = reduce_in_place(share, topology)
    share = share / (length * experts.shape[-1])
    mean = chances.sum(dim=1) / length
    return number * (share.to(chances.dtype) * mean).sum(dim=-1).mean()
