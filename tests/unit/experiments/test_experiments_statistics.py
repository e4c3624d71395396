"""Statistics of comparisons, against scipy's and against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from megatron.errors import ConfigError
from megatron.experiments.statistics import (
    bootstrap_interval,
    compare_paired,
    holm,
    oracle_of_sweep,
    paired_power,
    regret,
    seeds_needed,
    t_interval,
)


@pytest.mark.parametrize("seeds", [2, 5, 12])
def test_differences_are_scipys(seeds):
    random = np.random.default_rng(seeds)
    baseline = random.normal(3, 0.1, seeds)
    methods = {name: baseline + random.normal(-0.03, 0.05, seeds) for name in "abcd"}
    found = compare_paired(methods, baseline, confidence=0.9)
    for name, losses in methods.items():
        one, expected = found[name], stats.ttest_rel(losses, baseline)
        assert one.t == pytest.approx(expected.statistic)
        assert one.p == pytest.approx(expected.pvalue)
        interval = expected.confidence_interval(0.9)
        assert one.interval == pytest.approx((interval.low, interval.high))
        assert one.wins == (losses < baseline).sum()
        assert one.losses == (losses > baseline).sum()
        assert one.sd == pytest.approx((losses - baseline).std(ddof=1))
    corrected = holm({name: one.p for name, one in found.items()})
    assert {name: one.p_holm for name, one in found.items()} == corrected


def test_bootstrap_is_scipys():
    values = np.random.default_rng(0).gamma(2.0, size=15)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    found = bootstrap_interval(values, resamples=20_000, seed=2)
    assert found == pytest.approx((expected.low, expected.high), abs=0.02 * np.ptp(expected))
    assert found == bootstrap_interval(values, resamples=20_000, seed=2)
    one = compare_paired({"a": values}, np.zeros(15), resamples=20_000, seed=2)["a"]
    assert one.bootstrap == found == one.bootstrap_holm  # alone, nothing is corrected
    assert one.interval == one.interval_holm == t_interval(values)
    assert one.p == one.p_holm


def test_holm_by_hand():
    given = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    expected = {"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06}
    assert holm(given) == pytest.approx(expected)
    assert list(holm(given)) == list(given)
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def closed_testing(p_values):
    """Holm is the closed test with Bonferroni: the largest over all sets that hold the name."""
    names = list(p_values)
    subsets = [
        subset
        for size in range(1, len(names) + 1)
        for subset in itertools.combinations(names, size)
    ]
    return {
        name: max(
            min(1.0, len(subset) * min(p_values[other] for other in subset))
            for subset in subsets
            if name in subset
        )
        for name in names
    }


def test_holm_is_the_closed_test():
    random = np.random.default_rng(4)
    for _ in range(50):
        given = {name: float(random.uniform(0, 0.2)) for name in "abcde"}
        assert holm(given) == pytest.approx(closed_testing(given))


def test_corrected_intervals_leave_out_zero_exactly_if_holm_rejects():
    random = np.random.default_rng(5)
    seen = set()
    for _ in range(200):
        baseline = random.normal(3, 0.1, 6)
        methods = {name: baseline + random.normal(-0.06, 0.05, 6) for name in "abcd"}
        for one in compare_paired(methods, baseline, resamples=10).values():
            low, high = one.interval_holm
            rejected = one.p_holm <= 0.05
            assert rejected == (low > 0 or high < 0)
            assert low <= one.interval[0]
            assert high >= one.interval[1]
            seen.add((rejected, one.p <= 0.05))
    assert seen == {(True, True), (False, True), (False, False)}


def test_methods_that_do_not_differ():
    losses = np.array([3.0, 3.1, 2.9])
    found = compare_paired({"same": losses, "shifted": losses - 0.5}, losses)
    same, shifted = found["same"], found["shifted"]
    assert (same.mean, same.t, same.p, same.interval) == (0.0, 0.0, 1.0, (0.0, 0.0))
    assert (same.wins, same.losses) == (0, 0)
    assert shifted.p < 1e-6
    assert shifted.wins == 3


@pytest.mark.parametrize(
    ("method", "baseline", "message"),
    [
        ([3.0], [3.1], "two at least"),
        ([3.0, 3.1], [3.0, 3.1, 3.2], "the same seeds"),
        ([3.0, np.nan], [3.0, 3.1], "pair 1 has the losses nan and 3.1"),
    ],
)
def test_pairs_that_cannot_be_compared_are_refused(method, baseline, message):
    with pytest.raises(ConfigError, match=message):
        compare_paired({"a": np.array(method)}, np.array(baseline))


def test_power_is_what_simulation_finds():
    random = np.random.default_rng(6)
    for effect, seeds in ((1.0, 6), (2.0, 4), (0.0, 5)):
        draws = random.normal(effect, 1.0, (20_000, seeds))
        found = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05).mean()
        assert paired_power(effect, seeds) == pytest.approx(found, abs=0.012)
    draws = random.normal(50.0, 1.0, (100_000, 2))  # so large that scipy's tails underflow
    found = (stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.001).mean()
    assert paired_power(50.0, 2, alpha=0.001) == pytest.approx(found, abs=0.005)
    assert paired_power(-1.0, 6) == paired_power(1.0, 6)


def test_seeds_needed():
    # Effects of 1, 2 and 3 standard deviations, 80 % power, two-sided 5 %.
    assert [seeds_needed(effect) for effect in (1, 2, 3)] == [10, 5, 4]
    for effect in (0.2, 0.5, 1.3, -2.0, 50.0):
        seeds = seeds_needed(effect)
        assert paired_power(effect, seeds) >= 0.8
        assert seeds == 2 or paired_power(effect, seeds - 1) < 0.8
    assert seeds_needed(1.0, alpha=0.05 / 8) > seeds_needed(1.0)
    with pytest.raises(ConfigError, match="not 0"):
        seeds_needed(0.0)
    with pytest.raises(ConfigError, match="needs >"):
        seeds_needed(1e-4)


def test_regret_to_the_oracle_of_a_sweep():
    sweep = np.array([[3.0, 3.2], [2.9, 2.8], [2.7, 3.1]])
    assert oracle_of_sweep(sweep) == 1
    uniform = np.array([3.0, 3.1, 2.9])
    oracle = uniform - np.array([0.2, 0.2, 0.2])
    found = regret(uniform - np.array([0.05, 0.15, 0.1]), oracle, uniform)
    assert found.mean == pytest.approx(0.1)
    assert found.interval == pytest.approx(t_interval(np.array([0.15, 0.05, 0.1])))
    assert found.recovered == pytest.approx(0.5)
    assert np.isnan(regret(uniform, uniform, uniform).recovered)
    with pytest.raises(ConfigError, match="finite"):
        oracle_of_sweep(np.array([[1.0, np.nan]]))
