"""What becomes of every key of GPT-NeoX and of its online-data-mixing fork.

A key is either a field of one of our groups (honoured), an alias of one, part of the data or
mixing keys that are mapped (see ``domains.py`` and ``sampling.py``), refused because it could
change results, or without effect because it only concerned speed or bookkeeping of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.config.node import same


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A key that could change results and is not offered.

    Attributes:
        instead: what to do instead.
        neutral: values that agree with what happens anyway.
        off: whether switching it off agrees too.
    """

    instead: str
    neutral: tuple[Any, ...] = ()
    off: bool = True

    def agrees(self, value: Any) -> bool:
        """Tell whether a value asks for nothing that is not done anyway."""
        agreed = any(same(value, neutral) for neutral in self.neutral)
        return agreed or value is None or (self.off and is_off(value))


def is_off(value: Any) -> bool:
    """Tell whether a value switches something off: null, false, empty, or ``enabled: false``."""
    if isinstance(value, dict):
        return not value or ("enabled" in value and is_off(value["enabled"]))
    return value is None or value is False or value in ("", [])


# key -> (group, field)
ALIASES: dict[str, tuple[str, str]] = {
    "lr": ("optimizer", "lr"),
    "weight_decay": ("optimizer", "weight_decay"),
    "gradient_clipping": ("optimizer", "gradient_clipping"),
    "clip_grad": ("optimizer", "gradient_clipping"),
    "decay_embeddings": ("optimizer", "decay_embeddings"),
    "lr_end": ("schedule", "min_lr"),
    "save_iters": ("checkpoint", "extra_save_iters"),
    "batch_size": ("batch", "train_micro_batch_size_per_gpu"),
    "gas": ("batch", "gradient_accumulation_steps"),
    "loss_scale": ("fp16", "loss_scale"),
    "zero_stage": ("zero", "stage"),
    "num_experts": ("model", "moe_num_experts"),
    "expert_interval": ("model", "moe_expert_interval"),
    "moe_aux_loss_coeff": ("model", "moe_loss_coeff"),
}

# key -> key of zero_optimization
ZERO_ALIASES = {
    "zero_reduce_scatter": "reduce_scatter",
    "zero_contiguous_gradients": "contiguous_gradients",
    "zero_reduce_bucket_size": "reduce_bucket_size",
    "zero_allgather_bucket_size": "allgather_bucket_size",
}

# key -> the launcher that it asks for when it is true
LAUNCHER_KEYS = {"deepspeed_mpi": "openmpi", "deepspeed_slurm": "slurm"}

# Keys that the mapping onto `domains:` and `mixing:` reads.
DATA_KEYS = frozenset(
    {
        "data_path",
        "train_data_paths",
        "valid_data_paths",
        "test_data_paths",
        "train_data_weights",
        "valid_data_weights",
        "test_data_weights",
        "train_label_data_paths",
        "valid_label_data_paths",
        "test_label_data_paths",
        "weight_by_num_documents",
        "weighted_sampler_alpha",
        "use_named_train_datasets",
        "use_named_eval_datasets",
    }
)
SAMPLING_KEYS = frozenset(
    {
        "data_sampling_method",
        "data_sampling_warmup_steps",
        "data_sampling_update_frequency",
        "data_sampling_smoothing_factor",
        "mixed_batches",
        "mixed_minibatches",
        "validation_based_reward",
        "batch_normalized_reward",
        "scale_by_reward_loss_diff",
    }
)

_NEXT_TO_TOKENS = "train on plain tokens: name the data under domains"
_PAIRS = Refusal(instead=f"reward and preference data are not offered; {_NEXT_TO_TOKENS}")
_RWKV = Refusal(instead="RWKV blocks are not offered; remove the key")
_TE = Refusal(instead="TransformerEngine layers are not offered; use precision: bf16")

REFUSED: dict[str, Refusal] = {
    # layout and launch
    "autotuning": Refusal(instead="autotuning is not offered; set the batch sizes yourself"),
    "autotuning_run": Refusal(instead="autotuning is not offered; set the batch sizes yourself"),
    # model
    "serve_model_weights": Refusal(instead="there is no weight server; remove the key"),
    "te_columnparallel": _TE,
    "te_rowparallel": _TE,
    "te_layernorm_mlp": _TE,
    "te_mha": _TE,
    "te_fp8_mha": _TE,
    "dim_att": _RWKV,
    "head_size": Refusal(instead="it is hidden_size / num_attention_heads; set those"),
    "ffn_dim": Refusal(instead="set intermediate_size, the width of the MLP"),
    # of versions of GPT-NeoX that had experts by DeepSpeed or Megablocks
    "moe_type": Refusal(
        instead="experts of one kind are offered, which drop no token (Megablocks'); remove the "
        "key",
        neutral=("megablocks",),
    ),
    "moe_token_dropping": Refusal(
        instead="no token is dropped, or else its result would depend on the batch; use false"
    ),
    "moe_use_residual": Refusal(
        instead="there is no plain MLP beside experts; use false, or moe_expert_interval: 2 for "
        "plain MLPs between them"
    ),
    "moe_glu": Refusal(instead="experts have the activation of the model; set a gated activation"),
    "coord_check": Refusal(instead="run tools/coord_check.py, which trains models of its own"),
    "save_base_shapes": Refusal(
        instead="no file of shapes is needed; set mup_base_hidden_size to the base model's width"
    ),
    # optimizer, schedule, numbers
    "sparse_attention": Refusal(
        instead="GPT-NeoX does not read DeepSpeed's block either; use attention_config and "
        "sparsity_config"
    ),
    "data_efficiency": Refusal(instead="data is chosen by mixing; see mixing: {method: …}"),
    "compression_training": Refusal(instead="compression is not offered; remove the block"),
    "elasticity": Refusal(
        instead="set the batch sizes; a run may be resumed on another number of ranks anyway"
    ),
    "checkpoint": Refusal(
        instead="checkpoints are written and verified in save; see save_interval"
    ),
    "deepspeed": Refusal(
        instead="GPT-NeoX itself stops without DeepSpeed, as every run here; remove the key",
        neutral=(True,),
        off=False,
    ),
    # data
    "dataset_impl": Refusal(instead=f"use gpt2: {_NEXT_TO_TOKENS}", neutral=("gpt2",)),
    "train_impl": Refusal(
        instead="preference training is not offered; use normal", neutral=("normal",)
    ),
    **{
        f"{side}{part}_{kind}_paths": _PAIRS
        for part in ("train", "valid", "test")
        for side, kind in (
            ("", "reward_data"),
            ("pos_", "data"),
            ("neg_", "data"),
            ("pos_", "label_data"),
            ("neg_", "label_data"),
        )
    },
    "precompute_model_name": Refusal(instead="there is no precomputation; remove the key"),
    # keys of published files that GPT-NeoX itself does not know
    "attention_type": Refusal(instead="set num_kv_heads, the number of key and value heads"),
    # checkpoints
    "s3_path": Refusal(instead="checkpoints are not sent to S3; copy the folder in save"),
}

_KERNELS = "the kernels are chosen automatically"
_LAUNCHER = "set by the launcher"
_DERIVED = "worked out from the other keys"
_UNUSED = "GPT-NeoX itself does not use it"
_PREFERENCE = "belongs to preference training"
_MUP_DETAIL = "the base model of µP is named by mup_base_hidden_size"

_WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    _KERNELS: (
        "layernorm_fusion",
        "rmsnorm_fusion",
        "scaled_upper_triang_masked_softmax_fusion",
        "scaled_masked_softmax_fusion",
        "bias_dropout_fusion",
        "rope_fusion",
        "use_flashattn_swiglu",
        "use_tutel",
        "fused_kernels_build_path",
        "mamba_selective_scan_fusion",
        "mamba_causal_conv_fusion",
        "mamba_inner_func_fusion",
    ),
    "belongs to a kind of layer that is not used": (
        "mamba_selective_fp32_params",
        "mamba_use_bias_in_conv",
        "mamba_use_bias_in_linears",
        "te_fp8_format",
        "te_fp8_wgrad",
        "te_fp8_amax_history_len",
        "te_fp8_amax_compute_algo",
        "te_fp8_margin",
    ),
    "experts drop no token, and so have no capacity": (
        "moe_min_capacity",
        "moe_train_capacity_factor",
        "moe_eval_capacity_factor",
    ),
    "tensor ranks always divide every expert; the numbers are the same": (
        "enable_expert_tensor_parallelism",
    ),
    "experts that data ranks share out have parameter groups of their own": (
        "create_moe_param_group",
    ),
    "the softmax of attention is always taken in fp32, so there is nothing to scale or widen": (
        "apply_query_key_layer_scaling",
        "attention_softmax_in_fp32",
    ),
    "worked out from pipe_parallel_size": ("is_pipe_parallel",),
    "the output layer is divided by columns; by rows it would compute the same": (
        "output_layer_parallelism",
    ),
    "weights are drawn on the CPU, the same on every layout": ("use_cpu_initialization",),
    "the rotary table is never part of a checkpoint": ("rotary_save_freqs_buffer",),
    "blocks are recomputed by torch; whose code does it changes no result": (
        "deepspeed_activation_checkpointing",
    ),
    "torch's allocator keeps what is saved; contiguous or not changes no result": (
        "contiguous_checkpointing",
    ),
    "sequence_parallel divides what tensor ranks keep": ("partition_activations",),
    "a measuring aid: wall_clock_breakdown takes times, profile traces backward": (
        "synchronize_each_layer",
        "profile_backward",
    ),
    _LAUNCHER: (
        "local_rank",
        "rank",
        "world_size",
        "lazy_mpu_init",
        "user_script",
        "global_num_gpus",
        "config_files",
    ),
    "a host that cannot be reached is named when the launcher fails": ("no_ssh_check",),
    "devices are taken in the order of the driver": ("detect_nvlink_pairs",),
    "NCCL on GPUs, gloo on CPUs": ("distributed_backend",),
    _DERIVED: (
        "do_train",
        "do_valid",
        "do_test",
        "dynamic_loss_scale",
        "git_hash",
        "padded_vocab_size",
    ),
    _UNUSED: (
        "param_sharing_style",
        "short_seq_prob",
        "deepscale",
        "deepscale_config",
        "adlr_autoresume_interval",
    ),
    "GPT-NeoX itself does not use it; the block fp16 has it as hysteresis": ("hysteresis",),
    "GPT-NeoX itself does not use it; the block fp16 has it as loss_scale_window": (
        "loss_scale_window",
    ),
    "GPT-NeoX itself does not use it; the block fp16 has it as min_loss_scale": ("min_scale",),
    "needs a module of one cluster that GPT-NeoX does not have; a stopped run goes on anyway": (
        "adlr_autoresume",
    ),
    "gelu is exact here as with it; nothing is exported to ONNX": ("onnx_safe",),
    "no random-number file decides a resume": ("no_save_rng", "no_load_rng"),
    "data is memory-mapped and read ahead; there is no index to build or share": (
        "use_shared_fs",
        "mmap_warmup",
        "num_workers",
    ),
    "the numbers are of the whole run; one rank sends them": ("wandb_init_all_ranks",),
    "GPT-NeoX sets it itself: the experiment that use_comet opens": ("comet_experiment",),
    "sums of squares are taken as gradients come by, and no gradient is kept": (
        "gradient_noise_scale_cpu_offload",
    ),
    "optimizers are handed to DeepSpeed as objects": ("zero_allow_untested_optimizer",),
    "DeepSpeed compresses no dense gradients of embeddings any more; results are the same": (
        "sparse_gradients",
    ),
    "GPT-NeoX sets it itself at every step of curriculum_learning": ("curriculum_seqlen",),
    _PREFERENCE: (
        "dpo_fp32",
        "dpo_reference_free",
        "dpo_beta",
        "kto_fp32",
        "kto_desirable_weight",
        "kto_undesirable_weight",
        "kto_beta",
        "fp32_reinforce",
        "kl_impl",
        "kl_div_beta",
        "reinforce_leave_one_out",
        "weight_server_port",
        "online_dataserver_ips",
        "online_dataserver_ports",
    ),
    _MUP_DETAIL: (
        "base_shapes_file",
        "mup_width_scale",
    ),
    "checkpoints are not sent to S3": ("s3_chunk_size",),
}

WITHOUT_EFFECT: dict[str, str] = {
    key: reason for reason, keys in _WITHOUT_EFFECT.items() for key in keys
}
