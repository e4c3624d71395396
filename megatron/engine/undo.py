"""Updates that are left out once their gradients are there, and steps that are taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.engine.engine import TrainEngine
from megatron.engine.fragments import is_stage_3


def ask_before_update(engine: TrainEngine, accept: Callable[[], bool]) -> None:
    """Ask before each update whether it is wanted; where it is not, weights and moments stay.

    Args:
        engine: with ZeRO 1 to 3.
        accept: called once a step on every rank, after the last backward pass; may be
            collective, and has to say the same everywhere.
    """
    optimizer = engine.optimizer
    update = optimizer.step

    def step(*arguments: Any, **named: Any) -> Any:
        if accept():
            return update(*arguments, **named)
        _drop_gradients(optimizer)
        if engine._skip is not None:
            engine._skip.flag = None  # it is of the step before
        return None

    optimizer.step = step


def _drop_gradients(optimizer: Any) -> None:
    """Do what DeepSpeed does with the gradients of a step that overflowed."""
    if is_stage_3(optimizer):
        optimizer._overflow_clean_up(optimizer.loss_scale)
    else:
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
        else:
            for key in optimizer.averaged_gradients:
                optimizer.averaged_gradients[key] = None
                optimizer.all_grad_tensors[key] = None
    optimizer._global_grad_norm = None


def count_on_from(engine: TrainEngine, step: int) -> None:
    """Let DeepSpeed count from ``step`` on, whatever a checkpoint that was loaded says."""
    engine._engine.global_steps = step
