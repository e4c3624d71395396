"""The line through a domain's losses: against least squares, and where numbers get large."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.mixing.trend import Trend


def after(losses, tokens, memory=3.0):
    """Return the trend of one domain after some losses, each of so many tokens."""
    trend = Trend.empty(1)
    for loss, count in zip(losses, tokens, strict=True):
        trend = trend.add(np.array([loss]), np.array([float(count)]), memory)
    return trend


def weights_of(tokens, memory):
    """Return what each loss counts in the end, by the class's own words."""
    counts, total = [], 0.0
    for new in tokens:
        total += new
        fading = max(0.0, 1.0 - memory * new / total)
        counts = [fading * count for count in counts] + [float(new)]
    return np.array(counts)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    seen=st.lists(st.tuples(st.floats(0, 12), st.integers(1, 10**6)), min_size=3, max_size=40),
    memory=st.floats(1, 5),
)
def test_it_is_weighted_least_squares(seen, memory):
    losses, tokens = (np.array(column, dtype=float) for column in zip(*seen, strict=True))
    trend, weights = after(losses, tokens, memory), weights_of(tokens, memory)
    x = np.log(tokens.cumsum())
    middle = (weights @ x) / weights.sum()
    spread = weights @ (x - middle) ** 2 / weights.sum()
    assert trend.count[0] == pytest.approx(weights.sum(), rel=1e-9)
    if spread < 1e-6:  # one place, nearly: polyfit has no answer that it could be held to
        return
    slope, _ = np.polyfit(x - x[-1], losses, 1, w=np.sqrt(weights))
    level = (weights @ losses) / weights.sum() + slope * (x[-1] - middle)
    scale = 1.0 + 12.0 / np.sqrt(spread)
    assert trend.slope[0] == pytest.approx(-slope, abs=1e-9 * scale)
    assert trend.level[0] == pytest.approx(level, abs=1e-9 * scale)


@pytest.mark.parametrize("memory", [1.0, 3.0, 50.0])
def test_a_constant_loss_has_no_slope_at_all(memory):
    trend = Trend.empty(2)
    for step in range(200):
        tokens = np.array([4e6, 2048.0 if step else 1e12])
        trend = trend.add(np.array([3.14159, 2.71828]), tokens, memory)
    assert trend.slope.tolist() == [0.0, 0.0]
    assert trend.level.tolist() == [3.14159, 2.71828]


@pytest.mark.parametrize("start", [0.0, 1e9, 1e12])
def test_a_line_in_the_logarithm_is_found_however_much_was_read_before(start):
    """Small steps after 10^12 tokens differ in the ninth digit of their logarithm."""
    tokens = [start or 4e6, *[4e6] * 300]
    losses = 12.0 - 0.1 * np.log(np.cumsum(tokens))
    trend = after(losses, tokens)
    assert trend.slope[0] == pytest.approx(0.1, rel=1e-6)
    assert trend.level[0] == pytest.approx(losses[-1], rel=1e-9)


@pytest.mark.parametrize("memory", [3.0, 30.0])
@pytest.mark.parametrize("exponent", [0.1, 0.3, 0.6])
def test_of_a_power_law_the_slope_tells_the_exponent(exponent, memory):
    """L = c + b n^-a falls by a (L - c) per e-fold.

    A token v e-folds ago counts as exp(-(memory + 1) v), for which the integrals of least squares
    give a slope over the level's excess of a (memory + 1) / (memory + 1 - 2 a).
    """
    tokens = np.full(3000, 2048.0)
    losses = 1.5 + 40.0 * np.cumsum(tokens) ** -exponent
    trend = after(losses, tokens, memory)
    ratio = exponent * (memory + 1) / (memory + 1 - 2 * exponent)
    assert trend.slope[0] / (trend.level[0] - 1.5) == pytest.approx(ratio, rel=0.005)


def test_what_is_not_there_does_not_count():
    both, alone = Trend.empty(2), Trend.empty(1)
    for step in range(1, 20):
        loss, tokens = 5.0 / step, float(step % 3)
        both = both.add(np.array([loss, np.nan]), np.array([tokens, 0.0]), 3.0)
        alone = alone.add(np.array([loss]), np.array([tokens]), 3.0)
    assert both.known.tolist() == [True, False]
    assert both.slope.tolist() == [alone.slope[0], 0.0]
    assert both.level[0] == alone.level[0]
    assert np.isnan(both.level[1])


def test_one_place_has_no_slope():
    trend = after([4.0], [100])
    assert trend.slope[0] == 0.0
    assert trend.level[0] == 4.0
    # What more than doubles the data lets all before it fade, so that there is one place again.
    trend = after([4.0, 3.0], [100, 1000])
    assert trend.slope[0] == 0.0
    assert trend.level[0] == 3.0


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    seen=st.lists(
        st.tuples(
            st.sampled_from([0.0, 5e-324, -3.0, 1e150, 1.7e308, -1.7e308]), st.integers(1, 10**15)
        ),
        min_size=1,
        max_size=20,
    )
)
def test_it_stays_finite(seen):
    trend = after(*zip(*seen, strict=True))
    for vector in (trend.slope, trend.level, *vars(trend).values()):
        assert np.isfinite(vector).all()


def test_the_state_brings_back_every_bit():
    trend = after([4.0, 3.5, 3.3, 3.2], [10, 10, 7, 3])
    state = json.loads(json.dumps(trend.state_dict(lambda vector: {"a": float(vector[0])})))
    again = Trend.from_state(state, lambda by_name: np.array([by_name["a"]]))
    for name, vector in vars(trend).items():
        assert vector.tobytes() == getattr(again, name).tobytes()
