"""The static law: recovery, held-out R², the optimum, and intervals that cover the truth."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.errors import ConfigError
from megatron.experiments.bounds import Bounds, free_bounds, make_bounds
from megatron.experiments.designs import dirichlet, grid, well_spread
from megatron.experiments.optimum import best_mixture
from megatron.experiments.scores import r_squared
from megatron.experiments.static_bootstrap import static_intervals
from megatron.experiments.static_law import StaticLaw, fit_static_law, held_out_r2


def some_law(domains, seed, measured=None):
    random = np.random.default_rng(seed)
    measured = measured or domains
    constant = random.uniform(0.5, 3.0, measured)
    if seed % 4 == 1:
        constant[0] = 0.0
    rate = random.normal(0, 0.4, (measured, domains))
    rate += np.eye(measured, domains) * random.uniform(0.5, 2.5, domains)
    return StaticLaw(constant=constant, rate=rate)


@pytest.mark.parametrize(("domains", "runs"), [(2, 8), (3, 16), (7, 40)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_constant_and_rates_are_recovered_without_noise(domains, runs, seed):
    law = some_law(domains, seed)
    mixtures = well_spread(free_bounds(domains), count=runs, seed=seed)
    fit = fit_static_law(mixtures, law.predict(mixtures))
    np.testing.assert_allclose(fit.law.constant, law.constant, atol=1e-6)
    np.testing.assert_allclose(fit.law.rate, law.rate, atol=1e-6)
    assert (fit.r2 > 0.999999).all()


def test_more_measured_domains_than_trained_ones():
    law = some_law(2, 4, measured=3)
    mixtures = grid(free_bounds(2), parts=8)
    fit = fit_static_law(mixtures, law.predict(mixtures))
    np.testing.assert_allclose(fit.law.rate, law.rate, atol=1e-6)
    assert best_mixture(fit.law, free_bounds(2), weights=np.array([0, 0, 1.0])).losses.shape == (3,)


def test_a_run_that_went_wrong_hardly_moves_the_fit():
    law = some_law(3, 2)
    mixtures = well_spread(free_bounds(3), count=20, seed=1)
    losses = law.predict(mixtures) + 1e-3 * np.random.default_rng(1).normal(size=(20, 3))
    losses[4] += 2.0
    fit = fit_static_law(mixtures, losses)
    truth = law.predict(mixtures)
    assert np.abs(fit.law.predict(mixtures) - truth).max() < 0.02


def test_the_gradient_is_that_of_the_prediction():
    law, p = some_law(3, 5), np.array([0.2, 0.3, 0.5])
    for domain, step in enumerate(np.eye(3) * 1e-6):
        slope = (law.predict(p + step) - law.predict(p - step)) / 2e-6
        np.testing.assert_allclose(slope, law.gradient(p)[:, domain], rtol=1e-6)


def test_held_out_r2_tells_a_law_from_noise():
    random = np.random.default_rng(3)
    mixtures = well_spread(free_bounds(3), count=24, seed=2)
    losses = some_law(3, 3).predict(mixtures)
    losses[:, 2] = random.normal(3.0, 0.1, 24)  # does not depend on the mixture
    score = held_out_r2(mixtures, losses + 1e-3 * random.normal(size=losses.shape), seed=1)
    assert (score[:2] > 0.99).all()
    assert score[2] < 0.3


def test_r_squared_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    actual, predicted = random.normal(size=(2, 9, 2))
    expected = metrics.r2_score(actual, predicted, multioutput="raw_values")
    np.testing.assert_allclose(r_squared(actual, predicted), expected)
    assert r_squared(np.ones((3, 1)), np.ones((3, 1))).tolist() == [1.0]


@pytest.mark.parametrize(
    ("mixtures", "losses", "message"),
    [
        (np.eye(2), np.ones((2, 2)), "2 different mixtures"),
        (np.full((6, 2), 0.5), np.ones((6, 2)), "1 different"),
        (np.full((6, 2), 0.6), np.ones((6, 2)), "no distribution"),
        (np.full((6, 2), 0.5), np.full((6, 2), np.nan), "run 0 has"),
        (np.full((6, 2), 0.5), np.ones((5, 2)), "do not fit"),
    ],
)
def test_runs_that_allow_no_law_are_refused(mixtures, losses, message):
    with pytest.raises(ConfigError, match=message):
        fit_static_law(mixtures, losses)


BOUNDS = [
    free_bounds(3),
    Bounds(floor=np.array([0.05, 0.1, 0.0]), ceiling=np.array([1.0, 0.5, 0.45])),
    make_bounds(["a", "b", "c"], max_epochs=4, samples_per_epoch=[50, 400, 100], samples=1000),
]


@pytest.mark.parametrize("bounds", BOUNDS, ids=["free", "floors and ceilings", "repetition"])
def test_the_optimum_is_that_of_a_fine_grid(bounds):
    points = grid(free_bounds(3), parts=400)
    points = points[bounds.contains(points)]
    for seed in range(8):
        law = some_law(3, seed)
        weights = np.random.default_rng(seed).uniform(0.2, 1.0, 3)
        best = best_mixture(law, bounds, weights=weights)
        assert bounds.contains(best.mixture, slack=1e-12)
        values = law.predict(points) @ (weights / weights.sum())
        np.testing.assert_allclose(best.mixture, points[values.argmin()], atol=0.01)
        assert best.value <= values.min() + 1e-12
        np.testing.assert_allclose(best.losses, law.predict(best.mixture))


def test_the_optimum_of_two_and_seven_domains():
    points = grid(free_bounds(2), parts=2000)
    for seed in range(10):
        law = some_law(2, seed)
        best = best_mixture(law, free_bounds(2)).mixture
        np.testing.assert_allclose(
            best, points[law.predict(points).sum(axis=1).argmin()], atol=1e-3
        )
    law = some_law(7, 3)
    best = best_mixture(law, free_bounds(7))
    near = dirichlet(free_bounds(7), count=20_000, seed=1)
    blend = np.concatenate([best.mixture + s * (near - best.mixture) for s in (0.01, 0.1, 1.0)])
    assert (law.predict(blend).mean(axis=1) >= best.value - 1e-12).all()


def test_a_law_without_a_slope_has_an_optimum():
    flat = StaticLaw(constant=np.ones(2), rate=np.ones((2, 2)))
    assert free_bounds(2).contains(best_mixture(flat, free_bounds(2)).mixture)


def trial(domains, runs, noise, seed, replicates):
    """Return which intervals cover the truth: of predictions, and of the optimum."""
    law, bounds = some_law(domains, seed), free_bounds(domains)
    mixtures = well_spread(bounds, count=runs, seed=seed)
    random = np.random.default_rng(seed + 10_000)
    losses = law.predict(mixtures) + noise * random.normal(size=(runs, domains))
    at = dirichlet(bounds, count=5, seed=seed + 20_000)
    found = static_intervals(
        fit_static_law(mixtures, losses), bounds, at=at, replicates=replicates, seed=seed
    )
    best = best_mixture(law, bounds)
    return (
        found.predicted.covers(law.predict(at)).ravel(),
        found.predicted_jointly.covers(law.predict(at)).all()[None],
        found.mixture.covers(best.mixture, slack=1e-6),
        found.value.covers(best.value)[None],
    )


def test_intervals_repeat_and_grow_with_the_noise():
    law, bounds = some_law(2, 0), free_bounds(2)
    mixtures = grid(bounds, parts=10)
    noise, at = np.random.default_rng(0).normal(size=(11, 2)), np.array([[0.3, 0.7]])
    widths = []
    for spread in (0.002, 0.02):
        fit = fit_static_law(mixtures, law.predict(mixtures) + spread * noise)
        one, other = (static_intervals(fit, bounds, at=at, replicates=40, seed=5) for _ in "ab")
        assert (one.predicted.low == other.predicted.low).all()
        assert (one.mixture.high == other.mixture.high).all()
        assert one.mixture.covers(one.optimum.mixture).all()
        assert one.predicted.covers(fit.law.predict(at)).all()
        assert ((one.mixture.low >= 0) & (one.mixture.high <= 1)).all()
        joint = one.predicted_jointly.high - one.predicted_jointly.low
        assert (joint > 0.9 * (one.predicted.high - one.predicted.low)).all()
        widths.append((one.predicted.high - one.predicted.low).max())
    assert 4 < widths[1] / widths[0] < 25


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("domains", "runs"), [(2, 12), (3, 20)])
def test_intervals_cover_the_truth_in_nine_of_ten_trials(domains, runs):
    trials = [trial(domains, runs, 0.02, seed, replicates=100) for seed in range(200)]
    for kind in zip(*trials, strict=True):
        covered = np.stack(kind).mean(axis=0)  # over the trials, for every interval
        assert (covered >= 0.9).all(), covered
