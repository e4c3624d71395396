"""A model configuration for tests: what the model reads, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.model.spec import LoraSettings, SoftPrompt, Sparsity


@dataclass(frozen=True, kw_only=True)
class TestSpec:
    __test__ = False

    vocab_size: int = 97
    make_vocab_size_divisible_by: int = 8
    num_layers: int = 2
    hidden_size: int = 32
    num_attention_heads: int = 4
    num_kv_heads: int | None = None
    seq_length: int | None = 16
    norm: str = "layernorm"
    layernorm_epsilon: float = 1e-5
    rms_norm_epsilon: float = 1e-8
    rms_norm_epsilon_outside_root: bool = False
    scalenorm_epsilon: float = 1e-8
    use_bias_in_norms: bool = True
    pos_emb: str = "rotary"
    max_position_embeddings: int | None = None
    opt_pos_emb_offset: int = 0
    rpe_num_buckets: int = 32
    rpe_max_distance: int = 128
    attention_config: tuple[str, ...] | None = None
    sparsity_config: Sparsity | None = None
    sliding_window_width: int | None = None
    use_qk_layernorm: bool = False
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_token_id: int | None = None
    rotary_pct: float = 1.0
    rotary_emb_base: float = 10000.0
    activation: str = "gelu"
    gmlp_attn_dim: int = 64
    intermediate_size: int | None = None
    gpt_j_residual: bool = False
    gpt_j_tied: bool = False
    no_weight_tying: bool = False
    init_method: str = "normal"
    init_method_std: float = 0.02
    output_layer_init_method: str = "scaled_normal"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    use_bias_in_attn_linear: bool = True
    use_bias_in_mlp: bool = True
    use_mup: bool = False
    mup_base_hidden_size: int | None = None
    mup_init_scale: float = 1.0
    mup_attn_temp: float = 1.0
    mup_output_temp: float = 1.0
    mup_embedding_mult: float = 1.0
    mup_rp_embedding_mult: float = 1.0
    soft_prompt_tuning: SoftPrompt | None = None
    moe_num_experts: int = 1
    moe_expert_interval: int = 1
    moe_top_k: int = 1
    moe_router_type: str = "sinkhorn"
    moe_normalize_expert_weights: bool = False
    moe_jitter_eps: float | None = None
    moe_loss_coeff: float | None = None
    moe_z_loss_coeff: float = 0.0
    moe_lbl_in_fp32: bool = False
    lora: LoraSettings | None = None
    checkpoint_activations: bool = False
    checkpoint_num_layers: int = 1

    def padded_vocab_size(self, tensor_size: int = 1) -> int:
        unit = self.make_vocab_size_divisible_by * tensor_size
        return -(-self.vocab_size // unit) * unit
