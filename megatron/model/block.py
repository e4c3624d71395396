"""One transformer block."""

from __future__ import annotations

import torch
from torch import nn

from megatron.model.attention import SelfAttention
from megatron.model.carried import Carried, Value
from megatron.model.dropout import Dropout
from megatron.model.experts import MixtureOfExperts
from megatron.model.lora import attach_lora
from megatron.model.masking import MaskTables
from megatron.model.mlp import MLP
from megatron.model.norm import build_norm
from megatron.model.rotary import Rotary
from megatron.model.spec import ModelSpec, block_experts, shares_norm
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.rng import DropoutRng


class TransformerBlock(nn.Module):
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
        x = carried.hidden
        normalised = self.input_layernorm(x)
        attended = x + self.attention_dropout(
            self.attention(normalised, carried.starts, carried.bias)
        )
        if self.post_attention_layernorm is not None:
            normalised = self.post_attention_layernorm(x if self.parallel else attended)
        result, loss = self.mlp(normalised), None
        if isinstance(self.mlp, MixtureOfExperts):
            result, loss = result
        out: torch.Tensor = attended + self.mlp_dropout(result)
        return carried.with_hidden(out, loss)
