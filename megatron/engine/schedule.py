"""Learning-rate schedules as pure functions of the step.

A step's rate depends on nothing but its number, so a resumed run needs no scheduler state.
The position of a step in a schedule is the number of steps before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_DOREMI_START = 1e-7
_DOREMI_REST = 1e-10


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up and decay of the learning rate.

    Attributes:
        lr: peak learning rate.
        min_lr: rate at the end of the decay, and its floor.
        style: ``constant``, ``linear``, ``cosine``, ``exponential``, ``linear_warmup_cosine``,
            ``linear_warmup_exponential``, ``wsd`` or ``inverse_sqrt``.
        formula: whose formulas the first four follow: ``main`` (GPT-NeoX's main branch) or
            ``fork`` (its online-data-mixing fork).
        warmup_steps: length of the linear warm-up in steps (a fraction is kept).
        decay_steps: step at which the decay ends, counted from the start of the run.
        wsd_decay_fraction: share of ``decay_steps`` that is decay under ``wsd``.
        wsd_decay_shape: ``linear``, ``cosine``, ``sqrt`` or ``exponential``.
    """

    lr: float
    min_lr: float
    style: str
    formula: str = "main"
    warmup_steps: float
    decay_steps: int
    wsd_decay_fraction: float = 0.2
    wsd_decay_shape: str = "linear"

    def rate(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step``, counted from 1.

        Raises:
            KeyError: the style is none of those (the configuration checks it first).
        """
        if self.formula == "fork":
            return _fork(self, step - 1)
        return _CURVES[self.style](self, step - 1)

    def betas(self, step: int) -> tuple[float, float] | None:
        """Return the optimizer's decay rates of a step; None leaves them as they are."""
        return None

    def progress(self, position: float, start: float) -> float:
        """Return how far a position is from ``start`` to the end of the decay, from 0 to 1."""
        span = max(self.decay_steps - start, 1.0)
        return min(max((position - start) / span, 0.0), 1.0)


def _linear(lr: float, min_lr: float, x: float) -> float:
    return lr * (1.0 - x)


def _cosine(lr: float, min_lr: float, x: float) -> float:
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * x))


def _halving(lr: float, min_lr: float, x: float) -> float:
    return lr * math.exp(-0.693 * x)


_DECAYS: dict[str, Callable[[float, float, float], float]] = {
    "constant": lambda lr, min_lr, x: lr,
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _halving,
}

# Each runs from lr to min_lr (Hu et al. 2024, section 4; Hägele et al. 2024 for the root).
_COOLING: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda lr, min_lr, x: min_lr + (lr - min_lr) * (1.0 - x),
    "cosine": _cosine,
    "sqrt": lambda lr, min_lr, x: min_lr + (lr - min_lr) * (1.0 - math.sqrt(x)),
    "exponential": lambda lr, min_lr, x: lr * (min_lr / lr) ** x,
}


def _warm(schedule: Schedule, position: int) -> float | None:
    """Return the rate of a warm-up step as GPT-NeoX's main branch has it; None after it.

    It asks its scheduler for the rate *after* a step, and takes max(1, n) for the first: the
    rate is never zero, so the first update is not lost.
    """
    warmup = schedule.warmup_steps
    if warmup <= 0 or position > warmup:
        return None
    return schedule.lr * min(1.0, max(1, position) / warmup)


def _main(schedule: Schedule, position: int) -> float:
    """Decay over what remains of ``decay_steps`` after the warm-up.

    Cosine ends at ``min_lr``; linear and exponential run towards 0 and lr/2 and are cut off.
    """
    if (rate := _warm(schedule, position)) is not None:
        return rate
    x = schedule.progress(position, schedule.warmup_steps)
    return max(_DECAYS[schedule.style](schedule.lr, schedule.min_lr, x), schedule.min_lr)


def _fork(schedule: Schedule, position: int) -> float:
    """Follow the fork: the decay is divided by all steps and so never reaches its end.

    Its first step has rate 0 where there is a warm-up, and its cosine runs towards 0.
    """
    warmup, end = schedule.warmup_steps, schedule.decay_steps
    reached = min(position, end - warmup)
    if warmup > 0 and position <= warmup:
        return schedule.lr * reached / warmup
    x = (reached - warmup) / end
    floor = 0.0 if schedule.style == "cosine" else schedule.min_lr
    return max(_DECAYS[schedule.style](schedule.lr, floor, x), schedule.min_lr)


def _doremi_warm(schedule: Schedule, position: int) -> float | None:
    """Return the rate of a warm-up step of DoReMi's schedules, which begins at 1e-7."""
    if position >= schedule.warmup_steps:
        return None
    start = min(_DOREMI_START, schedule.lr)
    return start + (schedule.lr - start) * position / schedule.warmup_steps


def _doremi_cosine(schedule: Schedule, position: int) -> float:
    """Follow DoReMi's and Aioli's ``linear_warmup_cosine``."""
    if (rate := _doremi_warm(schedule, position)) is not None:
        return rate
    x = schedule.progress(position, schedule.warmup_steps)
    return _cosine(schedule.lr, schedule.min_lr, x)


def _doremi_exponential(schedule: Schedule, position: int) -> float:
    """Follow DoReMi's ``linear_warmup_exponential``, as it is meant.

    What is above ``min_lr`` shrinks by one factor a step, down to 1e-10 at the end.  (The released
    code exchanges that factor and the rate, and falls to the end value at once.)
    """
    if (rate := _doremi_warm(schedule, position)) is not None:
        return rate
    above = schedule.lr - schedule.min_lr
    if above <= _DOREMI_REST:
        return schedule.min_lr + max(above, 0.0)
    x = schedule.progress(position, schedule.warmup_steps)
    return schedule.min_lr + above * math.exp(x * math.log(_DOREMI_REST / above))


def _wsd(schedule: Schedule, position: int) -> float:
    """Warm up, stay, and decay over the last steps (Hu et al. 2024)."""
    if (rate := _warm(schedule, position)) is not None:
        return rate
    start = schedule.decay_steps * (1.0 - schedule.wsd_decay_fraction)
    x = schedule.progress(position, max(start, schedule.warmup_steps))
    return _COOLING[schedule.wsd_decay_shape](schedule.lr, schedule.min_lr, x)


def _inverse_sqrt(schedule: Schedule, position: int) -> float:
    """Fall with the root of the step (Vaswani et al. 2017, equation 3), from the warm-up's end."""
    if (rate := _warm(schedule, position)) is not None:
        return rate
    warmup = max(schedule.warmup_steps, 1.0)
    return max(schedule.lr * math.sqrt(warmup / max(position, warmup)), schedule.min_lr)


_CURVES: dict[str, Callable[[Schedule, int], float]] = {
    **dict.fromkeys(_DECAYS, _main),
    "linear_warmup_cosine": _doremi_cosine,
    "linear_warmup_exponential": _doremi_exponential,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}
