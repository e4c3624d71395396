"""Rules between groups about the loss, what is summed over ranks, and what is saved."""

from __future__ import annotations

from collections.abc import Callable

from megatron.config.config import Config

Add = Callable[[str, str, str], None]
"""Takes a group, a field of it and what is wrong."""


def check_run(config: Config, add: Add) -> None:
    """Report every rule that is broken.

    Args:
        config: the whole configuration.
        add: takes what is wrong.
    """
    if config.training.fp16_lm_cross_entropy and config.precision != "fp16":
        add(
            "training",
            "fp16_lm_cross_entropy",
            f"takes the softmax of fp16 logits, and precision is {config.precision}; use "
            "precision: fp16, or leave it out",
        )
    _check_sums(config, add)


def _check_sums(config: Config, add: Add) -> None:
    """Where ranks receive parts of gradients, nothing divides them before."""
    parallel = config.parallel
    if parallel.divides_before_sum and config.zero.options.get("reduce_scatter"):
        name = "prescale_gradients" if parallel.prescale_gradients else "gradient_predivide_factor"
        add(
            "parallel",
            name,
            "needs zero_optimization: {reduce_scatter: false}, under which gradients are summed "
            "whole; remove one of the two",
        )
