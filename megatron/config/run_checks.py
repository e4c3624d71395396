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
