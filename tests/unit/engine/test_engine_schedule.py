"""Learning rates against the formulas, written out again."""

from __future__ import annotations

import math

import pytest

from megatron.engine.schedule import learning_rate

LR, FLOOR, STEPS, WARM = 1e-3, 1e-4, 1000, 100.0


def rate(step: int, style: str, *, warmup: float = WARM, floor: float = FLOOR) -> float:
    return learning_rate(
        step, lr=LR, min_lr=floor, style=style, warmup_steps=warmup, decay_steps=STEPS
    )


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "exponential"])
def test_warm_up_is_linear_and_never_zero(style: str) -> None:
    assert rate(1, style) == pytest.approx(LR / WARM)
    assert rate(51, style) == pytest.approx(LR * 50 / WARM)
    assert rate(101, style) == pytest.approx(LR)


@pytest.mark.parametrize("position", [101, 350, 700, 999, 1000, 1700])
def test_decay_follows_the_formula(position: int) -> None:
    x = (position - WARM) / (STEPS - WARM)
    inside = min(x, 1.0)
    step = position + 1
    assert rate(step, "linear") == pytest.approx(max(LR * (1 - inside), FLOOR))
    assert rate(step, "cosine") == pytest.approx(
        FLOOR + (LR - FLOOR) / 2 * (1 + math.cos(math.pi * inside))
    )
    assert rate(step, "exponential") == pytest.approx(max(LR * math.exp(-0.693 * inside), FLOOR))
    assert rate(step, "constant") == LR


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rate(1, "cosine", warmup=0.0) == LR


def test_a_warm_up_shorter_than_a_step_does_not_overshoot() -> None:
    assert rate(1, "linear", warmup=0.4) == LR
