# ruff: noqa: D102  (the class docstring describes every property)
"""What the model reads of a configuration: a view of ``config.model``, never all of it."""

from __future__ import annotations

from typing import Protocol


class Sparsity(Protocol):
    """Settings of the block-sparse kinds of attention; None stands for the kind's own default.

    Attributes:
        block: tokens of a block.
        different_layout_per_head: heads differ, where the kind has something to vary.
        num_local_blocks: blocks of a local window.
        num_global_blocks: blocks that all later ones see: of each window (sparse_fixed), or the
            first ones (bigbird).
        num_different_global_patterns: so many heads take different blocks as global.
        num_random_blocks: blocks drawn for every row.
        local_window_blocks: sizes of the windows, the last one repeated.
        global_block_indices: blocks that all later ones see.
        global_block_end_indices: turns each of them into a range, end not included.
        num_sliding_window_blocks: width of the sliding window, half of it before a block.
    """

    @property
    def block(self) -> int: ...
    @property
    def different_layout_per_head(self) -> bool: ...
    @property
    def num_local_blocks(self) -> int | None: ...
    @property
    def num_global_blocks(self) -> int: ...
    @property
    def num_different_global_patterns(self) -> int: ...
    @property
    def num_random_blocks(self) -> int | None: ...
    @property
    def local_window_blocks(self) -> tuple[int, ...]: ...
    @property
    def global_block_indices(self) -> tuple[int, ...]: ...
    @property
    def global_block_end_indices(self) -> tuple[int, ...] | None: ...
    @property
    def num_sliding_window_blocks(self) -> int | None: ...


class SoftPrompt(Protocol):
    """Settings of a learned prompt.

    Attributes:
        n_tokens: vectors in it.
        init_range: they start between this and its negative.
    """

    @property
    def n_tokens(self) -> int: ...
    @property
    def init_range(self) -> float: ...


class LoraSettings(Protocol):
    """Settings of low-rank updates.

    Attributes:
        rank: of each update.
        alpha: an update is multiplied with alpha / rank.
        dropout: of the updates' inputs.
        targets: layers of a block that have one, see :mod:`megatron.model.lora`.
    """

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def targets(self) -> tuple[str, ...]: ...


class ModelSpec(Protocol):
    """The architecture.  ``megatron.config``'s model group satisfies it; so may anything else.

    Attributes:
        num_layers: number of blocks.
        hidden_size: width of the residual stream.
        num_attention_heads: query heads.
        num_kv_heads: key and value heads; None = as many as query heads.
        vocab_size: number of token ids, before padding; a complete configuration has it.
        seq_length: tokens in a sample; a configuration that is complete has it.
        norm: see :mod:`megatron.model.norm`.
        layernorm_epsilon: inside the square root.
        rms_norm_epsilon: inside the square root.
        rms_norm_epsilon_outside_root: it is added to the root instead.
        scalenorm_epsilon: the least length that is divided by.
        use_bias_in_norms: whether layernorm has a shift.
        pos_emb: "learned", "rotary", "sinusoidal", "rpe", "alibi" or "none".
        max_position_embeddings: positions that learned ones are held for.
        opt_pos_emb_offset: added to the number of a learned or sinusoidal position.
        rpe_num_buckets: buckets of distances that "rpe" tells apart.
        rpe_max_distance: from here on they all are one.
        rotary_pct: share of each head that is rotated.
        rotary_emb_base: base of the wavelengths.
        attention_config: kind of attention of every block; None = "global" everywhere.
        sparsity_config: settings of the sparse kinds; None = their defaults.
        sliding_window_width: tokens before its own that a query sees; None = all.
        use_qk_layernorm: queries and keys are normalised, each head by itself.
        reset_attention_mask: no token sees a document before its own.
        reset_position_ids: positions begin anew with every document.
        eod_token_id: the token that ends a document; a complete configuration has it where one
            of the two is on.
        activation: see :mod:`megatron.model.mlp`.
        gmlp_attn_dim: width of the attention in an "amlp" block.
        intermediate_size: width of the MLP's activation; None = 4 × hidden, or 8/3 × hidden
            rounded up to a multiple of 256 if the activation is gated.
        gpt_j_residual: attention and MLP side by side instead of one after the other.
        gpt_j_tied: then with one norm for both.
        no_weight_tying: whether the output has a weight of its own.
        init_method: see :mod:`megatron.model.init`.
        init_method_std: σ of the normal methods.
        output_layer_init_method: of the projections that write into the residual stream.
        hidden_dropout: after the embedding, attention and MLP.
        attention_dropout: of attention probabilities.
        use_bias_in_attn_linear: biases in attention's projections.
        use_bias_in_mlp: biases in the MLP's projections.
        use_mup: maximal update parametrisation, see :mod:`megatron.model.mup`.
        mup_base_hidden_size: width of the base model.
        mup_init_scale: all drawn weights are multiplied with it.
        mup_attn_temp: scores of attention are divided by it.
        mup_output_temp: logits are divided by it.
        mup_embedding_mult: embedded tokens are multiplied with it.
        mup_rp_embedding_mult: vectors of positions are.
        soft_prompt_tuning: a learned prompt, beside which nothing is trained; None = none.
        moe_num_experts: experts of a block that has them; 0 and 1 = every block has a plain MLP.
        moe_expert_interval: every so many blocks one has experts, the first among them.
        moe_top_k: experts that a token goes to.
        moe_router_type: "sinkhorn" or "topk", see :mod:`megatron.model.router`.
        moe_normalize_expert_weights: a token's weights of its experts are made to sum to 1.
        moe_jitter_eps: the router's input is multiplied with noise of this width; None = not.
        moe_loss_coeff: of the loss that balances experts; None = 0.
        moe_z_loss_coeff: of the loss that keeps the router's logits small.
        moe_lbl_in_fp32: the balancing loss is taken in float32 whatever the model computes in.
        lora: low-rank updates of layers, beside which nothing is trained; None = none.
        checkpoint_activations: recompute blocks in backward.
        checkpoint_num_layers: blocks recomputed together.
    """

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int | None: ...
    @property
    def vocab_size(self) -> int | None: ...
    @property
    def seq_length(self) -> int | None: ...
    @property
    def norm(self) -> str: ...
    @property
    def layernorm_epsilon(self) -> float: ...
    @property
    def rms_norm_epsilon(self) -> float: ...
    @property
    def rms_norm_epsilon_outside_root(self) -> bool: ...
    @property
    def scalenorm_epsilon(self) -> float: ...
    @property
    def use_bias_in_norms(self) -> bool: ...
    @property
    def pos_emb(self) -> str: ...
    @property
    def max_position_embeddings(self) -> int | None: ...
    @property
    def opt_pos_emb_offset(self) -> int: ...
    @property
    def rpe_num_buckets(self) -> int: ...
    @property
    def rpe_max_distance(self) -> int: ...
    @property
    def attention_config(self) -> tuple[str, ...] | None: ...
    @property
    def sparsity_config(self) -> Sparsity | None: ...
    @property
    def sliding_window_width(self) -> int | None: ...
    @property
    def use_qk_layernorm(self) -> bool: ...
    @property
    def reset_attention_mask(self) -> bool: ...
    @property
    def reset_position_ids(self) -> bool: ...
    @property
    def eod_token_id(self) -> int | None: ...
    @property
    def rotary_pct(self) -> float: ...
    @property
    def rotary_emb_base(self) -> float: ...
    @property
    def activation(self) -> str: ...
    @property
    def gmlp_attn_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int | None: ...
    @property
    def gpt_j_residual(self) -> bool: ...
    @property
    def gpt_j_tied(self) -> bool: ...
    @property
    def no_weight_tying(self) -> bool: ...
    @property
    def init_method(self) -> str: ...
    @property
    def init_method_std(self) -> float: ...
    @property
    def output_layer_init_method(self) -> str: ...
    @property
    def hidden_dropout(self) -> float: ...
    @property
    def attention_dropout(self) -> float: ...
    @property
    def use_bias_in_attn_linear(self) -> bool: ...
    @property
    def use_bias_in_mlp(self) -> bool: ...
    @property
    def use_mup(self) -> bool: ...
    @property
    def mup_base_hidden_size(self) -> int | None: ...
    @property
    def mup_init_scale(self) -> float: ...
    @property
    def mup_attn_temp(self) -> float: ...
    @property
    def mup_output_temp(self) -> float: ...
    @property
    def mup_embedding_mult(self) -> float: ...
    @property
    def mup_rp_embedding_mult(self) -> float: ...
    @property
    def soft_prompt_tuning(self) -> SoftPrompt | None: ...
    @property
    def moe_num_experts(self) -> int: ...
    @property
    def moe_expert_interval(self) -> int: ...
    @property
    def moe_top_k(self) -> int: ...
    @property
    def moe_router_type(self) -> str: ...
    @property
    def moe_normalize_expert_weights(self) -> bool: ...
    @property
    def moe_jitter_eps(self) -> float | None: ...
    @property
    def moe_loss_coeff(self) -> float | None: ...
    @property
    def moe_z_loss_coeff(self) -> float: ...
    @property
    def moe_lbl_in_fp32(self) -> bool: ...
    @property
    def lora(self) -> LoraSettings | None: ...
    @property
    def checkpoint_activations(self) -> bool: ...
    @property
    def checkpoint_num_layers(self) -> int: ...

    def padded_vocab_size(self, tensor_size: int = 1) -> int:
        """Return the vocabulary rounded up so that ``tensor_size`` ranks divide it."""
        ...


GATED_ACTIVATIONS = frozenset({"geglu", "reglu", "swiglu", "glu", "bilinear"})
"""Activations whose MLP multiplies an activated gate with a linear part."""


def ffn_width(spec: ModelSpec) -> int:
    """Return the width of the MLP's activation (the inputs of ``dense_4h_to_h``)."""
    if spec.intermediate_size is not None:
        return spec.intermediate_size
    if spec.activation in GATED_ACTIVATIONS:
        return -(-(8 * spec.hidden_size // 3) // 256) * 256
    return 4 * spec.hidden_size


def shares_norm(spec: ModelSpec) -> bool:
    """Tell whether attention and MLP of a block read the output of one norm."""
    return spec.gpt_j_residual and spec.gpt_j_tied


def vocabulary(spec: ModelSpec) -> int:
    """Return the number of token ids, before padding.

    Raises:
        ValueError: the configuration is not complete.
    """
    if spec.vocab_size is None:
        raise ValueError("vocab_size is not known; the composition root fills it in")
    return spec.vocab_size


def kv_heads(spec: ModelSpec) -> int:
    """Return the number of key and value heads."""
    return spec.num_kv_heads or spec.num_attention_heads


def head_size(spec: ModelSpec) -> int:
    """Return the size of one attention head."""
    return spec.hidden_size // spec.num_attention_heads


def attention_types(spec: ModelSpec) -> tuple[str, ...]:
    """Return the kind of attention of every block, by the names of ``attention_config``."""
    return spec.attention_config or ("global",) * spec.num_layers


def block_experts(spec: ModelSpec) -> tuple[int, ...]:
    """Return the number of experts of every block; 1 = a plain MLP.

    Blocks 0, n, 2 n, … have them, as GPT-NeoX counts.
    """
    experts = max(1, spec.moe_num_experts)
    every = spec.moe_expert_interval
    return tuple(1 if layer % every else experts for layer in range(spec.num_layers))


def position_rows(spec: ModelSpec) -> int:
    """Return the rows of learned positions.

    Raises:
        ValueError: the configuration is not complete.
    """
    longest = spec.max_position_embeddings or spec.seq_length
    if longest is None:
        raise ValueError("max_position_embeddings is not known")
    return longest + spec.opt_pos_emb_offset


def resets(spec: ModelSpec) -> bool:
    """Tell whether anything begins anew with a document, so that blocks must know where."""
    return spec.reset_attention_mask or spec.reset_position_ids


MIXERS = frozenset({"gmlp", "amlp"})
"""Kinds in ``attention_config`` that are blocks of their own, see :mod:`megatron.model.gmlp`."""


def spatial_rows(spec: ModelSpec) -> int:
    """Return the positions that a spatial gating unit knows.

    Raises:
        ValueError: the configuration is not complete.
    """
    longest = spec.max_position_embeddings or spec.seq_length
    if longest is None:
        raise ValueError("max_position_embeddings is not known")
    return longest
