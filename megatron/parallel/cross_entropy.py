"""Next-token cross-entropy straight from hidden states, without ever holding whole logits.

Logits ``[tokens, vocabulary]`` are by far the largest tensor of a small model's step.  Here
they exist for one chunk of tokens at a time.  A weighted sum of losses has a gradient that
is known as soon as a chunk's logits are (softmax minus one-hot, times the token's weight),
so it is taken on the spot, while they are there: three matrix products a chunk, as in plain
autograd, where recomputing the logits in backward would take four.  Backward then only
scales what forward left, and needs no weight: ZeRO-3 gathers it once, not twice.

With the vocabulary divided among tensor ranks (Shoeybi et al. 2019, section 3) each rank
works on its own columns and three numbers per token are exchanged.  Columns that pad the
vocabulary so that the ranks divide it get probability 0 and gradient 0: the loss does not
depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron.parallel.autograd import apply
from megatron.parallel.collectives import reduce_in_place
from megatron.parallel.products import input_gradient, linear_into, weight_gradient
from megatron.parallel.scratch import Scratch
from megatron.parallel.topology import Topology

# Elements of a chunk that softmax takes at a time.  On a CPU such a block stays in the cache
# through all its passes (2× faster in fp32, 5× in bf16 at V = 50k); a GPU wants few launches.
_CPU_BLOCK = 1 << 19
_DEVICE_BLOCK = 1 << 26


def token_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    topology: Topology,
    chunk_tokens: int,
    half: bool = False,
) -> torch.Tensor:
    """Return every token's loss, for evaluation; nothing flows back.

    Args:
        hidden: ``[N, H]``, the same on every tensor rank.
        weight: this rank's rows of the output weight, ``[V / tensor_size, H]``.
        targets: int64 ``[N]``, below ``vocab_size``.
        vocab_size: number of token ids, V before it was padded.
        topology: whose tensor ranks divide the vocabulary.
        chunk_tokens: how many tokens' logits exist at a time.
        half: take the softmax in the logits' own type instead of float32.

    Returns:
        float32 ``[N]``, in nats.
    """
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        rows_at_once = min(chunk_tokens, targets.numel())
        softmax = _Softmax(weight, vocab_size, topology, rows_at_once, half=half)
        for rows in _chunks(targets.numel(), chunk_tokens):
            softmax.losses(hidden[rows], targets[rows], losses[rows])
    return losses


def weighted_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    vocab_size: int,
    topology: Topology,
    chunk_tokens: int,
    half: bool = False,
    z_loss: float = 0.0,
    scratch: Scratch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Σ token_weight · loss, which gradients flow from, and every token's loss.

    Args:
        hidden: ``[N, H]``, the same on every tensor rank, as
            :func:`megatron.parallel.sequence.enter_shared` returned it: each rank's gradient
            is the share of its own part of the vocabulary.
        weight: this rank's rows of the output weight, ``[V / tensor_size, H]``; likewise.
        targets: int64 ``[N]``, below ``vocab_size``.
        token_weights: float32 ``[N]``, constants, ≥ 0.
        vocab_size: number of token ids, V before it was padded.
        topology: whose tensor ranks divide the vocabulary.
        chunk_tokens: how many tokens' logits exist at a time.
        half: take the softmax in the logits' own type instead of float32.
        z_loss: factor of (log Σ exp(logits))², which is added to each loss in the sum wherever
            gradients flow; the losses themselves are without it.
        scratch: memory for logits; None takes some anew.

    Returns:
        The sum (float32 scalar) and the losses (float32 ``[N]``, in nats, detached).
    """
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        losses = token_cross_entropy(
            hidden,
            weight,
            targets,
            vocab_size=vocab_size,
            topology=topology,
            chunk_tokens=chunk_tokens,
            half=half,
        )
        return torch.dot(losses, token_weights), losses
    total, losses = apply(
        _WeightedCrossEntropy,
        hidden,
        weight,
        targets,
        token_weights,
        vocab_size,
        topology,
        chunk_tokens,
        half,
        z_loss,
        scratch,
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
        vocab_size: int,
        topology: Topology,
        chunk_tokens: int,
        half: bool,
        z_loss: float,
        scratch: Scratch | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Weights are tiny (one over the tokens of a global batch).  Gradients are taken for
        # weights scaled to at most 1, so that half precision does not lose them here, and
        # the scale is put back in backward, together with a loss scaler's.
        scale = token_weights.max().clamp(min=torch.finfo(torch.float32).tiny)
        relative = token_weights / scale
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        accumulated = _WeightGradient(weight) if ctx.needs_input_grad[1] else None
        rows_at_once = min(chunk_tokens, targets.numel())
        softmax = _Softmax(
            weight, vocab_size, topology, rows_at_once, half=half, z_loss=z_loss, scratch=scratch
        )
        for rows in _chunks(targets.numel(), chunk_tokens):
            gradient = softmax.gradient(hidden[rows], targets[rows], relative[rows], losses[rows])
            if hidden_gradient is not None:
                hidden_gradient[rows] = input_gradient(gradient, weight)
            if accumulated is not None:
                accumulated.add(gradient, hidden[rows])
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(
            hidden_gradient, None if accumulated is None else accumulated.total, scale
        )
        ctx.mark_non_differentiable(losses)
        total = torch.dot(losses, token_weights)
        return total if softmax.z_sum is None else total + softmax.z_sum * scale, losses

    @staticmethod
    def backward(
        ctx: Any, total_gradient: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, weight_gradient, scale = ctx.saved_tensors
        factor = total_gradient.float() * scale
        if hidden_gradient is not None:
            hidden_gradient = hidden_gradient * factor
        if weight_gradient is not None:
            scaled = torch.empty_like(weight_gradient, dtype=ctx.weight_dtype)
            weight_gradient = torch.mul(weight_gradient, factor, out=scaled)
        return hidden_gradient, weight_gradient, *(None,) * 8


class _WeightGradient:
    """Sum of the chunks' weight gradients, in float32 if there are several chunks."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight
        self._total: torch.Tensor | None = None

    def add(self, logits_gradient: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add one chunk's ``[n, V]ᵀ [n, H]``."""
        if self._total is None:
            self._total = weight_gradient(logits_gradient, hidden)
        elif hidden.dtype == torch.float32:
            self._total.addmm_(logits_gradient.T, hidden)
        else:
            self._total = self._total.float().add_(torch.mm(logits_gradient.T, hidden))

    @property
    def total(self) -> torch.Tensor:
        """The sum so far."""
        return torch.zeros_like(self._weight) if self._total is None else self._total


class _Softmax:
    """Softmax of one chunk's logits at a time, in buffers that all chunks share."""

    def __init__(
        self,
        weight: torch.Tensor,
        vocab_size: int,
        topology: Topology,
        chunk_tokens: int,
        *,
        half: bool = False,
        z_loss: float = 0.0,
        scratch: Scratch | None = None,
    ) -> None:
        columns = weight.shape[0]
        # The first column that is padding; 0 where this rank holds nothing else.
        self._valid = min(max(vocab_size - topology.tensor_rank * columns, 0), columns)
        self._vocab_size = vocab_size
        self._weight = weight
        self._topology = topology
        self._logits = (scratch or Scratch()).take(weight, chunk_tokens, columns)
        elements = _CPU_BLOCK if weight.device.type == "cpu" else _DEVICE_BLOCK
        # Tensor ranks talk once a block: they take a chunk as one.
        whole = topology.tensor_size > 1
        self._block_rows = chunk_tokens if whole else min(chunk_tokens, elements // columns + 1)
        self._widened = (
            None
            if half or weight.dtype == torch.float32
            else weight.new_empty(self._block_rows, columns, dtype=torch.float32)
        )
        self._z_loss = z_loss
        # Σ token_weight · z-loss of the chunks so far.
        self.z_sum = torch.zeros((), device=weight.device) if z_loss > 0 else None

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        """Write the losses of a chunk (``hidden`` ``[n, H]``) into ``losses`` (``[n]``)."""
        logits = linear_into(self._logits[: len(hidden)], hidden, self._weight)
        for rows in self._blocks(len(hidden)):
            self._exponentials(logits[rows], targets[rows], losses[rows])

    def gradient(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        token_weights: torch.Tensor,
        losses: torch.Tensor,
    ) -> torch.Tensor:
        """Write a chunk's losses; return Σ token_weight · loss's gradient by its logits.

        The result, ``[n, V / tensor_size]`` in the weight's type, is good until the next chunk.
        """
        logits = linear_into(self._logits[: len(hidden)], hidden, self._weight)
        for rows in self._blocks(len(hidden)):
            own = token_weights[rows, None]
            exponentials, total, columns, present, largest = self._exponentials(
                logits[rows], targets[rows], losses[rows]
            )
            factor = own / total
            if self.z_sum is not None:
                # d z² by a logit is 2 z times its probability, with z the log of the sum.
                z = total.float().log() + largest.float()
                self.z_sum += self._z_loss * (own * z * z).sum()
                factor = factor * (1.0 + 2.0 * self._z_loss * z)
            present = own if present is None else torch.where(present, own, 0.0)
            at_target = exponentials.gather(1, columns) * factor - present
            gradient = torch.mul(exponentials, factor, out=logits[rows])
            gradient.scatter_(1, columns, at_target.to(gradient.dtype))
        return logits

    def _exponentials(
        self, logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Write the losses of a block and return what its softmax is made of.

        Returns:
            e^(logit − largest), 0 for padding, in float32 (over the logits themselves if they
            are), its sum over the vocabulary ``[n, 1]``, each target's column on this rank (0
            if it is elsewhere) ``[n, 1]``, whether it is here ``[n, 1]`` (None: all are), and the
            largest logit ``[n, 1]``.
        """
        widened = logits if self._widened is None else self._widened[: len(logits)].copy_(logits)
        if self._valid < widened.shape[1]:
            widened[:, self._valid :] = -torch.inf
        largest = widened.amax(dim=-1, keepdim=True)
        reduce_in_place(largest, self._topology, dist.ReduceOp.MAX)
        shifted = widened.sub_(largest)
        columns, present = self._columns(targets[:, None], logits.shape[1])
        if present is None:
            # Padding is left out, so that an id outside the vocabulary is an error and no loss.
            at_target = shifted[:, : self._valid].gather(1, columns)
        else:
            at_target = torch.where(present, shifted.gather(1, columns), 0.0)
            # No rank would have it, and the loss would look like one: make it infinite.
            outside = (targets < 0) | (targets >= self._vocab_size)
            at_target.masked_fill_(outside[:, None], -torch.inf)
        exponentials = shifted.exp_()
        total = exponentials.sum(dim=-1, keepdim=True)
        if self._topology.tensor_size > 1:
            both = reduce_in_place(torch.cat([total, at_target], dim=1), self._topology)
            total, at_target = both[:, :1], both[:, 1:]
        losses.copy_((total.log() - at_target).squeeze(1))
        return exponentials, total, columns, present, largest

    def _columns(
        self, targets: torch.Tensor, held: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return targets' columns among the ``held`` ones of this rank, and which are here."""
        if self._topology.tensor_size == 1:
            return targets, None
        local = targets - self._topology.tensor_rank * held
        present = (local >= 0) & (local < held)
        return local.masked_fill(~present, 0), present

    def _blocks(self, rows: int) -> Iterator[slice]:
        return _chunks(rows, self._block_rows)


def _chunks(total: int, size: int) -> Iterator[slice]:
    """Cut ``total`` tokens into even chunks of at most ``size``."""
    count = max(1, -(-total // size))
    step = max(1, -(-total // count))
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
