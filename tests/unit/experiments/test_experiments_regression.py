"""RegMix: order of unseen mixtures, and the mean of the best simulated ones."""

from __future__ import annotations

import numpy as np
import pytest

from megatron.errors import ConfigError
from megatron.experiments.bounds import Bounds, free_bounds
from megatron.experiments.designs import dirichlet
from megatron.experiments.optimum import best_mixture
from megatron.experiments.regression import (
    Regressor,
    best_simulated,
    fit_regression,
    held_out_ranks,
)
from megatron.experiments.static_law import StaticLaw

LAW = StaticLaw(
    constant=np.array([1.0, 2.0, 0.5]),
    rate=np.array([[2.0, 0.3, 0.0], [0.0, 1.5, 0.1], [0.4, 0.0, 2.5]]),
)
FREE = free_bounds(3)


def sweep(count=64, noise=0.005, seed=0):
    mixtures = dirichlet(FREE, count=count, seed=seed)
    return mixtures, LAW.predict(mixtures) + noise * np.random.default_rng(seed).normal(
        size=(count, 3)
    )


@pytest.mark.parametrize("regressor", list(Regressor))
def test_order_of_unseen_mixtures(regressor):
    ranks = held_out_ranks(*sweep(48), regressor=regressor, folds=2, seed=1)
    assert (ranks.domains > 0.9).all()
    assert ranks.objective > 0.5
    one = held_out_ranks(
        *sweep(48), regressor=regressor, weights=np.array([0, 1.0, 0]), folds=2, seed=1
    )
    assert (one.predicted == ranks.predicted).all()
    assert one.objective == pytest.approx(ranks.domains[1])


def test_nothing_is_learnt_from_noise():
    mixtures, losses = sweep()
    shuffled = losses[np.random.default_rng(3).permutation(len(losses))]
    ranks = held_out_ranks(mixtures, shuffled, regressor=Regressor.BOOSTING, folds=2)
    assert (np.abs(ranks.domains) < 0.4).all()


def test_log_linear_recovers_its_own_law():
    weights = np.array([[0.5, 1.0, 2.0], [1.0, 0.2, 0.1]])
    mixtures = dirichlet(FREE, count=8, seed=2)
    fit = fit_regression(mixtures, np.exp(mixtures @ weights.T), regressor=Regressor.LOG_LINEAR)
    np.testing.assert_allclose([model.coef_ for model in fit.models], weights, atol=1e-9)
    best = best_simulated(fit, FREE, weights=np.array([1.0, 0.0]), simulated=20_000)
    assert best.mixture.argmax() == 0
    assert best.mixture[0] > 0.9


def test_the_mean_of_the_best_is_near_the_optimum_and_repeats():
    weights = np.array([0.2, 1.0, 0.2])
    fit = fit_regression(*sweep(128), regressor=Regressor.BOOSTING, seed=4)
    best = best_simulated(fit, FREE, weights=weights, simulated=30_000, seed=4)
    truth = best_mixture(LAW, FREE, weights=weights)
    reached = LAW.predict(np.stack((best.mixture, np.full(3, 1 / 3)))) @ (weights / weights.sum())
    assert reached[0] < truth.value + 0.02
    assert reached[1] > truth.value + 0.1
    np.testing.assert_allclose(best.mixture, truth.mixture, atol=0.1)
    again = best_simulated(fit, FREE, weights=weights, simulated=30_000, seed=4)
    assert (again.mixture == best.mixture).all()
    assert best.mixture.sum() == pytest.approx(1.0, abs=1e-12)
    assert (best.spread > 0).all()


def test_bounds_hold():
    bounds = Bounds(floor=np.array([0.3, 0.0, 0.2]), ceiling=np.array([0.5, 0.2, 1.0]))
    fit = fit_regression(*sweep(), regressor=Regressor.BOOSTING)
    assert bounds.contains(best_simulated(fit, bounds, simulated=2000).mixture)


def test_what_cannot_be_fitted_is_refused():
    mixtures, losses = sweep(3)
    with pytest.raises(ConfigError, match="run at least 4"):
        fit_regression(mixtures, losses, regressor=Regressor.LOG_LINEAR)
    mixtures, losses = sweep(8)
    with pytest.raises(ConfigError, match="above 0"):
        fit_regression(mixtures, losses - 5, regressor=Regressor.LOG_LINEAR)
    fit = fit_regression(mixtures, losses, regressor=Regressor.LOG_LINEAR)
    with pytest.raises(ConfigError, match="between 1 and 10"):
        best_simulated(fit, FREE, simulated=10)
