"""Learning-rate schedules as pure functions of the step.

The curves are those of GPT-NeoX: linear warm-up over ``warmup * lr_decay_iters`` steps,
then the decay style over what remains of ``lr_decay_iters``, never below ``min_lr``.
(Cosine ends at ``min_lr``; linear and exponential run towards 0 and lr/2 and are cut off there.)
A step's rate depends on nothing but its number, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Callable

_DECAYS: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda lr, min_lr, x: lr,
    "linear": lambda lr, min_lr, x: lr * (1.0 - x),
    "cosine": lambda lr, min_lr, x: min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * x)),
    "exponential": lambda lr, min_lr, x: lr * math.exp(-0.693 * x),
}


def learning_rate(
    step: int,
    *,
    lr: float,
    min_lr: float,
    style: str,
    warmup_steps: float,
    decay_steps: int,
) -> float:
    """Return the learning rate of optimizer step ``step``.

    Args:
        step: optimizer step, counted from 1.
        lr: peak learning rate.
        min_lr: rate at the end of the decay, and its floor.
        style: ``constant``, ``linear``, ``cosine`` or ``exponential``.
        warmup_steps: length of the linear warm-up in steps (a fraction is kept, as in GPT-NeoX).
        decay_steps: step at which the decay ends, counted from the start of the run.

    Raises:
        KeyError: ``style`` is none of the four (the configuration checks it first).
    """
    # GPT-NeoX asks its scheduler for the rate *after* a step, and takes max(1, n) for the
    # first: rates at n = 0 are never zero, so the first update is not lost.
    position = step - 1
    if warmup_steps > 0 and position <= warmup_steps:
        return lr * min(1.0, max(1, position) / warmup_steps)
    span = max(decay_steps - warmup_steps, 1.0)
    x = min(max((position - warmup_steps) / span, 0.0), 1.0)
    return max(_DECAYS[style](lr, min_lr, x), min_lr)
