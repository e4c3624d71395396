"""Rules about how ranks, stages and the optimizer share a model out."""

from __future__ import annotations

import re

from megatron.config.config import Config
from megatron.config.draft import Draft
from megatron.config.expert_ranks import check_expert_ranks


def check_layout(config: Config, draft: Draft) -> None:
    """Add a problem for every rule that is broken."""
    _check_tensor_ranks(config, draft)
    _check_mixers(config, draft)
    check_expert_ranks(config, draft)
    _check_prompt(config, draft)
    _check_lora(config, draft)
    _check_mup(config, draft)
    _check_pipeline(config, draft)
    _check_offload(config, draft)
    _check_optimizer(config, draft)
    _check_statistics(config, draft)
    _check_extra(config, draft)


def _check_tensor_ranks(config: Config, draft: Draft) -> None:
    """Whatever tensor ranks divide can be divided."""
    ranks, model = config.parallel.model_parallel_size, config.model
    divided = [
        ("num_attention_heads", model.num_attention_heads),
        ("num_kv_heads", model.num_kv_heads),
        ("intermediate_size", model.intermediate_size),
    ]
    if config.parallel.sequence_parallel:
        divided.append(("seq_length", model.seq_length))
    for name, value in divided:
        if value is not None and value % ranks:
            draft.refuse(
                "parallel",
                "model_parallel_size",
                f"does not divide {name} ({value}); use one that does, or change {name}",
            )


def _check_mixers(config: Config, draft: Draft) -> None:
    """Blocks that mix positions by a matrix of their own are whole on every tensor rank."""
    kinds = config.model.mixers
    if kinds and config.parallel.model_parallel_size > 1:
        draft.refuse(
            "parallel",
            "model_parallel_size",
            f"is above 1 with {' and '.join(kinds)} in attention_config, whose blocks are "
            "not divided among tensor ranks; use 1 (data ranks, ZeRO and pipelines work)",
        )


def _check_prompt(config: Config, draft: Draft) -> None:
    """Where a prompt alone is trained every rank must hold it, and it must be whole."""
    prompt = config.model.soft_prompt_tuning
    if prompt is None:
        return
    for hindered, text in (
        (config.parallel.stages > 1, "a pipeline: only its first stage would train; use 1 stage"),
        (config.zero_stage == 3, "ZeRO 3, which divides what is frozen too; use stage 2"),
        (config.parallel.sequence_parallel, "sequence_parallel: the prompt is not divided"),
    ):
        if hindered:
            draft.refuse("model", "soft_prompt_tuning", f"does not go with {text}")
    if prompt.init_string and config.tokenizer.tokenizer_type is None:
        draft.refuse(
            "model",
            "soft_prompt_tuning",
            "init_string needs a tokenizer; set tokenizer_type and vocab_file",
        )


def _check_lora(config: Config, draft: Draft) -> None:
    """What is frozen is whole on its ranks."""
    if config.model.lora is not None and config.zero_stage == 3:
        text = "does not go with ZeRO 3, which divides what is frozen too; use stage 2"
        draft.refuse("model", "lora", text)


def _check_mup(config: Config, draft: Draft) -> None:
    """Rates by width are known for Adam's kind, and every stage has all groups of parameters."""
    if not config.model.use_mup:
        return
    if config.optimizer.type not in ("adamw", "adam", "adam8bit", "lion"):
        draft.refuse(
            "model",
            "use_mup",
            f"scales learning rates as Adam wants it, not {config.optimizer.type}; use Adam",
        )
    if config.parallel.stages > 2:
        draft.refuse(
            "model",
            "use_mup",
            "goes with at most 2 stages of a pipeline: those between the ends have no embedding, "
            "whose learning rate is one of its own; use pipe_parallel_size: 2",
        )


def _check_pipeline(config: Config, draft: Draft) -> None:
    """A pipeline has a layer for every stage, and ZeRO leaves its gradients whole."""
    stages = config.parallel.stages
    method = config.parallel.pipe_partition_method
    if not _is_partition_method(method):
        draft.refuse(
            "parallel",
            "pipe_partition_method",
            "should be 'parameters', 'uniform' or 'type:REGEX', such as type:transformer",
        )
    if stages == 1:
        return
    if stages > config.model.num_layers:
        draft.refuse(
            "parallel",
            "pipe_parallel_size",
            f"is above num_layers ({config.model.num_layers}); every stage needs a block",
        )
    if config.zero_stage > 1:
        draft.refuse(
            "zero",
            "stage",
            f"is {config.zero_stage} with pipe_parallel_size {stages}: a pipeline keeps its "
            "gradients and weights whole; use zero_optimization: {stage: 1}, or no pipeline",
        )
    if config.zero_stage == 0:
        for hindered, what, remedy in (
            (config.gradient_clipping > 0, "clips by the first stage's norm alone", "clipping"),
            (config.precision == "bf16", "cannot reload bf16 weights", "bf16"),
        ):
            if hindered:
                draft.refuse_at(
                    draft.get("deepspeed", "zero_optimization"),
                    "deepspeed_extra_args.zero_optimization",
                    f"stage 0 is forced, under which DeepSpeed {what} in a pipeline; use stage 1, "
                    f"no {remedy} or no pipeline",
                )


def _is_partition_method(method: str) -> bool:
    name, _, pattern = method.partition(":")
    if name.lower() != "type":
        return method.lower() in ("parameters", "uniform")
    try:
        re.compile(pattern)
    except re.error:
        return False
    return bool(pattern)


def _check_offload(config: Config, draft: Draft) -> None:
    """Parameters can be kept on the host only where they are divided."""
    if "offload_param" in config.zero.options and config.zero_stage != 3:
        draft.refuse_at(
            draft.get("zero", "options"),
            "zero_optimization",
            f"offload_param belongs to stage 3, and the stage is "
            f"{config.zero_stage}; use stage: 3, or offload_optimizer alone",
        )


def _check_optimizer(config: Config, draft: Draft) -> None:
    """What looks at a parameter's shape, or on a device alone, finds both."""
    kind, offloaded = config.optimizer.type, "offload_optimizer" in config.zero_options
    if kind == "sm3" and (config.zero_stage not in (1, 2) or offloaded):
        where = "offload_optimizer" if offloaded else f"ZeRO stage {config.zero_stage}"
        draft.refuse(
            "optimizer",
            "type",
            f"SM3 keeps sums over whole rows and columns, which {where} leaves no room for; use "
            "zero_optimization: {stage: 1} or 2 without offload, or Adam",
        )
    if kind == "adam8bit" and offloaded:
        draft.refuse(
            "optimizer",
            "type",
            "8-bit state lives on a CUDA device; remove offload_optimizer, or use Adam",
        )


def _check_statistics(config: Config, draft: Draft) -> None:
    """What is measured of gradients can be, in this layout."""
    logging, tied = config.logging, not config.model.no_weight_tying
    if logging.log_gradient_noise_scale and config.parallel.stages > 1 and tied:
        draft.refuse(
            "logging",
            "log_gradient_noise_scale",
            "a pipeline's first and last stage each hold half of the tied weights' gradient, and "
            "add them up once a step only; use no_weight_tying: true, or no pipeline",
        )
    if config.zero_stage == 0:
        for key in logging.statistics_keys:
            draft.refuse("logging", key, "is read off ZeRO's flat parts; use stage 1, not 0")


def _check_extra(config: Config, draft: Draft) -> None:
    """DeepSpeed's own options do not contradict what the layout rests on."""
    pipeline = config.deepspeed.get("pipeline")
    if not config.parallel.sequence_parallel or not isinstance(pipeline, dict):
        return
    for key in ("pipe_partitioned", "grad_partitioned"):
        if pipeline.get(key):
            draft.refuse_at(
                draft.get("deepspeed", "pipeline"),
                "deepspeed_extra_args",
                f"{key} takes the activations of tensor ranks for "
                "copies of each other, which sequence_parallel makes untrue; remove one of the two",
            )
