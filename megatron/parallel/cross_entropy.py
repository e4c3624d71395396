"""Next-token cross-entropy straight from hidden states, without ever holding whole logits.

Logits ``[tokens, vocabulary]`` are by far the largest tensor of a small model's step.  Here
they exist for one chunk of tokens at a time.  A weighted sum of losses has a gradient that
is known as soon as a chunk's logits are (softmax minus one-hot, times the token's weight),
so it is taken on the spot, while they are there: three matrix products a chunk, as in plain
autograd, where recomputing the logits in backward would take four.  Backward then only
scales what forward left, and needs no weight: ZeRO-3 gathers it once, not twice.

With the vocabulary divided among tensor ranks (Shoeybi et al. 2019, section 3) each rank
works on its own columns and three numbers per token are exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron.parallel.autograd import apply
from megatron.parallel.collectives import copy_to_tensor_ranks, reduce_in_place
from megatron.parallel.topology import Topology


def token_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    topology: Topology,
    chunk_tokens: int,
) -> torch.Tensor:
    """Return every token's loss, for evaluation; nothing flows back.

    Args:
        hidden: ``[N, H]``.
        weight: this rank's rows of the output weight, ``[V / tensor_size, H]``.
        targets: int64 ``[N]``, in the whole vocabulary.
        topology: whose tensor ranks divide the vocabulary.
        chunk_tokens: how many tokens' logits exist at a time.

    Returns:
        float32 ``[N]``, in nats.
    """
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        for rows in _chunks(targets.numel(), chunk_tokens):
            logits = hidden[rows] @ weight.T
            losses[rows] = _log_softmax(logits, targets[rows], topology)[1]
    return losses


def weighted_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    topology: Topology,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Σ token_weight · loss, which gradients flow from, and every token's loss.

    Args:
        hidden: ``[N, H]``; gradients flow to it.
        weight: this rank's rows of the output weight, ``[V / tensor_size, H]``; likewise.
        targets: int64 ``[N]``, in the whole vocabulary.
        token_weights: float32 ``[N]``, constants, ≥ 0.
        topology: whose tensor ranks divide the vocabulary.
        chunk_tokens: how many tokens' logits exist at a time.

    Returns:
        The sum (float32 scalar) and the losses (float32 ``[N]``, in nats, detached).
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        losses = token_cross_entropy(
            hidden, weight, targets, topology=topology, chunk_tokens=chunk_tokens
        )
        return torch.dot(losses, token_weights), losses
    hidden = copy_to_tensor_ranks(hidden, topology)
    total, losses = apply(
        _WeightedCrossEntropy, hidden, weight, targets, token_weights, topology, chunk_tokens
    )
    return total, losses


class _WeightedCrossEntropy(torch.autograd.Function):
    """The sum of weighted losses, with its gradients taken in forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        token_weights: torch.Tensor,
        topology: Topology,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Weights are tiny (one over the tokens of a global batch).  Gradients are taken for
        # weights scaled to at most 1, so that half precision does not lose them here, and
        # the scale is put back in backward, together with a loss scaler's.
        scale = token_weights.max().clamp(min=torch.finfo(torch.float32).tiny)
        relative = token_weights / scale
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        accumulated = _WeightGradient(weight) if ctx.needs_input_grad[1] else None
        for rows in _chunks(targets.numel(), chunk_tokens):
            gradient, losses[rows] = _logits_gradient(
                hidden[rows], weight, targets[rows], relative[rows], topology
            )
            if hidden_gradient is not None:
                torch.mm(gradient, weight, out=hidden_gradient[rows])
            if accumulated is not None:
                accumulated.add(gradient, hidden[rows])
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(
            hidden_gradient, None if accumulated is None else accumulated.total, scale
        )
        ctx.mark_non_differentiable(losses)
        return torch.dot(losses, token_weights), losses

    @staticmethod
    def backward(
        ctx: Any, total_gradient: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None]:
        hidden_gradient, weight_gradient, scale = ctx.saved_tensors
        factor = total_gradient.float() * scale
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * factor
        if weight_gradient is not None:
            scaled = torch.empty_like(weight_gradient, dtype=ctx.weight_dtype)
            weight_gradient = torch.mul(weight_gradient, factor, out=scaled)
        return hidden_gradient, weight_gradient, None, None, None, None


class _WeightGradient:
    """Sum of the chunks' weight gradients, in float32 whatever the weight's own type."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._shape, self._device = weight.shape, weight.device
        self._total: torch.Tensor | None = None

    def add(self, logits_gradient: torch.Tensor, hidden: torch.Tensor) -> None:
        if self._total is None:
            self._total = torch.mm(logits_gradient.T, hidden).float()
        elif hidden.dtype == torch.float32:
            self._total.addmm_(logits_gradient.T, hidden)
        else:
            self._total.add_(torch.mm(logits_gradient.T, hidden))

    @property
    def total(self) -> torch.Tensor:
        if self._total is None:
            return torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        return self._total


def _logits_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    topology: Topology,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one chunk's gradient of the logits (type of ``hidden``) and its losses (float32)."""
    logits = hidden @ weight.T
    log_probabilities, losses = _log_softmax(logits, targets, topology)
    gradient = log_probabilities.exp_()
    columns, present = _local_columns(targets, gradient.shape[1], topology)
    at_target = gradient.gather(1, columns)
    gradient.scatter_(1, columns, torch.where(present, at_target - 1, at_target))
    if logits.dtype == torch.float32:
        return gradient.mul_(token_weights[:, None]), losses
    return torch.mul(gradient, token_weights[:, None], out=logits), losses


def _log_softmax(
    logits: torch.Tensor, targets: torch.Tensor, topology: Topology
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's log-probabilities (float32 ``[N, V/t]``) and the losses ``[N]``."""
    if topology.tensor_size == 1:
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        return log_probabilities, -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    shifted = logits.float()
    largest = reduce_in_place(shifted.amax(dim=-1, keepdim=True), topology, dist.ReduceOp.MAX)
    shifted = shifted - largest
    total = reduce_in_place(shifted.exp().sum(dim=-1, keepdim=True), topology)
    log_probabilities = shifted.sub_(total.log())
    columns, present = _local_columns(targets, shifted.shape[1], topology)
    losses = torch.where(present, -log_probabilities.gather(1, columns), 0.0)
    return log_probabilities, reduce_in_place(losses, topology).squeeze(1)


def _local_columns(
    targets: torch.Tensor, columns: int, topology: Topology
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each target's column on this rank (0 if elsewhere) and whether it is here."""
    local = targets[:, None] - topology.tensor_rank * columns
    present = (local >= 0) & (local < columns)
    return local.masked_fill(~present, 0), present


def _chunks(total: int, size: int) -> Iterator[slice]:
    """Cut ``total`` tokens into even chunks of at most ``size``."""
    count = max(1, -(-total // size))
    step = max(1, -(-total // count))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
