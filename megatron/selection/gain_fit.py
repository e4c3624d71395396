"""Fitting the law of gains to runs, and how sure its numbers are.

Least squares by scipy's ``curve_fit`` within bounds (P0 and P̄ in [0, the best score there is],
λ >= 0), as the paper's authors published it, from several starts and with exact slopes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron.errors import DataError
from megatron.selection.base import FloatArray
from megatron.selection.gain_law import gain
from megatron.selection.libraries import load

INTERVALS: Final = ("covariance", "bootstrap")
BETTER: Final = ("higher", "lower")
LEAST_REPLICATES: Final = 50

_START_RATES: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_BEST_STARTS: Final = 2
_MOST_STEPS: Final = 500
_SATURATED: Final = 12.0
_LEAST_BEND: Final = 1e-4
_WORST_ERROR: Final = 3.0
_MOST_LEVERAGE: Final = 0.95


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a law is fitted.

    Attributes:
        better: whether a ``higher`` or a ``lower`` performance is better.
        best: the best performance there can be, a bound of P0 and P̄ (1 or 100 of a score); for
            losses the bound is 0, and this stays None.
        ceiling: P̄ where it is known; None: fitted.
        confidence: of the intervals.
        intervals: ``covariance``: of the linearised fit with Student's t, λ on its logarithm;
            ``bootstrap``: percentiles over refits of resampled residuals, moved out to Student's t.
        replicates: of the bootstrap, and draws that are kept of either.
        seed: of the draws.
    """

    better: str = "higher"
    best: float | None = None
    ceiling: float | None = None
    confidence: float = 0.95
    intervals: str = "covariance"
    replicates: int = 400
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class GainFit:
    """A law of gains and how sure it is.

    Attributes:
        law: (P0, λ, P̄).
        low: lower ends of their intervals; of a given P̄ the value itself.
        high: upper ends.
        draws: laws that the runs allow, by the same method as the intervals, [R, 3].
        total: C_total.
        flops: C of the runs, [n].
        performance: of the runs, [n].
        r2: share of the variance explained.
        rmse: root of the mean squared residual, by degrees of freedom.
        fixed: whether P̄ was given.
    """

    law: FloatArray
    low: FloatArray
    high: FloatArray
    draws: FloatArray
    total: float
    flops: FloatArray
    performance: FloatArray
    r2: float
    rmse: float
    fixed: bool


def fit_gain(
    flops: FloatArray, performance: FloatArray, total: float, options: FitOptions
) -> GainFit:
    """Fit P0, λ and, where no ceiling is given, P̄.

    Args:
        flops: C of the runs, [n].
        performance: of the runs, [n].
        total: C_total.
        options: how.

    Raises:
        DataError: too few different amounts of compute, performance that does not vary or does not
            improve with compute, or runs that leave λ or P̄ open (a straight line, or all of them
            at the ceiling).
        MissingExtraError: scipy is not installed.
    """
    x = np.asarray(flops, dtype=np.float64) / total
    y = np.asarray(performance, dtype=np.float64)
    _check(x, y, options)
    problem = _Problem(x, y, options)
    theta, covariance = problem.fit(y, problem.starts(y))
    _judge(problem, theta, covariance)
    freedom = len(x) - len(theta)
    residual = y - problem.predict(theta)
    rmse = float(np.sqrt((residual**2).sum() / freedom))
    if options.intervals == "covariance":
        low, high, draws = _from_covariance(problem, theta, covariance, freedom)
    else:
        low, high, draws = _from_bootstrap(problem, theta, residual, freedom)
    spread = ((y - y.mean()) ** 2).sum()
    return GainFit(
        law=problem.law(theta),
        low=problem.law(low),
        high=problem.law(high),
        draws=np.stack([problem.law(draw) for draw in draws]),
        total=total,
        flops=np.asarray(flops, dtype=np.float64),
        performance=y,
        r2=float(1.0 - (residual**2).sum() / spread),
        rmse=rmse,
        fixed=options.ceiling is not None,
    )


class _Problem:
    """Runs and bounds; parameters are (P0, λ) or (P0, λ, P̄)."""

    def __init__(self, x: FloatArray, y: FloatArray, options: FitOptions) -> None:
        self.x, self.y, self.options = x, y, options
        self.rising = options.better == "higher"
        least = 0.0 if y.min() >= 0 else -np.inf
        most = np.inf if options.best is None or not self.rising else options.best
        free = options.ceiling is None
        self.low = np.array([least, 0.0, least][: 2 + free])
        self.high = np.array([most, np.inf, most][: 2 + free])

    def law(self, theta: FloatArray) -> FloatArray:
        if len(theta) == 3:
            return np.asarray(theta)
        return np.append(theta, float(self.options.ceiling or 0.0))

    def predict(self, theta: FloatArray) -> FloatArray:
        return gain(self.x, self.law(theta), 1.0)

    def slope(self, theta: FloatArray) -> FloatArray:
        """Return the derivatives of the predictions, [n, parameters]."""
        start, rate, most = self.law(theta)
        left = np.exp(-rate * self.x)
        columns = [left, (most - start) * self.x * left, 1.0 - left]
        return np.stack(columns[: len(theta)], axis=1)

    def starts(self, y: FloatArray) -> list[FloatArray]:
        """Return the best of several λ, each with the P0 and P̄ that are best for it."""
        reach = float(self.x.max())
        found = []
        for rate in _START_RATES:
            left = np.exp(-rate / reach * self.x)
            if self.options.ceiling is None:
                basis = np.stack((left, 1.0 - left), axis=1)
                (first, last), *_ = np.linalg.lstsq(basis, y, rcond=None)
                theta = np.array([first, rate / reach, last])
            else:
                rest = y - self.options.ceiling * (1.0 - left)
                theta = np.array([left @ rest / (left @ left), rate / reach])
            found.append(np.clip(theta, self.low, np.minimum(self.high, 1e30)))
        found.sort(key=lambda theta: float(((self.predict(theta) - y) ** 2).sum()))
        return found[:_BEST_STARTS]

    def fit(self, y: FloatArray, starts: list[FloatArray]) -> tuple[FloatArray, FloatArray]:
        """Return the parameters with the least squares and their covariance."""
        optimize: Any = load("scipy.optimize", "fitting a law of gains")
        best, found = np.inf, None

        def model(_: FloatArray, *theta: float) -> FloatArray:
            return self.predict(np.array(theta))

        def slope(_: FloatArray, *theta: float) -> FloatArray:
            return self.slope(np.array(theta))

        for start in starts:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optimize.OptimizeWarning)
                try:
                    theta, covariance = optimize.curve_fit(
                        model,
                        self.x,
                        y,
                        p0=start,
                        bounds=(self.low, self.high),
                        jac=slope,
                        x_scale="jac",
                        max_nfev=_MOST_STEPS,
                    )
                except (RuntimeError, ValueError):
                    continue
            error = float(((self.predict(theta) - y) ** 2).sum())
            if error < best:
                best, found = error, (np.asarray(theta), np.asarray(covariance))
        if found is None:
            raise DataError(
                "scipy comes to no end: the runs lie on a straight line, which leaves λ and P̄ "
                "open; add runs with more compute, or give the ceiling (--ceiling)"
            )
        return found


def _check(x: FloatArray, y: FloatArray, options: FitOptions) -> None:
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError("compute and performance must be finite; leave out runs that failed")
    need = 2 if options.ceiling is not None else 3
    different = len(np.unique(x.round(12)))
    if different < need or len(x) <= need:
        raise DataError(
            f"{len(x)} runs at {different} amounts of compute cannot give {need} numbers and "
            f"their intervals; {need + 1} runs at {need} or more amounts are needed"
            + ("" if need == 2 else ", or one less with a given ceiling (--ceiling)")
        )
    if np.ptp(y) <= 1e-12 * max(1.0, float(np.abs(y).max())):
        raise DataError(
            f"the performance is {y[0]:g} in all runs; a law needs runs that differ: spend less "
            "on some of them, and more on others"
        )
    if options.ceiling is not None:
        beyond = (
            y.max() - options.ceiling if options.better == "higher" else (options.ceiling - y.min())
        )
        if beyond > np.ptp(y):
            raise DataError(
                f"the ceiling is {options.ceiling:g}, and runs reach "
                f"{(y.max() if options.better == 'higher' else y.min()):g}; give the performance "
                "that no compute exceeds"
            )


def _judge(problem: _Problem, theta: FloatArray, covariance: FloatArray) -> None:
    """Refuse a fit that says nothing, with what to do."""
    start, rate, most = problem.law(theta)
    reach = rate * float(problem.x.max())
    word = "rise" if problem.rising else "fall"
    if rate <= 0 or (most - start if problem.rising else start - most) <= 0:
        raise DataError(
            f"the performance does not {word} with compute, so that there is no gain to fit; "
            f"see whether a {problem.options.better} one is better (--better), and whether the "
            "runs differ by more than their noise"
        )
    least = float(problem.x[problem.x > 0].min())
    if rate * least > _SATURATED:
        raise DataError(
            "all runs are at the ceiling already, which leaves λ open; add runs with less compute"
        )
    deviation = np.sqrt(np.diag(covariance))
    open_ = not np.isfinite(deviation).all() or deviation[1] > _WORST_ERROR * rate
    if open_ or reach < _LEAST_BEND:
        remedy = (
            "add runs with more compute, or give the ceiling (--ceiling)"
            if problem.options.ceiling is None
            else "add runs, or seeds"
        )
        raise DataError(
            f"the runs leave λ open ({rate:.3g} ± {deviation[1]:.3g}): within their noise they lie "
            f"on a straight line, or do not differ; {remedy}"
        )


def _from_covariance(
    problem: _Problem, theta: FloatArray, covariance: FloatArray, freedom: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return Student's intervals of the linearised fit, λ on its logarithm, and draws of it."""
    stats = load("scipy.stats", "an interval")
    options = problem.options
    scale = np.ones(len(theta))
    scale[1] = 1.0 / theta[1]  # d log λ
    centre = theta.copy()
    centre[1] = np.log(theta[1])
    spread = covariance * np.outer(scale, scale)
    half = float(stats.t.ppf(0.5 + options.confidence / 2.0, freedom)) * np.sqrt(np.diag(spread))
    generator = np.random.default_rng(options.seed)
    size = len(theta)
    normal = generator.standard_normal((options.replicates, size))
    chi = generator.chisquare(freedom, (options.replicates, 1)) / freedom
    left, values, _ = np.linalg.svd(spread)
    drawn = centre + (normal * np.sqrt(values)) @ left.T / np.sqrt(chi)
    ends = [centre - half, centre + half]
    low, high = (_unlog(end[None], problem)[0] for end in ends)
    return low, high, _unlog(drawn, problem)


def _unlog(drawn: FloatArray, problem: _Problem) -> FloatArray:
    """Return parameters with λ itself for its logarithm, within the bounds."""
    found = np.array(drawn)
    found[:, 1] = np.exp(np.minimum(found[:, 1], 500.0))
    return np.clip(found, problem.low, problem.high)


def _from_bootstrap(
    problem: _Problem, theta: FloatArray, residual: FloatArray, freedom: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return expanded percentiles (Hesterberg 2015) over refits of resampled residuals."""
    stats = load("scipy.stats", "an interval")
    options = problem.options
    left, values, _ = np.linalg.svd(problem.slope(theta), full_matrices=False)
    leverage = (left[:, values > 1e-10 * values[0]] ** 2).sum(axis=1)
    pool = residual / np.sqrt(1.0 - np.minimum(leverage, _MOST_LEVERAGE))
    pool = pool - pool.mean()
    fitted = problem.predict(theta)
    generator = np.random.default_rng(options.seed)
    rows = generator.integers(len(pool), size=(options.replicates, len(pool)))
    inside = np.clip(theta, problem.low + 1e-12, problem.high)
    draws = np.stack([problem.fit(fitted + pool[row], [inside])[0] for row in rows])
    quantile = float(stats.t.ppf(0.5 + options.confidence / 2.0, freedom))
    tail = float(stats.norm.sf(quantile))
    low, high = np.quantile(draws, (tail, 1.0 - tail), axis=0, method="weibull")
    return low, high, draws
