"""Maximal update parametrisation: what depends on the width so that learning rates need not.

Yang et al. 2022 (Tensor Programs V), table 8, for Adam.  With m the width over that of the base
model: matrices between hidden layers start with a standard deviation of σ/√m and learn at lr/m;
embeddings, positions, norms and biases start and learn as they do in the base model; hidden
states are divided by m before the output weight; scores of attention are divided by the size of
a head instead of its root.
"""

from __future__ import annotations

from megatron.model.spec import ModelSpec


def width_multiplier(spec: ModelSpec) -> float:
    """Return how many times as wide as the base model a model is; 1 without µP."""
    if not spec.use_mup or spec.mup_base_hidden_size is None:
        return 1.0
    return spec.hidden_size / spec.mup_base_hidden_size


def attention_scale(spec: ModelSpec) -> float | None:
    """Return what scores are multiplied with; None for one over the root of a head's size."""
    if not spec.use_mup:
        return None
    return spec.num_attention_heads / spec.hidden_size / spec.mup_attn_temp


def output_multiplier(spec: ModelSpec) -> float:
    """Return what hidden states are multiplied with before the output weight."""
    return 1.0 / (width_multiplier(spec) * spec.mup_output_temp) if spec.use_mup else 1.0


def embedding_multipliers(spec: ModelSpec) -> tuple[float, float]:
    """Return what embedded tokens, and vectors of positions, are multiplied with."""
    if not spec.use_mup:
        return 1.0, 1.0
    return spec.mup_embedding_mult, spec.mup_rp_embedding_mult
