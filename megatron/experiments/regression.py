"""RegMix: predict losses from mixtures by regression, and average the best simulated ones.

Liu et al., "RegMix: Data Mixture as Regression for Language Model Pre-training"
(arXiv 2407.01492), section 3.  Many small proxies at random mixtures, gradient boosting (or
a linear model, here of the logarithm of the loss), 100 000 simulated mixtures, the mean of
the best.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError
from megatron.experiments.bounds import Bounds, FloatArray
from megatron.experiments.designs import dirichlet
from megatron.experiments.libraries import load
from megatron.experiments.optimum import objective_weights
from megatron.experiments.scores import rank_correlation
from megatron.experiments.static_law import check_runs
from megatron.mixing.reading import require

IntArray = npt.NDArray[np.int64]

SIMULATED: Final = 100_000
BEST: Final = 128
_BOOSTING: Final = {"n_estimators": 300, "learning_rate": 0.05, "max_depth": 3, "subsample": 0.8}


class Regressor(StrEnum):
    """How losses are predicted."""

    BOOSTING = "boosting"
    """Gradient-boosted trees: any shape, no value beyond those seen."""
    LOG_LINEAR = "log_linear"
    """log L = sum_j w_j p_j: few runs suffice, and the optimum is a corner."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Regression:
    """One fitted model per measured domain.

    Attributes:
        regressor: of which kind.
        models: scikit-learn's, M.
    """

    regressor: Regressor
    models: tuple[Any, ...]

    def predict(self, mixtures: FloatArray) -> FloatArray:
        """Return the losses [N, M] of mixtures [N, K]."""
        columns = [np.asarray(model.predict(mixtures)) for model in self.models]
        predicted = np.stack(columns, axis=1)
        return np.exp(predicted) if self.regressor is Regressor.LOG_LINEAR else predicted


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutRanks:
    """Spearman's correlations of predicted and measured losses of mixtures not fitted to.

    Attributes:
        domains: for each measured domain, [M].
        objective: for the weighted mean of the losses.
        predicted: the losses predicted, [N, M].
    """

    domains: FloatArray
    objective: float
    predicted: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Simulated:
    """The mean of the best simulated mixtures.

    Attributes:
        mixture: its weights, [K].
        losses: what the regression predicts for it, [M].
        spread: standard deviation of each weight among the best, [K].
    """

    mixture: FloatArray
    losses: FloatArray
    spread: FloatArray


def fit_regression(
    mixtures: FloatArray, losses: FloatArray, *, regressor: Regressor, seed: int = 0
) -> Regression:
    """Fit a regression with scikit-learn.

    Args:
        mixtures: of the proxies, [N, K].
        losses: of the proxies, above 0, nats per token, [N, M].
        regressor: of which kind.
        seed: of the boosting's samples.

    Raises:
        ConfigError: fewer runs than K + 1, or losses that are not finite and above 0.
        MissingExtraError: scikit-learn is not installed.
    """
    mixtures, losses = check_runs(mixtures, losses)
    if len(mixtures) <= mixtures.shape[1]:
        raise ConfigError(
            f"{len(mixtures)} proxies of {mixtures.shape[1]} domains leave nothing to fit; "
            f"run at least {mixtures.shape[1] + 1}, better ten times as many"
        )
    require("the least loss", float(losses.min()), bool((losses > 0).all()), "above 0")
    if regressor is Regressor.LOG_LINEAR:
        linear = load("sklearn.linear_model", "a regression on mixtures")
        # Weights sum to 1: an intercept would be one weight too many.
        made = [linear.LinearRegression(fit_intercept=False) for _ in range(losses.shape[1])]
        targets = np.log(losses)
    else:
        ensemble = load("sklearn.ensemble", "a regression on mixtures")
        made = [
            ensemble.GradientBoostingRegressor(random_state=seed, **_BOOSTING)
            for _ in range(losses.shape[1])
        ]
        targets = losses
    models = tuple(
        model.fit(mixtures, column) for model, column in zip(made, targets.T, strict=True)
    )
    return Regression(regressor=regressor, models=models)


def held_out_ranks(
    mixtures: FloatArray,
    losses: FloatArray,
    *,
    regressor: Regressor,
    weights: FloatArray | None = None,
    folds: int = 5,
    seed: int = 0,
) -> HeldOutRanks:
    """Return how well the order of mixtures is predicted that the regression has not seen.

    Args:
        mixtures: [N, K].
        losses: [N, M].
        regressor: of which kind.
        weights: how much each measured domain counts, [M]; equally if None.
        folds: parts the runs are divided into; each is predicted from all others.
        seed: of the division and the fits.

    Raises:
        ConfigError: ``folds`` below 2, or too few runs are left to fit.
    """
    require("folds", folds, folds >= 2, "at least 2")
    mixtures, losses = check_runs(mixtures, losses)
    share = objective_weights(weights, losses.shape[1])
    predicted = np.empty_like(losses)
    order = np.random.default_rng(seed).permutation(len(losses))
    for fold in np.array_split(order, min(folds, len(losses))):
        rest = np.setdiff1d(order, fold)
        model = fit_regression(mixtures[rest], losses[rest], regressor=regressor, seed=seed)
        predicted[fold] = model.predict(mixtures[fold])
    return _ranks(losses, predicted, share)


def ranks_of(
    mixtures: FloatArray,
    losses: FloatArray,
    unseen: IntArray,
    *,
    regressor: Regressor,
    weights: FloatArray | None = None,
    seed: int = 0,
) -> HeldOutRanks:
    """Return how well the order of some mixtures is predicted by a fit to all others.

    Args:
        mixtures: [N, K].
        losses: [N, M].
        unseen: which mixtures are not fitted to, U indices; ``predicted`` is [U, M].
        regressor: of which kind.
        weights: how much each measured domain counts, [M]; equally if None.
        seed: of the fit.

    Raises:
        ConfigError: too few runs are left to fit.
    """
    mixtures, losses = check_runs(mixtures, losses)
    share = objective_weights(weights, losses.shape[1])
    seen = np.setdiff1d(np.arange(len(losses)), unseen)
    model = fit_regression(mixtures[seen], losses[seen], regressor=regressor, seed=seed)
    return _ranks(losses[unseen], model.predict(mixtures[unseen]), share)


def _ranks(actual: FloatArray, predicted: FloatArray, share: FloatArray) -> HeldOutRanks:
    columns = range(actual.shape[1])
    return HeldOutRanks(
        domains=np.array([rank_correlation(actual[:, i], predicted[:, i]) for i in columns]),
        objective=rank_correlation(actual @ share, predicted @ share),
        predicted=predicted,
    )


def best_simulated(
    regression: Regression,
    bounds: Bounds,
    *,
    weights: FloatArray | None = None,
    simulated: int = SIMULATED,
    best: int = BEST,
    seed: int = 0,
    concentration: float = 1.0,
    prior: FloatArray | None = None,
) -> Simulated:
    """Return the mean of the best of many simulated mixtures.

    Args:
        regression: predicts losses.
        bounds: the allowed mixtures; the mean of allowed ones is allowed.
        weights: how much each measured domain counts, [M]; equally if None.
        simulated: mixtures that are drawn.
        best: how many of them are averaged.
        seed: of the draws.
        concentration: of the Dirichlet distribution, as the proxies' was.
        prior: its mean, as the proxies' was; uniform if None.

    Raises:
        ConfigError: ``best`` is not within 1 and ``simulated``.
    """
    require("best", best, 1 <= best <= simulated, f"between 1 and {simulated}")
    share = objective_weights(weights, len(regression.models))
    points = dirichlet(bounds, count=simulated, seed=seed, concentration=concentration, prior=prior)
    value = regression.predict(points) @ share
    chosen = points[np.argsort(value, kind="stable")[:best]]
    mixture = bounds.nearest(chosen.mean(axis=0))
    return Simulated(
        mixture=mixture,
        losses=regression.predict(mixture[None])[0],
        spread=chosen.std(axis=0),
    )
