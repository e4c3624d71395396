"""The model: its sizes, its parts, and how its weights start."""

from __future__ import annotations

from math import ceil
from typing import Literal, Self

from pydantic import model_validator

from megatron.config.base import Count, Dropout, Fraction, Group, NonNegative, Positive, invalid

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
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation of every block and of the last hidden state."""
    layernorm_epsilon: Positive = 1e-5
    """Epsilon of `norm: layernorm`."""
    rms_norm_epsilon: Positive = 1e-8
    """Epsilon of `norm: rmsnorm`."""
    pos_emb: Literal["rotary", "none"] = "rotary"
    """Position encoding. (GPT-NeoX's own default is `learned`.)"""
    rotary_pct: Fraction = 1.0
    """Share of each head's width that is rotated."""
    rotary_emb_base: Positive = 10000.0
    """Base of the rotary frequencies."""
    activation: Activation = "gelu"
    """Activation of the MLP. `geglu`, `reglu`, `swiglu`, `glu` and `bilinear` are gated (two input
    projections); `gelu_tanh` is the tanh approximation that GPT-NeoX's `bias_gelu_fusion`
    computes."""
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
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    checkpoint_num_layers: Count = 1
    """Number of blocks that are recomputed as one."""

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
        }
        self.__dict__.update(filled)
        return self

    def _mlp_width(self) -> int:
        multiple = self.mlp_multiple_of or 1
        given, factor = self.intermediate_size, self.expansion_factor
        if factor is not None and self.gated:
            raise invalid(
                "expansion_factor",
                f"not with the gated activation '{self.activation}', whose width GPT-NeoX counts "
                "in another way; give intermediate_size, the width itself",
            )
        if given is not None and self.gated and given > 6 * self.hidden_size:
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
