"""Causal self-attention with a fused projection, all heads or grouped keys and values."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from megatron.errors import ConfigError, did_you_mean
from megatron.model.init import initializer
from megatron.model.kv_cache import CachingModule
from megatron.model.masking import Masking, MaskTables
from megatron.model.mup import attention_scale
from megatron.model.norm import Norm, build_norm
from megatron.model.relative import own_slopes
from megatron.model.rotary import Angles, Rotary, rotated
from megatron.model.sparsity import DEFAULTS, PATTERNS, BlockPattern
from megatron.model.spec import ModelSpec, attention_types, head_size, kv_heads
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.rng import DropoutRng


class Placed(NamedTuple):
    """What the places of tokens come to: the mask of their scores, and what they are turned by.

    Attributes:
        mask: see :class:`megatron.model.masking.Masking`; None = the plain causal one.
        angles: see :meth:`megatron.model.rotary.Rotary.angles`; None = not turned.
    """

    mask: torch.Tensor | None
    angles: Angles | None


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
        masks: MaskTables | None = None,
    ) -> None:
        """Make the attention of block ``layer`` (counted from 0).

        ``masks`` are shared by the blocks of a model; None makes some for this one.

        Raises:
            ConfigError: sizes do not divide.
        """
        super().__init__()
        ranks = scope.topology.tensor_size
        _check(spec, ranks)
        self.layer = layer
        self.rotary = rotary
        self.masking = _masking(scope, spec, layer, masks)
        self.resets_mask, self.resets_positions = (
            spec.reset_attention_mask,
            spec.reset_position_ids,
        )
        self.dropout = dropout
        self.dropout_rate = spec.attention_dropout
        self.head_size = head_size(spec)
        self.scale = attention_scale(spec)
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
        self.query_norm, self.key_norm = (
            _head_norm(scope.child(name), spec) if spec.use_qk_layernorm else None
            for name in ("query_norm", "key_norm")
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

    def placed(
        self,
        x: torch.Tensor,
        starts: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> Placed:
        """Return what the places of a pass's tokens come to.

        Args:
            x: the residual stream, ``[B, S, hidden]`` or this rank's part of S; its shape, type
                and device count.
            starts: slot at which each token's document begins, int64 ``[B, S]``.
            bias: what distance adds to the scores, ``[heads, S]``.
        """
        if self.cache is None:
            return self._placed(x, starts, bias)
        name = ("placed", self.masking.kind)
        return self.cache.once(name, partial(self._placed, x, starts, bias))

    def _placed(
        self, x: torch.Tensor, starts: torch.Tensor | None, bias: torch.Tensor | None
    ) -> Placed:
        topology, cache = self.query_key_value.topology, self.cache
        length = x.shape[1] * (topology.tensor_size if topology.splits_sequence else 1)
        slots, keys = None, length
        if cache is not None:
            slots, keys = cache.slots(x.device), cache.length
        seen = starts if self.resets_mask else None
        mask = None
        if cache is None or not (
            cache.is_last and self.masking.is_causal and seen is None and bias is None
        ):
            own = None if cache is not None and cache.is_whole else slots
            mask = self.masking(x, keys, slots=own, starts=seen, bias=bias)
        if self.rotary is None:
            return Placed(mask=mask, angles=None)
        if starts is not None and self.resets_positions:
            slots = (torch.arange(length, device=x.device) if slots is None else slots) - starts
        return Placed(mask=mask, angles=self.rotary.angles(keys, x.device, slots))

    def forward(
        self, x: torch.Tensor, placed: Placed | None = None, *, biased: bool = True
    ) -> torch.Tensor:
        """Let every position of ``[B, S, hidden]`` attend to itself and those before it.

        Where the sequence is divided, ``x`` and the result are this rank's part of it.

        Args:
            x: the residual stream, normalised.
            placed: as :meth:`placed` returns it; None where the window is one document.
            biased: whether the output has its bias already.
        """
        mask, angles = placed or self.placed(x)
        query, key, value = self._heads(self.query_key_value(x), angles)
        if self.cache is not None:
            key, value = self.cache.extend(self.layer, key, value)
        attended = self._attend(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask
        )
        batch, length = query.shape[0], query.shape[1]
        projected: torch.Tensor = self.dense(
            attended.transpose(1, 2).reshape(batch, length, self.heads * self.head_size),
            biased=biased,
        )
        return projected

    def _heads(
        self, fused: torch.Tensor, angles: Angles | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Split the projection, normalise and rotate: three ``[B, S, heads, head_size]``."""
        batch, length, size = fused.shape[0], fused.shape[1], self.head_size
        if self.heads == self.kv_heads:
            by_head = fused.view(batch, length, self.heads, 3, size)
            turned = _turned(self._normalised(by_head[..., :2, :], dim=3), angles)
            query, key = turned.unbind(dim=3)
            return query, key, by_head[..., 2, :]
        both = self.heads + self.kv_heads
        stacked = fused.view(batch, length, both + self.kv_heads, size)
        turned = _turned(self._normalised(stacked[:, :, :both], dim=2), angles)
        return turned[:, :, : self.heads], turned[:, :, self.heads :], stacked[:, :, both:]

    def _normalised(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Normalise queries and keys, which follow each other along ``dim``."""
        if self.query_norm is None or self.key_norm is None:
            return x
        queries = 1 if dim == 3 else self.heads
        query, key = torch.split(x, [queries, x.shape[dim] - queries], dim=dim)
        return torch.cat([self.query_norm(query), self.key_norm(key)], dim=dim)

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
            is_causal=mask is None and query.shape[2] > 1,  # one alone is the last, and sees all
            enable_gqa=self.heads != self.kv_heads,
            scale=self.scale,
        )
        if not self.training or self.dropout_rate == 0.0:
            return attend()
        if torch.compiler.is_compiling():  # whoever calls has seeded the generator
            return attend(dropout_p=self.dropout_rate)
        with self.draws(query.device):
            return attend(dropout_p=self.dropout_rate)

    def draws(self, device: torch.device) -> AbstractContextManager[None]:
        """Let torch's generator draw this block's masks of attention inside the ``with`` block."""
        if not self.training or self.dropout_rate == 0.0:
            return nullcontext()
        return self.dropout.masks(device, self.layer, "attention", split=True)


def _turned(x: torch.Tensor, angles: Angles | None) -> torch.Tensor:
    return x if angles is None else rotated(x, angles)


POSITIONS = ("learned", "rotary", "sinusoidal", "rpe", "alibi", "none")
"""Names that ``pos_emb`` takes."""

ATTENTION_TYPES = ("global", "flash", *PATTERNS)
"""Names that ``attention_config`` takes for blocks that attend.  "flash" is "global": both take
the fastest kernel at hand."""


def build_rotary(spec: ModelSpec) -> Rotary | None:
    """Make the rotation that the architecture asks for; None where it rotates nothing.

    Raises:
        ConfigError: ``pos_emb`` is unknown, or the rotated part of a head is odd.
    """
    if spec.pos_emb not in POSITIONS:
        raise ConfigError(
            f"pos_emb is '{spec.pos_emb}'{did_you_mean(spec.pos_emb, POSITIONS)} "
            f"(available: {', '.join(POSITIONS)})"
        )
    if spec.pos_emb != "rotary":
        return None
    dimensions = int(head_size(spec) * spec.rotary_pct)
    if dimensions % 2:
        raise ConfigError(
            f"rotary_pct {spec.rotary_pct} of a head of {head_size(spec)} (hidden_size / "
            f"num_attention_heads) is {dimensions} dimensions; it must be an even number"
        )
    return Rotary(dimensions=dimensions, base=spec.rotary_emb_base)


def _masking(
    scope: ParameterScope, spec: ModelSpec, layer: int, tables: MaskTables | None
) -> Masking:
    """Make the mask of block ``layer``.

    Raises:
        ConfigError: its kind of attention is unknown.
    """
    kind, topology = attention_types(spec)[layer], scope.topology
    if kind not in ATTENTION_TYPES:
        raise ConfigError(
            f"attention_config names '{kind}'{did_you_mean(kind, ATTENTION_TYPES)} "
            f"(available: {', '.join(ATTENTION_TYPES)})"
        )
    pattern = None
    if kind in PATTERNS:
        settings = spec.sparsity_config or DEFAULTS
        heads = spec.num_attention_heads
        pattern = BlockPattern(kind, settings, heads=heads, layer=layer, topology=topology)
    return Masking(
        window=spec.sliding_window_width,
        pattern=pattern,
        slopes=own_slopes(spec, topology) if spec.pos_emb == "alibi" else None,
        tables=tables,
    )


def _head_norm(scope: ParameterScope, spec: ModelSpec) -> Norm:
    """Make the norm of queries or keys, each head by itself (Dehghani et al. 2023, section 2).

    One scale serves all heads, so its gradient is the sum over the tensor ranks' heads however
    the sequence is divided: inside, that sum is taken as under sequence parallelism.
    """
    summed = dataclasses.replace(scope.topology, sequence_parallel=True)
    return build_norm(dataclasses.replace(scope, topology=summed), spec, hidden=head_size(spec))


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
