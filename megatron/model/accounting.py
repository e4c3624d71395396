"""How many parameters a configuration has and what a token costs; needs no torch."""

from __future__ import annotations

from megatron.model.spec import GATED_ACTIVATIONS, ModelSpec, ffn_width, head_size, kv_heads


def block_parameters(spec: ModelSpec) -> int:
    """Return the parameters of one block."""
    hidden, width = spec.hidden_size, ffn_width(spec)
    query_key_value = hidden + 2 * kv_heads(spec) * head_size(spec)
    up = width * (2 if spec.activation in GATED_ACTIVATIONS else 1)
    attention = query_key_value * hidden + hidden * hidden
    mlp = up * hidden + width * hidden
    attention_bias = query_key_value + hidden if spec.use_bias_in_attn_linear else 0
    mlp_bias = up + hidden if spec.use_bias_in_mlp else 0
    return attention + attention_bias + mlp + mlp_bias + 2 * norm_parameters(spec)


def norm_parameters(spec: ModelSpec) -> int:
    """Return the parameters of one norm."""
    return spec.hidden_size * (2 if spec.norm == "layernorm" else 1)


def parameter_count(spec: ModelSpec, *, tensor_size: int = 1) -> int:
    """Return the parameters of the whole model, all ranks together, each counted once.

    Args:
        spec: the architecture.
        tensor_size: tensor-parallel ranks; the vocabulary is padded to divide by them.
    """
    vocabulary = spec.padded_vocab_size(tensor_size) * spec.hidden_size
    embeddings = vocabulary * (2 if spec.no_weight_tying else 1)
    return embeddings + spec.num_layers * block_parameters(spec) + norm_parameters(spec)


def flops_per_token(spec: ModelSpec, *, causal: bool = True, tensor_size: int = 1) -> float:
    """Return the floating-point operations of one token's forward and backward pass.

    ``6·N + 6·V·h + 6·L·h·s`` with N the parameters of the blocks, V the padded vocabulary,
    s the sequence length (Narayanan et al. 2021, appendix, in the causal form; recomputed
    activations are not counted).

    Args:
        spec: the architecture.
        causal: count only the half of attention that the mask leaves; otherwise all of it.
        tensor_size: tensor-parallel ranks, for the padding of the vocabulary.
    """
    blocks = spec.num_layers * block_parameters(spec)
    head = spec.padded_vocab_size(tensor_size) * spec.hidden_size
    length = spec.seq_length or 0
    attention = spec.num_layers * spec.hidden_size * length * (1 if causal else 2)
    return 6.0 * (blocks + head + attention)
