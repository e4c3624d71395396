"""Learning rates against the formulas, written out again."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron.engine.schedule import Schedule

LR, FLOOR, STEPS, WARM = 1e-3, 1e-4, 1000, 100.0


def rate(step: int, style: str, *, warmup: float = WARM, floor: float = FLOOR) -> float:
    return curve(style, warmup_steps=warmup, min_lr=floor).rate(step)


def curve(style: str, **changes: Any) -> Schedule:
    given = {"lr": LR, "min_lr": FLOOR, "warmup_steps": WARM, "decay_steps": STEPS, **changes}
    return Schedule(style=style, **given)


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


@pytest.mark.option("warmup")
def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert rate(1, "cosine", warmup=0.0) == LR


def test_a_warm_up_shorter_than_a_step_does_not_overshoot() -> None:
    assert rate(1, "linear", warmup=0.4) == LR


FORK = {
    "constant": lambda x: LR,
    "linear": lambda x: LR * (1 - x),
    "cosine": lambda x: LR / 2 * (1 + math.cos(math.pi * x)),
    "exponential": lambda x: LR * math.exp(-0.693 * x),
}


@pytest.mark.parametrize("style", list(FORK))
@pytest.mark.parametrize("position", [0, 1, 50, 100, 101, 500, 899, 900, 901, 999, 5000])
def test_the_fork_divides_by_all_steps_and_never_ends(style: str, position: int) -> None:
    reached = min(position, STEPS - WARM)
    if position <= WARM:
        expected = LR * reached / WARM
    else:
        expected = max(FORK[style]((reached - WARM) / STEPS), FLOOR)
    assert curve(style, formula="fork").rate(position + 1) == pytest.approx(expected, abs=1e-15)


def test_the_fork_decays_less_than_main() -> None:
    last = [curve("linear", min_lr=0.0, formula=name).rate(STEPS) for name in ("main", "fork")]
    assert last[0] < 0.01 * LR < 0.19 * LR < last[1]


@pytest.mark.parametrize("position", [0, 1, 50, 99, 100, 101, 550, 999, 1000, 1500])
def test_doremi_schedules_end_at_the_end_value(position: int) -> None:
    x = min((position - WARM) / (STEPS - WARM), 1.0)
    if position < WARM:
        cosine = exponential = 1e-7 + (LR - 1e-7) * position / WARM
    else:
        cosine = FLOOR + (LR - FLOOR) * (1 + math.cos(math.pi * x)) / 2
        gamma = math.exp(math.log(1e-10 / (LR - FLOOR)) / (STEPS - WARM))
        exponential = FLOOR + (LR - FLOOR) * gamma ** min(position - WARM, STEPS - WARM)
    assert rate(position + 1, "linear_warmup_cosine") == pytest.approx(cosine, rel=1e-12)
    assert rate(position + 1, "linear_warmup_exponential") == pytest.approx(exponential, rel=1e-9)


def test_doremi_exponential_without_a_decay_stays() -> None:
    flat = curve("linear_warmup_exponential", min_lr=LR)
    assert flat.rate(500) == flat.rate(1001) == LR


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("sqrt", lambda x: 1 - math.sqrt(x)),
    ],
)
def test_wsd_stays_and_then_cools(shape: str, left: Any) -> None:
    wsd = curve("wsd", wsd_decay_fraction=0.25, wsd_decay_shape=shape)
    assert wsd.rate(51) == pytest.approx(LR * 50 / WARM)
    assert [wsd.rate(step) for step in (101, 102, 500, 751)] == [LR] * 4
    for position in (751, 800, 875, 999):
        expected = FLOOR + (LR - FLOOR) * left((position - 750) / 250)
        assert wsd.rate(position + 1) == pytest.approx(expected)
    assert wsd.rate(1001) == wsd.rate(2000) == pytest.approx(FLOOR)


def test_wsd_cools_by_a_factor() -> None:
    wsd = curve("wsd", wsd_decay_fraction=0.5, wsd_decay_shape="exponential")
    assert wsd.rate(751) == pytest.approx(math.sqrt(LR * FLOOR))
    assert wsd.rate(1001) == pytest.approx(FLOOR)


def test_wsd_cools_after_the_warm_up_however_long_that_is() -> None:
    wsd = curve("wsd", warmup_steps=900.0, wsd_decay_fraction=0.5)
    assert wsd.rate(901) == LR
    assert wsd.rate(951) == pytest.approx((LR + FLOOR) / 2)


def test_inverse_sqrt_falls_with_the_root_of_the_step() -> None:
    assert rate(101, "inverse_sqrt") == LR
    assert rate(401, "inverse_sqrt") == pytest.approx(LR / 2)
    assert rate(1601, "inverse_sqrt") == pytest.approx(LR / 4)
    assert rate(10**6, "inverse_sqrt") == FLOOR
    assert rate(5, "inverse_sqrt", warmup=0.0) == pytest.approx(LR / 2)
