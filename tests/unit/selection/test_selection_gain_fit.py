"""The law of gains on generated runs: its numbers, their intervals, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.errors import DataError
from megatron.selection.gain_fit import FitOptions, fit_gain
from megatron.selection.gain_law import flops_for, gain

optimize = pytest.importorskip("scipy.optimize")
stats = pytest.importorskip("scipy.stats")

SHARES = np.repeat([0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0], 2)
SCORE, LOSS = np.array([0.4, 2.0, 0.6]), np.array([3.5, 3.0, 2.8])
TOTAL = 4.2e19


def drawn(law, seed, *, noise=0.008, shares=SHARES):
    return gain(shares, law, 1.0) + np.random.default_rng(seed).normal(0, noise, len(shares))


def fit(law, seed, **options):
    better = "higher" if law[2] > law[0] else "lower"
    return fit_gain(SHARES * TOTAL, drawn(law, seed), TOTAL, FitOptions(better=better, **options))


def test_the_law_is_what_the_paper_writes():
    start, rate, most = SCORE
    for flops in (0.0, 1e18, TOTAL):
        written = start + (most - start) * (1 - np.exp(-rate * flops / TOTAL))
        assert gain(flops, SCORE, TOTAL) == pytest.approx(written, abs=1e-15)
        assert flops_for(written, SCORE, TOTAL) == pytest.approx(flops, rel=1e-9)
    assert flops_for(0.61, SCORE, TOTAL) == np.inf
    assert flops_for(0.3, SCORE, TOTAL) == 0.0


@pytest.mark.parametrize("law", [SCORE, LOSS], ids=["score", "loss"])
@pytest.mark.parametrize("fixed", [False, True])
def test_known_numbers_are_recovered_without_noise(law, fixed):
    exact = gain(SHARES, law, 1.0) + np.random.default_rng(0).normal(0, 1e-9, len(SHARES))
    options = FitOptions(
        better="higher" if law[2] > law[0] else "lower", ceiling=law[2] if fixed else None
    )
    found = fit_gain(SHARES * TOTAL, exact, TOTAL, options)
    assert found.law == pytest.approx(law, rel=1e-6)
    assert found.fixed is fixed
    assert found.r2 > 0.999999


def test_it_is_the_published_fit_with_the_published_bounds():
    performance = drawn(SCORE, 3)
    theirs, covariance = optimize.curve_fit(
        lambda c, p0, rate: p0 + (0.6 - p0) * (1 - np.exp(-rate * c / TOTAL)),
        SHARES * TOTAL,
        performance,
        p0=[performance[0], 1.0],
        bounds=([0, 0], [1.0, np.inf]),
        maxfev=10_000,
    )
    ours = fit(SCORE, 3, ceiling=0.6, best=1.0)
    assert ours.law[:2] == pytest.approx(theirs, rel=1e-4)
    half = stats.t.ppf(0.975, len(SHARES) - 2) * np.sqrt(covariance[0, 0])
    assert ours.high[0] - ours.low[0] == pytest.approx(2 * half, rel=1e-3)


@pytest.mark.parametrize(
    ("law", "fixed", "intervals", "times"),
    [
        (SCORE, False, "covariance", 150),
        (SCORE, True, "covariance", 250),
        (LOSS, False, "covariance", 100),
        pytest.param(SCORE, True, "bootstrap", 150, marks=pytest.mark.slow),
    ],
)
def test_intervals_hold_the_truth_at_their_rate(law, fixed, intervals, times):
    held = np.zeros(3)
    for seed in range(times):
        found = fit(
            law,
            seed,
            ceiling=law[2] if fixed else None,
            intervals=intervals,
            confidence=0.9,
            replicates=60,
        )
        held += (found.low <= law) & (law <= found.high)
    # Within what so many draws leave open (three standard errors), and not just always.
    slack = 3 * np.sqrt(0.9 * 0.1 / times)
    numbers = held[: 2 if fixed else 3] / times
    assert (np.abs(numbers - 0.9) <= slack).all(), numbers


def test_draws_are_as_wide_as_the_intervals():
    for intervals in ("covariance", "bootstrap"):
        found = fit(SCORE, 1, ceiling=0.6, intervals=intervals, replicates=400)
        middle = np.quantile(found.draws, (0.025, 0.975), axis=0)
        assert middle[0][:2] == pytest.approx(found.low[:2], rel=0.15)
        assert middle[1][:2] == pytest.approx(found.high[:2], rel=0.15)
        assert (found.draws[:, 2] == 0.6).all()


@pytest.mark.parametrize(
    ("shares", "performance", "options", "match"),
    [
        ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], {}, "4 runs at 3 or more amounts"),
        ([0.5] * 6, [0.4, 0.41, 0.42, 0.43, 0.4, 0.41], {}, "6 runs at 1 amounts"),
        ([0.1, 0.2, 0.3, 0.4], [0.5] * 4, {}, "is 0.5 in all runs"),
        ([0.1, 0.2, 0.4, 0.8, 1], [0.6, 0.58, 0.55, 0.5, 0.49], {}, "does not rise"),
        ([0.1, 0.2, 0.4, 0.8, 1], [3.0, 3.1, 3.15, 3.2, 3.2], {"better": "lower"}, "not fall"),
        ([0.1, 0.2, 0.4, 0.8, 1.0, 0.6], [0.41, 0.42, 0.44, 0.48, 0.5, 0.46], {}, "straight line"),
        ([0.1, 0.2, 0.4, 0.8], [0.4, np.nan, 0.5, 0.6], {}, "must be finite"),
        ([0.1, 0.2, 0.4, 0.8], [0.4, 0.45, 0.5, 0.6], {"ceiling": 0.3}, "ceiling is 0.3"),
    ],
)
def test_runs_that_say_nothing_are_refused(shares, performance, options, match):
    with pytest.raises(DataError, match=match):
        fit_gain(np.array(shares), np.array(performance), 1.0, FitOptions(**options))


def test_runs_at_the_ceiling_leave_the_rate_open():
    performance = 0.6 + np.random.default_rng(0).normal(0, 1e-3, 6)
    shares = np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    with pytest.raises(DataError):
        fit_gain(shares, performance, 1.0, FitOptions(ceiling=0.6))
