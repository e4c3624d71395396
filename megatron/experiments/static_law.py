"""The static mixing law: a domain's final loss as a function of the mixture.

    L_i(p) = c_i + exp(sum_j -A_ij p_j),   c_i >= 0

Data Mixing Laws (Ye et al., arXiv 2403.16952), equation 7, has a factor b_i before the
exponential.  On the simplex (b, A) and (b e^a, A + a) are the same law; b = 1 fixes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.libraries import load
from megatron.experiments.scores import r_squared
from megatron.mixing.reading import require

MOST_RATE: Final = 60.0
"""Bound of |A|: e^60 nats are beyond any loss, e^-60 below any rounding."""

_START_SHARES: Final = (0.0, 0.3, 0.6, 0.85, 0.97)
_HUBER: Final = 1.345
"""Standard deviations up to which a residual counts squared: 95 % efficient under a normal."""
_LEAST_SPREAD: Final = 1e-9
_ROUNDS: Final = 3
_TOLERANCE: Final = 1e-12
_REFIT_TOLERANCE: Final = 1e-8


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticLaw:
    """Losses of M measured domains as functions of the mixture of K trained ones.

    Attributes:
        constant: c, what no mixture removes, nats per token, [M].
        rate: A, how much a domain's share lowers the logarithm of the rest, [M, K].
    """

    constant: FloatArray
    rate: FloatArray

    def predict(self, mixtures: FloatArray) -> FloatArray:
        """Return the losses [..., M] of mixtures [..., K]."""
        return np.asarray(self.constant + _falling(mixtures, self.rate))

    def gradient(self, mixture: FloatArray) -> FloatArray:
        """Return the slope of every loss in every weight at a mixture [K], [M, K]."""
        return np.asarray(-self.rate * _falling(mixture, self.rate)[:, None])


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticFit:
    """A static law and how well it fits the runs it was fitted to.

    Attributes:
        law: the law.
        mixtures: of the runs, [N, K].
        losses: of the runs, [N, M].
        residual: measured less fitted, [N, M].
        r2: share of the variance that the fit explains, [M]; see :func:`held_out_r2`.
        leverage: how much each run pulls its own fitted value, [N, M], between 0 and 1.
    """

    law: StaticLaw
    mixtures: FloatArray
    losses: FloatArray
    residual: FloatArray
    r2: FloatArray
    leverage: FloatArray


def fit_static_law(mixtures: FloatArray, losses: FloatArray) -> StaticFit:
    """Fit the law to final losses of static runs, each measured domain on its own.

    Minimises Huber's loss with scipy's ``least_squares`` (trust region, c >= 0) from many
    starts: for a given c the law is linear in the logarithm, so every start is the best A
    for one of several c.  The threshold follows from the residuals' median, so that a run
    that went wrong counts little.

    Args:
        mixtures: sampling weights of the runs, [N, K].
        losses: their held-out losses, nats per token, [N, M].

    Raises:
        ConfigError: fewer than K + 2 different mixtures, or losses that are not finite.
        MissingExtraError: scipy is not installed.
    """
    mixtures, losses = check_runs(mixtures, losses)
    need = mixtures.shape[1] + 2
    different = len(np.unique(mixtures.round(9), axis=0))
    if different < need or np.linalg.matrix_rank(mixtures, tol=1e-6) < mixtures.shape[1]:
        raise ConfigError(
            f"the runs have {different} different mixtures of {mixtures.shape[1]} domains; a "
            f"static law needs at least {need} that span the simplex: run more of the sweep"
        )
    rows = [_fit_domain(mixtures, column) for column in losses.T]
    law = _law(rows)
    fitted = law.predict(mixtures)
    return StaticFit(
        law=law,
        mixtures=mixtures,
        losses=losses,
        residual=losses - fitted,
        r2=r_squared(losses, fitted),
        leverage=_leverage(law, mixtures),
    )


def refit(fit: StaticFit, losses: FloatArray) -> StaticLaw:
    """Fit the law to other losses [N, M] of the same mixtures, starting from a known law."""
    spread = _spread(fit.residual)
    return _law(
        [
            _minimise(
                fit.mixtures,
                losses[:, row],
                np.append(fit.law.constant[row], fit.law.rate[row]),
                spread[row],
                tolerance=_REFIT_TOLERANCE,
            )[0]
            for row in range(losses.shape[1])
        ]
    )


def held_out_r2(
    mixtures: FloatArray, losses: FloatArray, *, folds: int = 5, seed: int = 0
) -> FloatArray:
    """Return the R² of predictions for runs that the law was not fitted to, [M].

    The runs are divided into folds; each is predicted by the law of all others.  Below 0,
    the law predicts worse than the runs' mean.

    Args:
        mixtures: [N, K].
        losses: [N, M].
        folds: parts; never more than there are runs.
        seed: of the division.

    Raises:
        ConfigError: ``folds`` below 2, or too few runs are left to fit.
    """
    require("folds", folds, folds >= 2, "at least 2")
    mixtures, losses = check_runs(mixtures, losses)
    predicted = np.empty_like(losses)
    order = np.random.default_rng(seed).permutation(len(losses))
    for fold in np.array_split(order, min(folds, len(losses))):
        rest = np.setdiff1d(order, fold)
        law = fit_static_law(mixtures[rest], losses[rest]).law
        predicted[fold] = law.predict(mixtures[fold])
    return r_squared(losses, predicted)


def check_runs(mixtures: FloatArray, losses: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return mixtures [N, K] and losses [N, M] as float64.

    Raises:
        ConfigError: their shapes do not fit, a row is no distribution, or a loss is not finite
            (a failed run is to be repeated, or left out by name).
    """
    mixtures = np.asarray(mixtures, dtype=np.float64)
    losses = np.asarray(losses, dtype=np.float64)
    if mixtures.ndim != 2 or losses.ndim != 2 or len(mixtures) != len(losses):
        raise ConfigError(f"mixtures {mixtures.shape} and losses {losses.shape} do not fit")
    wrong = np.flatnonzero(
        ~(np.isfinite(mixtures).all(axis=1) & (mixtures >= 0).all(axis=1))
        | (np.abs(mixtures.sum(axis=1) - 1) > 1e-6)
    )
    if len(wrong):
        raise ConfigError(f"the mixture of run {wrong[0]} is {mixtures[wrong[0]]}, no distribution")
    failed = np.flatnonzero(~np.isfinite(losses).all(axis=1))
    if len(failed):
        raise ConfigError(
            f"run {failed[0]} has the losses {losses[failed[0]]}; repeat it, or leave it out"
        )
    return mixtures, losses


def _falling(mixtures: FloatArray, rate: FloatArray) -> FloatArray:
    """Return exp(-A p), [..., M]."""
    return np.asarray(np.exp(np.clip(-(mixtures @ rate.T), -MOST_RATE, MOST_RATE)))


def _law(rows: list[FloatArray]) -> StaticLaw:
    theta = np.stack(rows)
    return StaticLaw(constant=theta[:, 0], rate=theta[:, 1:])


def _spread(residual: FloatArray) -> FloatArray:
    """Return a robust standard deviation of residuals by column (median absolute deviation)."""
    deviation = np.abs(residual - np.median(residual, axis=0))
    return np.asarray(np.maximum(1.4826 * np.median(deviation, axis=0), _LEAST_SPREAD))


def _fit_domain(mixtures: FloatArray, loss: FloatArray) -> FloatArray:
    """Return (c, A) of one domain, [1 + K]."""
    room = max(float(np.ptp(loss)), 1e-3)
    starts = [_start(mixtures, loss, share * float(loss.min())) for share in _START_SHARES]
    starts.append(_start(mixtures, loss, max(0.0, float(loss.min()) - 0.1 * room)))
    tried = [_minimise(mixtures, loss, start, 0.1 * room) for start in starts]
    best = min(tried, key=lambda one: one[1])[0]
    for _ in range(_ROUNDS):
        spread = float(_spread((loss - _law([best]).predict(mixtures)[:, 0])[:, None])[0])
        best = _minimise(mixtures, loss, best, spread)[0]
    return best


def _start(mixtures: FloatArray, loss: FloatArray, constant: float) -> FloatArray:
    """Return (c, the A that is best for it in the logarithm), [1 + K]."""
    logs = np.log(np.maximum(loss - constant, 1e-6))
    rate, *_ = np.linalg.lstsq(mixtures, -logs, rcond=None)
    return np.append(constant, np.clip(rate, -MOST_RATE / 2, MOST_RATE / 2))


def _minimise(
    mixtures: FloatArray,
    loss: FloatArray,
    start: FloatArray,
    spread: float,
    *,
    tolerance: float = _TOLERANCE,
) -> tuple[FloatArray, float]:
    """Return the nearest minimum of Huber's loss, [1 + K], and its value."""
    optimize = load("scipy.optimize", "fitting a law")

    def residual(theta: FloatArray) -> FloatArray:
        return np.asarray(theta[0] + _falling(mixtures, theta[1:][None])[:, 0] - loss)

    def jacobian(theta: FloatArray) -> FloatArray:
        falling = _falling(mixtures, theta[1:][None])
        return np.concatenate((np.ones_like(falling), -mixtures * falling), axis=1)

    size = len(start) - 1
    low = np.append(0.0, np.full(size, -MOST_RATE))
    high = np.append(np.inf, np.full(size, MOST_RATE))
    found: Any = optimize.least_squares(
        residual,
        np.clip(start, low, high),
        jac=jacobian,
        bounds=(low, high),
        loss="huber",
        f_scale=_HUBER * spread,
        xtol=tolerance,
        ftol=tolerance,
        gtol=tolerance,
        max_nfev=500,
    )
    return np.asarray(found.x), float(found.cost)


def _leverage(law: StaticLaw, mixtures: FloatArray) -> FloatArray:
    """Return the diagonals of the linearised fits' hat matrices, [N, M]."""
    falling = law.predict(mixtures) - law.constant
    columns = []
    for row in range(len(law.constant)):
        slope = np.concatenate(
            (np.ones((len(mixtures), 1)), -mixtures * falling[:, row : row + 1]), axis=1
        )
        if law.constant[row] <= 0:  # c is held at its bound
            slope = slope[:, 1:]
        left, values, _ = np.linalg.svd(slope, full_matrices=False)
        columns.append((left[:, values > 1e-10 * values[0]] ** 2).sum(axis=1))
    return np.stack(columns, axis=1)
