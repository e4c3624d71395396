"""Causal self-attention with a fused projection, all heads or grouped keys and values."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812

from megatron.errors import ConfigError
from megatron.model.init import initializer
from megatron.model.kv_cache import CachingModule
from megatron.model.masking import Masking
from megatron.model.rotary import Rotary
from megatron.model.spec import ModelSpec, head_size, kv_heads
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.rng import DropoutRng


class SelfAttention(CachingModule):
    """Multi-head attention of GPT-NeoX; grouped-query attention (Ainslie et al. 2023).

    ``query_key_value`` gives, as GPT-NeoX's does, ``[heads, 3, head_size]`` where every head
    has keys and values of its own, and ``[queries | keys | values]`` where heads share them.
    Tensor ranks divide the heads (and the groups).
    """

    def __init__(
        self,
        scope: ParameterScope,
        spec: ModelSpec,
        *,
        layer: int,
        rotary: Rotary | None,
        dropout: DropoutRng,
    ) -> None:
        """Make the attention of block ``layer`` (counted from 0).

        Raises:
            ConfigError: sizes do not divide.
        """
        super().__init__()
        ranks = scope.topology.tensor_size
        _check(spec, ranks)
        self.layer = layer
        self.rotary = rotary
        self.masking = Masking()
        self.dropout = dropout
        self.dropout_rate = spec.attention_dropout
        self.head_size = head_size(spec)
        self.heads = spec.num_attention_heads // ranks
        self.kv_heads = kv_heads(spec) // ranks
        hidden, shared = spec.hidden_size, kv_heads(spec) * self.head_size
        self.query_key_value = ColumnParallelLinear(
            scope.child("query_key_value"),
            inputs=hidden,
            outputs=(3 * hidden,) if self.heads == self.kv_heads else (hidden, shared, shared),
            initializer=initializer(spec.init_method, spec),
            bias=spec.use_bias_in_attn_linear,
        )
        self.dense = RowParallelLinear(
            scope.child("dense"),
            inputs=hidden,
            outputs=hidden,
            initializer=initializer(
                spec.output_layer_init_method, spec, field="output_layer_init_method"
            ),
            bias=spec.use_bias_in_attn_linear,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Let every position of ``[B, S, hidden]`` attend to itself and those before it.

        Where the sequence is divided, ``x`` and the result are this rank's part of it.
        """
        fused = self.query_key_value(x)
        slots = None if self.cache is None else self.cache.slots(fused.device)
        query, key, value = self._heads(fused, slots)
        if self.cache is not None:
            key, value = self.cache.extend(self.layer, key, value)
        mask = self.masking(query.transpose(1, 2), key.shape[1], slots=slots)
        attended = self._attend(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask
        )
        batch, length = query.shape[0], query.shape[1]
        projected: torch.Tensor = self.dense(
            attended.transpose(1, 2).reshape(batch, length, self.heads * self.head_size)
        )
        return projected

    def _heads(
        self, fused: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split the projection and rotate: three ``[B, S, heads, head_size]``."""
        batch, length, size = fused.shape[0], fused.shape[1], self.head_size
        if self.heads == self.kv_heads:
            by_head = fused.view(batch, length, self.heads, 3, size)
            query, key = self._rotate(by_head[..., :2, :], positions).unbind(dim=3)
            return query, key, by_head[..., 2, :]
        turned = self.heads + self.kv_heads
        stacked = fused.view(batch, length, turned + self.kv_heads, size)
        both = self._rotate(stacked[:, :, :turned], positions)
        return both[:, :, : self.heads], both[:, :, self.heads :], stacked[:, :, turned:]

    def _rotate(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        if self.rotary is None:
            return x
        longest = x.shape[1] if self.cache is None else self.cache.length
        return self.rotary.rotate(x, positions, longest=longest)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        attend = partial(
            F.scaled_dot_product_attention,
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.heads != self.kv_heads,
        )
        if not self.training or self.dropout_rate == 0.0:
            return attend()
        with self.dropout.masks(query.device, self.layer, "attention", split=True):
            return attend(dropout_p=self.dropout_rate)


def build_rotary(spec: ModelSpec) -> Rotary | None:
    """Make the position embedding that the architecture asks for.

    Raises:
        ConfigError: ``pos_emb`` is unknown, or the rotated part of a head is odd.
    """
    if spec.pos_emb == "none":
        return None
    if spec.pos_emb != "rotary":
        raise ConfigError(f"pos_emb is '{spec.pos_emb}'; available: rotary, none")
    dimensions = int(head_size(spec) * spec.rotary_pct)
    if dimensions % 2:
        raise ConfigError(
            f"rotary_pct {spec.rotary_pct} of a head of {head_size(spec)} (hidden_size / "
            f"num_attention_heads) is {dimensions} dimensions; it must be an even number"
        )
    return Rotary(dimensions=dimensions, base=spec.rotary_emb_base)


def _check(spec: ModelSpec, ranks: int) -> None:
    heads, groups = spec.num_attention_heads, kv_heads(spec)
    for field, value, divisor, what in (
        ("hidden_size", spec.hidden_size, heads, "num_attention_heads"),
        ("num_attention_heads", heads, groups, "num_kv_heads"),
        ("num_attention_heads", heads, ranks, "model_parallel_size"),
        ("num_kv_heads", groups, ranks, "model_parallel_size"),
    ):
        if value % divisor:
            raise ConfigError(f"{field} {value} is not a multiple of {what} {divisor}")
