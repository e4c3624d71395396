"""Whether a layout can give the signals that a mixing method reads.  No torch in here."""

from __future__ import annotations

from collections.abc import Collection

from megatron.errors import ConfigError
from megatron.mixing.controller import Controller
from megatron.mixing.observation import Signal
from megatron.parallel.layout import Layout


def asked_ahead(controller: Controller, *, warmup_steps: int, update_every: int) -> set[Signal]:
    """Return the signals that a method wants of a step before it trains.

    Args:
        controller: before its first step.
        warmup_steps: of the method.
        update_every: of the method.
    """
    first = controller.step + warmup_steps
    update = (first // update_every + 1) * update_every
    return {signal for step in (first + 1, update) for signal in controller.decide(step).measure}


def check_signals(
    method: str,
    *,
    needs: Collection[Signal],
    ahead: Collection[Signal],
    layout: Layout,
    zero_stage: int,
) -> None:
    """Refuse a method whose signals the layout cannot give.

    Args:
        method: the method's name.
        needs: signals that it reads.
        ahead: those that it wants of a step before the step trains.
        layout: how the ranks are arranged.
        zero_stage: of DeepSpeed.

    Raises:
        ConfigError: with the reason and the remedy.
    """
    if Signal.GRADIENT_ALIGNMENT in needs:
        reason = "compares whole gradients of the model"
        if layout.pipe_size > 1:
            raise ConfigError(
                f"mixing.method: '{method}' {reason}, and pipe_parallel_size is "
                f"{layout.pipe_size}: each stage sees the gradient of its own layers alone, in a "
                f"schedule of its own; set pipe_parallel_size to 1 (model_parallel_size divides "
                f"the model too), or choose another method"
            )
        if zero_stage > 2:
            raise ConfigError(
                f"mixing.method: '{method}' {reason}, and zero_optimization.stage is "
                f"{zero_stage}, which divides the parameters among the data ranks; set the stage "
                f"to 2 or lower, or choose another method"
            )
        if layout.expert_size > 1:
            raise ConfigError(
                f"mixing.method: '{method}' {reason}, and moe_expert_parallel_size is "
                f"{layout.expert_size}, which divides the experts among the data ranks; set it "
                f"to 1, or choose another method"
            )
    if layout.pipe_size > 1 and set(ahead) & {Signal.LOSS, Signal.EXCESS_LOSS}:
        raise ConfigError(
            f"mixing.method: '{method}' with loss_lag 0 weighs a step by its own losses, which "
            f"takes a forward pass over the batch before the step, and pipe_parallel_size is "
            f"{layout.pipe_size}; set loss_lag to 1, which needs no such pass, or "
            f"pipe_parallel_size to 1"
        )
