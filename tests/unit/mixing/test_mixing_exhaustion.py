"""When data runs out: the forecast, and what is said of it, once each."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.mixing.exhaustion import ExhaustionWatch, exhaustion_forecast


def forecast(seen, unique, weights, *, batch=10, step=0):
    return exhaustion_forecast(
        seen=np.array(seen, dtype=float),
        unique=np.array(unique, dtype=float),
        weights=np.array(weights, dtype=float),
        samples_per_step=batch,
        step=step,
    ).tolist()


def test_a_pass_ends_when_its_samples_are_drawn():
    assert forecast([0, 0, 0], [100, 101, 50], [0.5, 0.5, 0]) == [20, 21, np.inf]
    assert forecast([95, 0], [100, 1000], [0.1, 0.9], step=7) == [12, 119]
    # in its third pass, of which 20 samples are drawn
    assert forecast([220], [100], [1.0], step=22) == [30]


def test_a_whole_number_of_steps_survives_rounding():
    assert forecast([0.0], [3.0], [0.1], batch=3) == [10]
    assert forecast([30], [100], [1 / 7], step=21) == [70]


def test_an_end_at_this_very_sample_is_the_next_pass():
    assert forecast([100], [100], [1.0], step=10) == [20]


def watch(total=1000, unique=(500.0, 1e9), then="repeat"):
    return ExhaustionWatch(
        domains=["small", "large"], unique=unique, samples_per_step=10, total_steps=total,
        on_exhausted=then,
    )  # fmt: skip


def drive(watch, weights_at, steps=1000, start=0, seen=(0.0, 0.0)):
    said, seen = [], np.array(seen)
    for step in range(start, steps + 1):
        weights = np.array(weights_at(step))
        said += [(step, text) for text in watch.messages(step=step, seen=seen, weights=weights)]
        seen = seen + weights * 10
    return said


def test_each_is_said_once_and_long_before():
    said = drive(watch(), lambda step: [0.0625, 0.9375])
    assert [step for step, _ in said] == [0, 700, 800]
    assert "will end within this run" in said[0][1]
    assert "small (500 samples) at step 800 of 1000; a domain that" in said[0][1]
    assert "will end soon" in said[1][1]
    assert "read to the end by step 800: small (500 samples); a domain that" in said[2][1]
    assert not any("large" in text for _, text in said)


def test_what_is_due_for_several_domains_is_one_message():
    said = drive(watch(unique=(500.0, 400.0)), lambda step: [0.0625, 0.0625], steps=0)
    assert len(said) == 1
    assert "small (500 samples) at step 800, large (400 samples) at step 640 of 1000" in said[0][1]


def test_a_forecast_that_moves_does_not_repeat_itself():
    said = drive(watch(), lambda step: [0.06 if step % 2 else 0.02, 0.9])
    assert len(said) <= 3
    assert len({text for _, text in said}) == len(said)


def test_nothing_is_said_of_what_lasts():
    assert drive(watch(unique=(1e6, 1e9)), lambda step: [0.5, 0.5]) == []
    assert drive(watch(), lambda step: [0.0, 1.0]) == []


def test_a_sudden_end_is_said_at_once_as_what_it_is():
    said = drive(watch(), lambda step: [0.0, 1.0] if step < 600 else [1.0, 0.0])
    assert [step for step, _ in said] == [600, 650]
    assert "will end soon" in said[0][1]


def test_a_resumed_run_does_not_speak_of_what_is_over():
    assert drive(watch(), lambda step: [0.05, 0.95], start=900, seen=(500, 8500)) == []


@pytest.mark.parametrize(
    ("then", "words"), [("stop", "stops with the first"), ("drop", "ended is left out")]
)
def test_it_says_what_happens_then(then, words):
    assert words in drive(watch(then=then), lambda step: [0.0625, 0.9375])[0][1]


def test_what_is_left_out_with_a_rest_that_fills_no_draw_is_told_of():
    watch = ExhaustionWatch(
        domains=["small", "large"], unique=(55.0, 1e9), samples_per_step=10, total_steps=100,
        on_exhausted="drop", unit=10,
    )  # fmt: skip
    said = drive(watch, lambda step: [1.0, 0.0] if step < 5 else [0.0, 1.0], steps=100)
    assert said[-1][0] == 5
    assert "by step 5: small (55 samples, of which the last 5 fill no draw)" in said[-1][1]
    assert "is left out" in said[-1][1]


def test_a_probe_forecasts_nothing_but_an_end_in_it_is_told():
    one = watch()
    for step, seen in ((1, 10.0), (2, 400.0)):
        assert one.messages(step=step, seen=np.array([seen, 0.0]), weights=None) == []
    (text,) = one.messages(step=3, seen=np.array([500.0, 0.0]), weights=None)
    assert "read to the end by step 3" in text
