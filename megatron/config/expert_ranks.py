"""What goes with experts that data ranks share out, and what does not."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.config.config import Config
from megatron.config.draft import Draft


def check_expert_ranks(config: Config, draft: Draft) -> None:
    """Add a problem for every rule that is broken."""
    ranks, experts = config.parallel.moe_expert_parallel_size, config.model.moe_num_experts
    if ranks == 1:
        return
    for text in _hindrances(config):
        draft.refuse("parallel", "moe_expert_parallel_size", f"does not go with {text}")
    if experts <= 1:
        draft.refuse(
            "parallel",
            "moe_expert_parallel_size",
            "shares out experts, and there are none; set moe_num_experts, or use 1",
        )
    elif experts % ranks:
        draft.refuse(
            "parallel",
            "moe_expert_parallel_size",
            f"does not divide moe_num_experts ({experts}); use one that does",
        )


def _hindrances(config: Config) -> Iterator[str]:
    zero = config.zero_options
    types = config.deepspeed.get("data_types")
    wide = isinstance(types, dict) and types.get("grad_accum_dtype") == "fp32"
    if config.zero_stage == 3:
        yield (
            "ZeRO 3, which DeepSpeed divides among all data ranks alike; use "
            "zero_optimization: {stage: 2}, or moe_expert_parallel_size: 1"
        )
    if config.zero_stage == 0:
        yield "ZeRO stage 0 as deepspeed_extra_args forces it; use stage 1"
    if zero.get("reduce_scatter") is False or config.parallel.divides_before_sum:
        yield (
            "gradients that are summed whole (reduce_scatter: false, prescale_gradients, "
            "gradient_predivide_factor), which DeepSpeed does not know with experts; remove them"
        )
    if zero.get("contiguous_gradients") is False and config.zero_stage == 2:
        yield "contiguous_gradients: false, which DeepSpeed does not know with experts; remove it"
    if "offload_optimizer" in zero:
        yield "offload_optimizer; remove it, or use moe_expert_parallel_size: 1"
    if wide and config.precision == "bf16" and config.zero_stage == 1:
        yield (
            "grad_accum_dtype: fp32 in bf16 under stage 1, whose norm counts a bias of experts "
            "once for every tensor rank; use stage 2"
        )
    if config.optimizer.type == "sm3":
        yield "SM3, which knows one group of data ranks; use Adam, or moe_expert_parallel_size: 1"
    if config.model.soft_prompt_tuning is not None or config.model.lora is not None:
        yield "soft_prompt_tuning and lora, under which no expert is trained; use 1"
    if config.logging.log_gradient_noise_scale:
        yield (
            "log_gradient_noise_scale: a gradient of shared experts is not of one rank's "
            "micro-batch; use 1, or leave the noise scale out"
        )
