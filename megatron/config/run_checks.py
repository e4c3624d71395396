"""Rules between groups about the loss, what is summed over ranks, and what is saved."""

from __future__ import annotations

from megatron.config.config import Config
from megatron.config.draft import Draft


def check_run(config: Config, draft: Draft) -> None:
    """Add a problem for every rule that is broken."""
    if config.training.fp16_lm_cross_entropy and config.precision != "fp16":
        draft.refuse(
            "training",
            "fp16_lm_cross_entropy",
            f"takes the softmax of fp16 logits, and precision is {config.precision}; use "
            "precision: fp16, or leave it out",
        )
    if config.model.checkpoint_in_cpu and not config.model.checkpoint_activations:
        draft.refuse(
            "model",
            "checkpoint_in_cpu",
            "keeps the inputs of recomputed blocks, and none is recomputed; set "
            "checkpoint_activations: true, or leave it out",
        )
    if config.checkpoint.no_save_optim and config.zero_stage == 3:
        draft.refuse(
            "checkpoint",
            "no_save_optim",
            "goes with ZeRO 1 and 2: under ZeRO 3 the weights are in the optimizer's files; use "
            "zero_optimization: {stage: 2}, or save whole checkpoints",
        )
    if config.training.char_level_ppl and config.tokenizer.tokenizer_type is None:
        draft.refuse(
            "training",
            "char_level_ppl",
            "needs tokenizer_type and vocab_file, to count the characters of a token",
        )
    _check_sums(config, draft)
    _check_compile(config, draft)


def _check_sums(config: Config, draft: Draft) -> None:
    """Where ranks receive parts of gradients, nothing divides them before."""
    parallel = config.parallel
    if parallel.divides_before_sum and config.zero_options.get("reduce_scatter"):
        name = "prescale_gradients" if parallel.prescale_gradients else "gradient_predivide_factor"
        draft.refuse(
            "parallel",
            name,
            "needs zero_optimization: {reduce_scatter: false}, under which gradients are summed "
            "whole; remove one of the two",
        )


def _check_compile(config: Config, draft: Draft) -> None:
    """A compiled block is one piece of arithmetic, of one shape."""
    if not config.training.torch_compile:
        return
    curriculum, profiler = config.data.curriculum_learning, config.logging.flops_profiler
    for hindered, text in (
        (
            config.model.moe_num_experts > 1,
            "moe_num_experts: how many tokens an expert gets is known only when they are there, "
            "so there is no fixed shape to compile; use one of the two",
        ),
        (
            config.zero_stage == 3,
            "ZeRO 3, which gathers weights between the layers of a block; use stage 2",
        ),
        (
            curriculum is not None and curriculum.enabled,
            "curriculum_learning: rows of every length would be compiled anew; use one of the two",
        ),
        (
            profiler is not None and profiler.enabled,
            "flops_profiler, which counts operations as torch runs them one by one; profile a "
            "run without it",
        ),
    ):
        if hindered:
            draft.refuse("training", "torch_compile", f"does not go with {text}")
