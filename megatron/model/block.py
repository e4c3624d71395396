"""One transformer block."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from megatron.model.attention import Placed, SelfAttention
from megatron.model.carried import Carried, Value
from megatron.model.compiled import CompilableBlock
from megatron.model.dropout import Dropout
from megatron.model.experts import MixtureOfExperts
from megatron.model.lora import attach_lora
from megatron.model.masking import MaskTables
from megatron.model.mlp import MLP
from megatron.model.norm import build_norm
from megatron.model.rotary import Rotary
from megatron.model.spec import ModelSpec, block_experts, shares_norm
from megatron.parallel.layers import RowParallelLinear
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.rng import DropoutRng


class TransformerBlock(CompilableBlock):
    """Attention and MLP, each normalised at its input, added to the residual stream.

    With ``gpt_j_residual`` both read the same stream, ``x + attention(n₁(x)) + mlp(n₂(x))``
    (GPT-NeoX-20B, Black et al. 2022, section 2.1, with two norms; with ``gpt_j_tied`` one, as
    in GPT-J); otherwise the MLP reads what attention has written.
    """

    def __init__(
        self,
        scope: ParameterScope,
        spec: ModelSpec,
        *,
        layer: int,
        rotary: Rotary | None,
        dropout: DropoutRng,
        masks: MaskTables | None = None,
    ) -> None:
        """Make block ``layer`` (counted from 0); ``masks`` are shared by a model's blocks."""
        super().__init__()
        self.parallel = spec.gpt_j_residual
        self.input_layernorm = build_norm(scope.child("input_layernorm"), spec)
        self.attention = SelfAttention(
            scope.child("attention"),
            spec,
            layer=layer,
            rotary=rotary,
            dropout=dropout,
            masks=masks,
        )
        self.post_attention_layernorm = (
            None if shares_norm(spec) else build_norm(scope.child("post_attention_layernorm"), spec)
        )
        inside = scope.child("mlp")
        self.mlp: MLP | MixtureOfExperts = (
            MixtureOfExperts(inside, spec, layer=layer, rng=dropout)
            if block_experts(spec)[layer] > 1
            else MLP(inside, spec)
        )
        rate = spec.hidden_dropout
        self.attention_dropout = Dropout(rate=rate, layer=layer, place="attention", rng=dropout)
        self.mlp_dropout = Dropout(rate=rate, layer=layer, place="mlp", rng=dropout)
        attach_lora(self, scope, spec, layer=layer, dropout=dropout)

    def forward(self, value: Value) -> Value:
        """Map the residual stream to its next value; what came beside it goes on.

        Args:
            value: ``[B, S, hidden]``, or this rank's part of the sequence where it is divided;
                see :mod:`megatron.model.carried`.
        """
        carried = Carried.of(value)
        placed = self.attention.placed(carried.hidden, carried.starts, carried.bias)
        hidden, loss = self.run(carried.hidden, placed)
        return carried.with_hidden(hidden, loss)

    def body(
        self, x: torch.Tensor, placed: Placed, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the next value of the residual stream, and what experts add to the loss.

        Args:
            x: the residual stream.
            placed: what its places come to.
            bias: as :meth:`compiled_aids` returns it; then no output adds one of its own.
        """
        own = {} if bias is None else {"biased": False}
        normalised = self.input_layernorm(x)
        attended = x + self.attention_dropout(self.attention(normalised, placed, **own))
        if self.post_attention_layernorm is not None:
            normalised = self.post_attention_layernorm(x if self.parallel else attended)
        result, loss = self.mlp(normalised, **own), None
        if isinstance(self.mlp, MixtureOfExperts):
            result, loss = result
        out = attended + self.mlp_dropout(result)
        return (out if bias is None else out + bias), loss

    def compiled_aids(self) -> tuple[torch.Tensor | None]:
        """Return the sum of both outputs' biases, where they have one gradient.

        That is so where attention and MLP stand side by side and nothing is dropped.  Added up
        here, in eager autograd, because inductor would find it out (torch 2.13): both gradients
        then are one piece of memory, to which a second micro-batch is added twice, and in bf16
        its C++ does not compile.
        """
        dropping = self.training and self.mlp_dropout.rate > 0.0
        if dropping or not self.parallel or not isinstance(self.mlp, MLP):
            return (None,)
        first, second = self.attention.dense, self.mlp.dense_4h_to_h
        assert isinstance(second, RowParallelLinear)
        biases = (first.own_bias(), second.own_bias())
        given = [bias for bias in biases if bias is not None]
        return (given[0] + given[1] if len(given) == 2 else None,)

    def draws(self, device: torch.device) -> AbstractContextManager[None]:
        """See :meth:`CompilableBlock.draws`: attention's kernels take no other generator."""
        return self.attention.draws(device)
