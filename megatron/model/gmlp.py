"""Blocks that mix positions by a learned matrix instead of attention: gMLP and aMLP.

Liu et al. 2021, "Pay Attention to MLPs", section 2 and appendix A.  Causal: a position gates
with itself and those before it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from megatron.errors import ConfigError
from megatron.model.carried import Carried, Value
from megatron.model.compiled import CompilableBlock
from megatron.model.dropout import Dropout
from megatron.model.init import initializer
from megatron.model.kv_cache import CachingModule
from megatron.model.mlp import activation_function
from megatron.model.norm import build_norm
from megatron.model.spec import ModelSpec, attention_types, ffn_width, spatial_rows
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.parameters import ParameterScope, ones, zeros
from megatron.parallel.rng import DropoutRng


class SpatialGatingUnit(CachingModule):
    """``u · (W norm(v) + b)`` of the halves ``[u | v]``; with ``attention`` its output joins W's.

    W starts at 0 and b at 1, so that the unit lets its first half through unchanged.
    """

    def __init__(self, scope: ParameterScope, spec: ModelSpec, *, layer: int) -> None:
        """Make the unit of block ``layer``; an "amlp" block has a head of attention in it."""
        super().__init__()
        width = ffn_width(spec)
        self.layer = layer
        self.resets = spec.reset_attention_mask
        self.norm = build_norm(scope.child("norm"), spec, hidden=width)
        rows = spatial_rows(spec)
        self.proj = Spatial(scope.child("proj"), rows)
        self.attn = (
            TinyAttention(scope.child("attn"), spec)
            if attention_types(spec)[layer] == "amlp"
            else None
        )

    def forward(self, x: torch.Tensor, starts: torch.Tensor | None = None) -> torch.Tensor:
        """Map ``[B, S, 2 · width]`` to ``[B, S, width]``.

        Args:
            x: both halves.
            starts: slot at which each token's document begins, int64 ``[B, S]``.
        """
        own, gate = x.chunk(2, dim=-1)
        gate = self.norm(gate)
        projected: torch.Tensor | None = None if self.attn is None else self.attn.proj_qkv(x)
        remembered = projected
        slots = torch.arange(x.shape[1], device=x.device)[None]
        if self.cache is not None:
            slots = self.cache.slots(x.device)
            # What later positions will look at, beside each other in one cached vector.
            parts = [gate] if projected is None else [gate, projected]
            packed = torch.cat(parts, dim=-1)[:, :, None]
            packed, _ = self.cache.extend(self.layer, packed, packed[..., :0])
            width = gate.shape[-1]
            gate, remembered = packed[:, :, 0, :width], packed[:, :, 0, width:]
        seen = self._seen(slots, gate.shape[1], starts)
        mixed = self.proj(gate, slots, seen)
        if self.attn is not None and projected is not None and remembered is not None:
            mixed = mixed + self.attn(projected, remembered, seen)
        gated: torch.Tensor = own * mixed
        return gated

    def _seen(self, slots: torch.Tensor, length: int, starts: torch.Tensor | None) -> torch.Tensor:
        """Return which of ``length`` positions each token sees, bool ``[B or 1, S, length]``."""
        places = torch.arange(length, device=slots.device)
        seen = places <= slots[..., None]
        if starts is not None and self.resets:
            seen = seen & (places >= starts[..., None])
        return seen


class Spatial(nn.Module):
    """The matrix over positions, and a bias for each."""

    def __init__(self, scope: ParameterScope, rows: int) -> None:
        """Make the matrix of ``rows`` positions."""
        super().__init__()
        self.weight = scope.parameter("weight", (rows, rows), zeros)
        self.bias = scope.parameter("bias", (rows,), ones)

    def forward(self, x: torch.Tensor, slots: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Mix ``x`` ``[B, L, width]`` for the tokens at ``slots``: ``[B, S, width]``."""
        rows = self.weight[slots, : x.shape[1]].masked_fill(~seen, 0.0)
        mixed: torch.Tensor = rows @ x + self.bias[slots][..., None]
        return mixed


class TinyAttention(nn.Module):
    """One small head of attention, straight from the unit's input (Liu et al. 2021, figure 7)."""

    def __init__(self, scope: ParameterScope, spec: ModelSpec) -> None:
        """Make the head, ``gmlp_attn_dim`` wide."""
        super().__init__()
        size, width = spec.gmlp_attn_dim, ffn_width(spec)
        self.size = size
        self.proj_qkv = ColumnParallelLinear(
            scope.child("proj_qkv"),
            inputs=2 * width,
            outputs=(3 * size,),
            initializer=initializer(spec.init_method, spec),
            bias=spec.use_bias_in_attn_linear,
        )
        self.proj_ffn = RowParallelLinear(
            scope.child("proj_ffn"),
            inputs=size,
            outputs=width,
            initializer=initializer(
                spec.output_layer_init_method, spec, field="output_layer_init_method"
            ),
            bias=spec.use_bias_in_attn_linear,
        )

    def forward(
        self, projected: torch.Tensor, remembered: torch.Tensor, seen: torch.Tensor
    ) -> torch.Tensor:
        """Attend from one projection, ``[B, S, 3 · size]``, to another of all tokens so far."""
        query = projected[..., : self.size]
        _, key, value = remembered.chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=1 / math.sqrt(self.size)
        )
        out: torch.Tensor = self.proj_ffn(attended)
        return out


class GMLPTransformerBlock(CompilableBlock):
    """``x + output_linear(sgu(act(input_linear(norm(x)))))``, one of these for attention and MLP.

    The width is that of the MLP, ``intermediate_size``, which the unit halves to.  Of a gated
    activation it takes what the gate goes through.  (GPT-NeoX leaves the residual out.)
    ``pipe_partition_method: type:transformer`` deals it out with the other blocks.
    """

    def __init__(
        self, scope: ParameterScope, spec: ModelSpec, *, layer: int, dropout: DropoutRng
    ) -> None:
        """Make block ``layer`` (counted from 0).

        Raises:
            ConfigError: several tensor ranks would have to share it.
        """
        super().__init__()
        if scope.topology.tensor_size > 1:
            raise ConfigError(
                "attention_config has gmlp or amlp, whose blocks are not divided among tensor "
                "ranks; set model_parallel_size: 1 (data ranks, ZeRO and pipelines work)"
            )
        width = ffn_width(spec)
        self.norm = build_norm(scope.child("norm"), spec)
        self.input_linear = ColumnParallelLinear(
            scope.child("input_linear"),
            inputs=spec.hidden_size,
            outputs=(2 * width,),
            initializer=initializer(spec.init_method, spec),
            bias=spec.use_bias_in_mlp,
        )
        self.activation = activation_function(spec.activation)
        self.sgu = SpatialGatingUnit(scope.child("sgu"), spec, layer=layer)
        self.output_linear = RowParallelLinear(
            scope.child("output_linear"),
            inputs=width,
            outputs=spec.hidden_size,
            initializer=initializer(
                spec.output_layer_init_method, spec, field="output_layer_init_method"
            ),
            bias=spec.use_bias_in_mlp,
        )
        self.dropout = Dropout(rate=spec.hidden_dropout, layer=layer, place="mlp", rng=dropout)

    def forward(self, value: Value) -> Value:
        """Map the residual stream ``[B, S, hidden]`` to its next value; the rest goes on."""
        carried = Carried.of(value)
        return carried.with_hidden(self.run(carried.hidden, carried.starts))

    def body(self, x: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        """Return the next value of the residual stream."""
        inner = self.activation(self.input_linear(self.norm(x)))
        gated = self.sgu(inner, starts)
        out: torch.Tensor = x + self.dropout(self.output_linear(gated))
        return out
