"""The model: its sizes, its parts, and how its weights start."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megatron.config.adapters import (
    LoraConfig,
    SoftPromptConfig,
    trained_prompt,
    trained_updates,
)
from megatron.config.attention import MIXERS, AttentionKinds, SparsityConfig
from megatron.config.base import (
    Count,
    Dropout,
    Fraction,
    Group,
    NonNegative,
    NonNegativeInt,
    Positive,
    invalid,
)
from megatron.config.experts import balance_coefficient, check_experts
from megatron.config.mup import check_mup

Activation = Literal[
    "gelu",
    "gelu_tanh",
    "relu",
    "softsign",
    "swish",
    "silu",
    "mish",
    "geglu",
    "reglu",
    "swiglu",
    "glu",
    "bilinear",
]
Norm = Literal["layernorm", "rmsnorm", "scalenorm", "non_parametric_layernorm"]
InitMethod = Literal[
    "normal",
    "scaled_normal",
    "orthogonal",
    "scaled_orthogonal",
    "xavier_uniform",
    "xavier_normal",
    "wang_init",
    "small_init",
    "single_residual_scaled_normal",
]
GATED: frozenset[str] = frozenset({"geglu", "reglu", "swiglu", "glu", "bilinear"})
GATED_MULTIPLE = 256


class ModelConfig(Group):
    """Architecture of the GPT-NeoX family.

    A loaded group holds numbers everywhere: ``num_kv_heads``, ``seq_length``,
    ``max_position_embeddings`` and ``intermediate_size`` are filled in when not given.
    Only ``vocab_size`` may stay ``None`` until the tokenizer or the data say it.
    """

    num_layers: Count
    """Number of transformer blocks."""
    hidden_size: Count
    """Width of the residual stream."""
    num_attention_heads: Count
    """Number of query heads; divides `hidden_size`."""
    num_kv_heads: Count | None = None
    """Number of key/value heads (grouped-query attention); divides `num_attention_heads`.
    Default: `num_attention_heads`."""
    seq_length: Count | None = None
    """Training context in tokens. Default: `max_position_embeddings`; one of both is required."""
    max_position_embeddings: Count | None = None
    """Longest context in tokens the model is made for. Default: `seq_length`."""
    vocab_size: Count | None = None
    """Number of token ids, before padding. Default: taken from the tokenizer or from the data."""
    make_vocab_size_divisible_by: Count = 128
    """The embedding's rows are padded up to a multiple of this (times the tensor-parallel size)."""
    norm: Norm = "layernorm"
    """Normalisation of every block and of the last hidden state. `non_parametric_layernorm` has
    neither scale nor shift; `scalenorm` divides by the vector's length and has one scale in all.
    (`te_layernorm` and `te_rmsnorm` stand for `layernorm` and `rmsnorm`.)"""
    layernorm_epsilon: Positive = 1e-5
    """Epsilon of `norm: layernorm` and `non_parametric_layernorm`, inside the square root."""
    rms_norm_epsilon: Positive = 1e-8
    """Epsilon of `norm: rmsnorm`, inside the square root as in Llama and in GPT-NeoX today:
    x / √(mean x² + ε)."""
    rms_norm_epsilon_outside_root: bool = False
    """Add the epsilon of `norm: rmsnorm` to the root, x / (√(mean x²) + ε), as older versions of
    GPT-NeoX and its data-mixing fork do: for exact agreement with their checkpoints."""
    scalenorm_epsilon: Positive = 1e-8
    """Least length that `norm: scalenorm` divides by."""
    use_bias_in_norms: bool = True
    """Whether `norm: layernorm` has a shift beside its scale. No other norm has one."""
    pos_emb: Literal["learned", "rotary", "sinusoidal", "rpe", "alibi", "none"] = "rotary"
    """Position encoding: `learned` or `sinusoidal` vectors added to the embedding, `rotary`, a
    learned bias by distance as in T5 (`rpe`, one table for all blocks), one that falls with
    distance (`alibi`), or none. (GPT-NeoX's own default is `learned`.)"""
    opt_pos_emb_offset: NonNegativeInt = 0
    """Added to the number of a `learned` or `sinusoidal` position (2 in OPT). The table has
    `max_position_embeddings` rows and so many more."""
    rpe_num_buckets: Annotated[int, Field(ge=2)] = 32
    """Buckets of distances that `pos_emb: rpe` tells apart."""
    rpe_max_distance: Count = 128
    """Distance in tokens from which on all fall into the last bucket."""
    rotary_pct: Fraction = 1.0
    """Share of each head's width that is rotated."""
    rotary_emb_base: Positive = 10000.0
    """Base of the rotary frequencies."""
    attention_config: AttentionKinds = None
    """Kind of attention of every block: a list of as many names, or of pairs `[[names], times]`
    where `all` fills up the blocks that are left, as in `[[[global, local], all]]`. Names:
    `global`; `flash`, which is the same (the fastest kernel at hand is taken anyway); the
    block-sparse `local`, `sparse_fixed`, `sparse_variable`, `bigbird` and `bslongformer`, which
    are masks here: they save no time; `gmlp` and `amlp`, blocks that mix positions by a learned
    matrix instead (with one small head of attention in `amlp`). Default: `global` everywhere."""
    sparsity_config: SparsityConfig | None = None
    """Settings of the block-sparse kinds: `block` (16 tokens), `num_local_blocks` (4),
    `num_global_blocks` (1), `num_sliding_window_blocks` (3; 4 with `local`), `num_random_blocks`,
    `local_window_blocks` ([4]), `global_block_indices` ([0]), `global_block_end_indices`,
    `different_layout_per_head`, `num_different_global_patterns`."""
    sliding_window_width: Count | None = None
    """How many tokens before its own a token sees, as GPT-NeoX counts: one less than Mistral's
    `sliding_window` in transformers, which counts the token itself. Default: all."""
    use_qk_layernorm: bool = False
    """Normalise queries and keys by `norm` before they are rotated, each head by itself with one
    scale for all. (GPT-NeoX has one norm for both, over all heads of a rank together: what it
    computes depends on the layout.)"""
    reset_attention_mask: bool = False
    """Let no token see a document before its own. The token that ends a document still belongs
    to it."""
    reset_position_ids: bool = False
    """Let positions begin anew with every document. With `alibi`, `rpe` and `none`, which know
    distances at most, it takes `reset_attention_mask` to tell documents apart."""
    eod_token_id: NonNegativeInt | None = None
    """Token that ends a document, for the two above, `eod_mask_loss` and `fim_rate`. Default: the
    one that the data's `.meta.json` names."""
    activation: Activation = "gelu"
    """Activation of the MLP. `geglu`, `reglu`, `swiglu`, `glu` and `bilinear` are gated (two input
    projections); `gelu_tanh` is the tanh approximation that GPT-NeoX's `bias_gelu_fusion`
    computes."""
    gmlp_attn_dim: Count = 64
    """Width of the one head of attention in a block of the kind `amlp`."""
    intermediate_size: Count | None = None
    """Width of the MLP: the number of inputs of its output projection. Default: 4 × `hidden_size`;
    for a gated activation 8/3 × `hidden_size` rounded up to a multiple of `mlp_multiple_of` (or of
    256), which keeps the number of parameters. (GPT-NeoX divides the value given for a gated
    activation by three; here it is the width itself.)"""
    expansion_factor: Positive | None = None
    """`intermediate_size` as a multiple of `hidden_size`; not with a gated activation."""
    mlp_multiple_of: Count | None = None
    """The MLP's width is rounded up to a multiple of this."""
    gpt_j_residual: bool = False
    """Attention and MLP side by side on the same residual, not one after the other."""
    gpt_j_tied: bool = False
    """With `gpt_j_residual`: one norm for both, x + attention(n(x)) + MLP(n(x)), as in GPT-J.
    Without it there is nothing to tie, as in GPT-NeoX."""
    no_weight_tying: bool = False
    """Give the output projection weights of its own instead of the embedding's."""
    use_bias_in_attn_linear: bool = True
    """Bias in the projections of attention."""
    use_bias_in_mlp: bool = True
    """Bias in the projections of the MLP."""
    hidden_dropout: Dropout = 0.0
    """Dropout of the embedding and of every block's outputs."""
    attention_dropout: Dropout = 0.0
    """Dropout of attention weights."""
    init_method: InitMethod = "normal"
    """How weights start (except output projections)."""
    init_method_std: NonNegative = 0.02
    """Standard deviation of `normal` and `scaled_normal`."""
    output_layer_init_method: InitMethod = "scaled_normal"
    """How the output projections of attention and MLP start."""
    use_mup: bool = False
    """Maximal update parametrisation (Yang et al. 2022): learning rate and initialisation that are
    tuned on a narrow model hold for a wide one. See docs/model.md. GPT-NeoX reads the base model
    from a file of shapes, here `mup_base_hidden_size` says it."""
    mup_base_hidden_size: Count | None = None
    """`hidden_size` of the base model of `use_mup`, whose learning rate and initialisation hold."""
    mup_init_scale: Positive = 1.0
    """`use_mup`: all drawn weights are multiplied with it."""
    mup_attn_temp: Positive = 1.0
    """`use_mup`: attention's scores are divided by it, beside the size of a head (not its root)."""
    mup_output_temp: Positive = 1.0
    """`use_mup`: logits are divided by it, beside the multiple of the base model's width."""
    mup_embedding_mult: Positive = 1.0
    """`use_mup`: embedded tokens are multiplied with it."""
    mup_rp_embedding_mult: Positive = 1.0
    """`use_mup`: the vectors of `learned` and `sinusoidal` positions are multiplied with it."""
    soft_prompt_tuning: SoftPromptConfig | None = None
    """Prompt tuning (Lester et al. 2021): `enabled: true` trains `n_tokens` (10; also
    `num_tokens`) vectors that stand before the tokens, and nothing else; they start as the
    embedding of `init_string`, or uniformly within `init_range` (0.5). With `finetune: true` and
    `load` they are tuned for the checkpoint's model. Not in a pipeline, under ZeRO 3 or with
    `sequence_parallel`."""
    moe_num_experts: NonNegativeInt = 1
    """Mixture of experts: MLPs of which each token goes through a few, in the place of one. 0 and
    1 mean a plain MLP. No token is dropped. See docs/model.md."""
    moe_expert_interval: Count = 1
    """Every so many blocks one has experts: blocks 0, n, 2 n, …"""
    moe_top_k: Count = 1
    """Experts that a token goes to."""
    moe_router_type: Literal["sinkhorn", "topk"] = "sinkhorn"
    """How experts are chosen: the likeliest (`topk`), or in training the likeliest after chances
    were scaled so that a sequence asks all experts for as much (`sinkhorn`)."""
    moe_normalize_expert_weights: bool = False
    """Let a token's weights of its experts sum to 1, as in Mixtral. (GPT-NeoX cannot.)"""
    moe_jitter_eps: Dropout | None = None
    """In training the router's input is multiplied with noise from [1 − ε, 1 + ε], a function of
    seed, step and token. (GPT-NeoX has it with `topk` alone.)"""
    moe_loss_coeff: NonNegative | None = None
    """Factor of the loss that balances experts, E · Σ f P for every block (Switch Transformer),
    taken by sequence. It is trained on and is in no domain's loss. Default: 0.01 with `topk`, 0
    with `sinkhorn`, which balances by itself. (GPT-NeoX today has none.)"""
    moe_z_loss_coeff: NonNegative = 0.0
    """Factor of the router's z-loss, the mean of log² Σ exp logit (ST-MoE); likewise."""
    moe_lbl_in_fp32: bool = False
    """Take the balancing loss in fp32 where the model computes in half precision."""
    lora: LoraConfig | None = None
    """LoRA (Hu et al. 2022): beside the layers named in `targets` (`query_key_value` and `dense`)
    updates of rank `rank` (8), times `alpha` (32) / rank, are trained, and nothing else. With
    `finetune: true` and `load` they adapt the checkpoint's model; tools/convert_checkpoint.py
    exports the model with its updates added to its weights."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    checkpoint_num_layers: Count = 1
    """Number of blocks that are recomputed as one."""
    checkpoint_in_cpu: bool = False
    """Keep the inputs of recomputed blocks in the host's memory until backward."""

    @property
    def context_length(self) -> int:
        """``seq_length``, which a loaded group always has."""
        assert self.seq_length is not None
        return self.seq_length

    @property
    def gated(self) -> bool:
        """Whether the MLP's activation is gated."""
        return self.activation in GATED

    @property
    def mixers(self) -> list[str]:
        """Kinds of blocks among ``attention_config`` that mix positions by a learned matrix."""
        return sorted({*MIXERS} & set(self.attention_config or ()))

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def padded_vocab_size(self, tensor_size: int = 1) -> int:
        """Return the embedding's number of rows.

        Args:
            tensor_size: tensor-parallel size; every rank gets a multiple of
                ``make_vocab_size_divisible_by`` rows.

        Raises:
            ValueError: ``vocab_size`` is not known yet.
        """
        if self.vocab_size is None:
            raise ValueError("vocab_size is not known; the composition root fills it in")
        multiple = self.make_vocab_size_divisible_by * tensor_size
        return ceil(self.vocab_size / multiple) * multiple

    @model_validator(mode="after")
    def _complete(self) -> Self:
        heads, kv_heads = self.num_attention_heads, self.num_kv_heads or self.num_attention_heads
        if self.hidden_size % heads:
            raise invalid(
                "hidden_size",
                f"is not divisible by num_attention_heads ({heads})",
            )
        if heads % kv_heads:
            raise invalid("num_kv_heads", f"does not divide num_attention_heads ({heads})")
        rotated = int(self.head_size * self.rotary_pct)
        if self.pos_emb == "rotary" and (rotated < 2 or rotated % 2):
            raise invalid(
                "rotary_pct",
                f"rotates {rotated} of a head's {self.head_size} numbers "
                "(hidden_size / num_attention_heads × rotary_pct); it must be an even number "
                "of at least 2",
            )
        self._check_attention()
        check_mup(self)
        check_experts(self)
        length = self.seq_length or self.max_position_embeddings
        if length is None:
            raise invalid("seq_length", "required, and given in none of the files")
        longest = self.max_position_embeddings or length
        if length > longest:
            raise invalid("seq_length", f"is longer than max_position_embeddings ({longest})")
        filled = {
            "num_kv_heads": kv_heads,
            "seq_length": length,
            "max_position_embeddings": longest,
            "intermediate_size": self._mlp_width(),
            "use_bias_in_norms": self.use_bias_in_norms and self.norm == "layernorm",
            "soft_prompt_tuning": trained_prompt(self),
            "lora": trained_updates(self),
            "gpt_j_tied": self.gpt_j_tied and self.gpt_j_residual,
            "moe_loss_coeff": balance_coefficient(self),
        }
        self.__dict__.update(filled)
        return self

    def _check_attention(self) -> None:
        if self.rpe_max_distance <= self.rpe_num_buckets // 2:
            raise invalid(
                "rpe_max_distance",
                f"should be above half of rpe_num_buckets ({self.rpe_num_buckets}), whose first "
                "half holds one distance each",
            )
        distances = self.pos_emb in ("alibi", "rpe", "none")
        if self.reset_position_ids and distances and not self.reset_attention_mask:
            raise invalid(
                "reset_position_ids",
                f"does nothing by itself with pos_emb '{self.pos_emb}', which has no positions "
                "that could begin anew; set reset_attention_mask: true",
            )

    def _mlp_width(self) -> int:
        multiple = self.mlp_multiple_of or 1
        given, factor = self.intermediate_size, self.expansion_factor
        if factor is not None and self.gated:
            raise invalid(
                "expansion_factor",
                f"not with the gated activation '{self.activation}', whose width GPT-NeoX counts "
                "in another way; give intermediate_size, the width itself",
            )
        # A narrow model's own default is more than that, and must be understood when it is read.
        most = max(6 * self.hidden_size, GATED_MULTIPLE)
        if given is not None and self.gated and given > most:
            raise invalid(
                "intermediate_size",
                f"is more than 6 × hidden_size; GPT-NeoX divides this value by three under "
                f"'{self.activation}', here it is the width itself: did you mean {given // 3}?",
            )
        expanded = None if factor is None else max(1, int(min(factor, 1e9) * self.hidden_size))
        if given is not None and expanded is not None:
            if ceil(expanded / multiple) != ceil(given / multiple):
                raise invalid(
                    "expansion_factor",
                    f"contradicts intermediate_size ({given}); give one of the two",
                )
        elif given is None and expanded is None and self.gated:
            expanded, multiple = 8 * self.hidden_size // 3, self.mlp_multiple_of or GATED_MULTIPLE
        width = given or expanded or 4 * self.hidden_size
        return ceil(width / multiple) * multiple
