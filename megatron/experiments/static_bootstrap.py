"""How sure a static law is: bootstrap intervals of predicted losses and of the optimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import Bounds, FloatArray
from megatron.experiments.libraries import load
from megatron.experiments.optimum import Optimum, best_mixture
from megatron.experiments.static_law import StaticFit, StaticLaw, refit
from megatron.mixing.reading import require

LEAST_REPLICATES: Final = 20
_MOST_LEVERAGE: Final = 0.95
_LEAST_SPREAD: Final = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Interval:
    """Where a number lies, by element.

    Attributes:
        low: lower ends.
        high: upper ends.
    """

    low: FloatArray
    high: FloatArray

    def covers(self, truth: FloatArray | float, *, slack: float = 1e-9) -> FloatArray:
        """Tell by element whether ``truth`` lies inside, ends included, up to ``slack``."""
        return np.asarray((truth >= self.low - slack) & (truth <= self.high + slack))


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticIntervals:
    """Bootstrap intervals around a static law.

    Attributes:
        predicted: of the true loss at the mixtures asked for, [Q, M], each for itself.
        predicted_jointly: the same, wide enough to cover all of them at once.
        mixture: of the best mixture's weights, [K], each for itself.
        value: of the objective at the best mixture, [].
        optimum: the fitted law's own best mixture.
        confidence: of the intervals.
        replicates: laws that were fitted anew.
    """

    predicted: Interval
    predicted_jointly: Interval
    mixture: Interval
    value: Interval
    optimum: Optimum
    confidence: float
    replicates: int


def static_intervals(
    fit: StaticFit,
    bounds: Bounds,
    *,
    at: FloatArray,
    weights: FloatArray | None = None,
    confidence: float = 0.95,
    replicates: int = 400,
    seed: int = 0,
) -> StaticIntervals:
    """Return intervals by resampling the residuals of whole runs.

    A run's residuals are drawn together, since its domains were trained with the same
    seed; they are scaled by 1/sqrt(1 - leverage) and centred first, because a fit bends
    towards its own runs.  The percentiles are moved out to those of Student's t with the
    fit's degrees of freedom (Hesterberg 2015, "expanded percentile"), without which few
    runs give intervals that are too short.  Where Student's interval with the replicates'
    standard deviation reaches further, it counts: far percentiles of few replicates vary.

    Args:
        fit: the law and its runs.
        bounds: mixtures among which the best one is looked for.
        at: mixtures whose losses are asked for, [Q, K].
        weights: how much each measured domain counts in the objective, [M]; equally if None.
        confidence: of each interval, in (0, 1).
        replicates: laws to fit anew.
        seed: of the draws.

    Raises:
        ConfigError: ``confidence`` or ``replicates`` out of range, or as many parameters as
            runs.
        MissingExtraError: scipy is not installed.
    """
    require("confidence", confidence, 0 < confidence < 1, "between 0 and 1")
    require("replicates", replicates, replicates >= LEAST_REPLICATES, f">= {LEAST_REPLICATES}")
    runs, size = fit.mixtures.shape
    if runs <= size + 1:
        raise ConfigError(f"{runs} runs leave no residuals to {size + 1} parameters; add runs")
    optimum = best_mixture(fit.law, bounds, weights=weights, seed=seed)
    starts = np.stack((optimum.mixture, bounds.nearest(np.full(size, 1.0 / size))))
    predicted, mixtures, values = [], [], []
    for law in replicated_laws(fit, replicates, seed):
        best = best_mixture(law, bounds, weights=weights, starts=starts)
        predicted.append(law.predict(at))
        mixtures.append(best.mixture)
        values.append(best.value)
    stats = load("scipy.stats", "an interval")
    quantile = float(stats.t.ppf(0.5 + confidence / 2.0, runs - size - 1))
    tail = float(stats.norm.sf(quantile))
    losses, fitted = np.stack(predicted), fit.law.predict(at)
    each = _interval(losses, fitted, quantile, tail)
    return StaticIntervals(
        predicted=each,
        predicted_jointly=_joint(each, losses, fitted, confidence),
        mixture=_within(_interval(np.stack(mixtures), optimum.mixture, quantile, tail), bounds),
        value=_interval(np.array(values), np.asarray(optimum.value), quantile, tail),
        optimum=optimum,
        confidence=confidence,
        replicates=replicates,
    )


def replicated_laws(fit: StaticFit, replicates: int, seed: int) -> list[StaticLaw]:
    """Fit the law to as many sets of losses as are asked for, made of the fit's residuals."""
    pool = fit.residual / np.sqrt(1.0 - np.minimum(fit.leverage, _MOST_LEVERAGE))
    pool = pool - pool.mean(axis=0)
    fitted = fit.losses - fit.residual
    generator = np.random.default_rng(seed)
    drawn = generator.integers(len(pool), size=(replicates, len(pool)))
    return [refit(fit, fitted + pool[rows]) for rows in drawn]


def _interval(replicates: FloatArray, found: FloatArray, quantile: float, tail: float) -> Interval:
    """Return the wider end on each side: of the percentiles, and of Student's t."""
    low, high = np.quantile(replicates, (tail, 1.0 - tail), axis=0, method="weibull")
    half = quantile * replicates.std(axis=0, ddof=1)
    return Interval(low=np.minimum(low, found - half), high=np.maximum(high, found + half))


def _joint(
    interval: Interval, replicates: FloatArray, found: FloatArray, confidence: float
) -> Interval:
    """Stretch intervals by how much further the furthest of all lies than one alone."""
    stats = load("scipy.stats", "an interval")
    spread = np.maximum(replicates.std(axis=0, ddof=1), _LEAST_SPREAD)
    axes = tuple(range(1, replicates.ndim))
    furthest = (np.abs(replicates - found) / spread).max(axis=axes)
    reach = float(np.quantile(furthest, confidence, method="weibull"))
    stretch = max(1.0, reach / float(stats.norm.ppf(0.5 + confidence / 2.0)))
    return Interval(
        low=found - stretch * (found - interval.low), high=found + stretch * (interval.high - found)
    )


def _within(interval: Interval, bounds: Bounds) -> Interval:
    """Leave out weights that are not allowed."""
    return Interval(
        low=np.maximum(interval.low, bounds.floor), high=np.minimum(interval.high, bounds.ceiling)
    )
