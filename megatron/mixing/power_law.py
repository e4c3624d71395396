"""Fitting L(n) = epsilon + beta n^(-alpha): robust, bounded, from many starts, in NumPy.

The objective is the mean Huber loss of log residuals, log L - log(epsilon + beta n^-alpha).
Its threshold is tiny, so it is nearly the mean absolute deviation: outliers count little.
Minimised by Levenberg-Marquardt on iteratively reweighted least squares, all starts at
once; bounds by projection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

LEAST_ALPHA: Final = 0.001
LARGEST_ALPHA: Final = 0.8
LARGEST_LOG_BETA: Final = 6.5
HUBER: Final = 1e-3

_START_ALPHAS: Final = (0.01, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
_START_SHARES: Final = (0.0, 0.5, 0.9)
_COARSE_POINTS: Final = 256
_COARSE_STEPS: Final = 60
_FINE_STARTS: Final = 2
_FINE_STEPS: Final = 60
_LEAST_POINTS: Final = 4


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """A loss as a function of data: epsilon + beta n^(-alpha), in nats per token."""

    epsilon: float
    beta: float
    alpha: float

    @property
    def finite(self) -> bool:
        """Whether it was found."""
        return bool(np.isfinite([self.epsilon, self.beta, self.alpha]).all())


NOT_FOUND: Final = PowerLaw(epsilon=float("nan"), beta=float("nan"), alpha=float("nan"))


def fit_power_law(n: FloatArray, loss: FloatArray, *, least_epsilon: float = 0.0) -> PowerLaw:
    """Fit the law to the points that are finite and positive.

    Args:
        n: data seen, [N].
        loss: nats per token, [N].
        least_epsilon: lower bound of epsilon, nats per token.

    Returns:
        The best law found; :data:`NOT_FOUND` with fewer than four points.
    """
    usable = np.isfinite(n) & np.isfinite(loss) & (n > 0) & (loss > 0)
    log_n, log_loss = np.log(n[usable]), np.log(loss[usable])
    if len(log_n) < _LEAST_POINTS:
        return NOT_FOUND
    low = np.array([-np.inf, least_epsilon, LEAST_ALPHA])
    high = np.array([LARGEST_LOG_BETA, np.inf, LARGEST_ALPHA])
    thin = np.unique(np.linspace(0, len(log_n) - 1, _COARSE_POINTS).astype(np.int64))
    starts = np.clip(_starts(log_n[thin], log_loss[thin], least_epsilon), low, high)
    starts = _minimise(starts, log_n[thin], log_loss[thin], low, high, steps=_COARSE_STEPS)
    if len(thin) < len(log_n):
        order = np.argsort(_objective(starts, log_n, log_loss), kind="stable")[:_FINE_STARTS]
        starts = _minimise(starts[order], log_n, log_loss, low, high, steps=_FINE_STEPS)
    objective = _objective(starts, log_n, log_loss)
    best = starts[int(np.argmin(np.where(np.isfinite(objective), objective, np.inf)))]
    with np.errstate(under="ignore"):
        law = PowerLaw(epsilon=float(best[1]), beta=float(np.exp(best[0])), alpha=float(best[2]))
    return law if np.isfinite(objective).any() and law.finite else NOT_FOUND


def _starts(log_n: FloatArray, log_loss: FloatArray, least_epsilon: float) -> FloatArray:
    """Return (log beta, epsilon, alpha) to start from, [S, 3].

    For every alpha of a grid: the least-squares epsilon and beta, and for several
    epsilons below the least loss the beta that meets the median point.
    """
    loss, found = np.exp(log_loss), []
    for alpha in _START_ALPHAS:
        basis = np.stack((np.ones(len(log_n)), np.exp(-alpha * log_n)), axis=1)
        (epsilon, beta), *_ = np.linalg.lstsq(basis, loss, rcond=None)
        if epsilon >= 0 and beta > 0:
            found.append((np.log(beta), epsilon, alpha))
        for share in _START_SHARES:
            epsilon = max(share * float(loss.min()), least_epsilon)
            rest = np.maximum(loss - epsilon, 1e-3 * loss)
            found.append((float(np.median(np.log(rest) + alpha * log_n)), epsilon, alpha))
    return np.array(found)


def _log_law(theta: FloatArray, log_n: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return log L and beta n^(-alpha), each [S, N], for parameters [S, 3]."""
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        falling = np.exp(np.minimum(theta[:, :1] - theta[:, 2:] * log_n, 300.0))
        return np.log(theta[:, 1:2] + falling), falling


def _huber(residual: FloatArray) -> FloatArray:
    size = np.abs(residual)
    return np.where(size <= HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER))


def _objective(theta: FloatArray, log_n: FloatArray, log_loss: FloatArray) -> FloatArray:
    """Return the mean Huber loss of each start, [S]."""
    return np.asarray(_huber(log_loss - _log_law(theta, log_n)[0]).mean(axis=1))


def _minimise(
    theta: FloatArray,
    log_n: FloatArray,
    log_loss: FloatArray,
    low: FloatArray,
    high: FloatArray,
    *,
    steps: int,
) -> FloatArray:
    """Improve every start on its own, [S, 3]; none gets worse."""
    theta = theta.copy()
    value = _objective(theta, log_n, log_loss)
    damping = np.full(len(theta), 1e-2)
    for _ in range(steps):
        step = _step(theta, log_n, log_loss, low, high, damping)
        trial = np.clip(theta + step, low, high)
        reached = _objective(trial, log_n, log_loss)
        better = reached < value
        gain = np.where(better, value - reached, 0.0)
        theta[better], value[better] = trial[better], reached[better]
        damping = np.where(better, damping * 0.3, damping * 4.0)
        if ((gain <= 1e-9 * value) & (better | (damping > 1e8))).all():
            break
        damping = np.clip(damping, 1e-12, 1e9)
    return theta


def _step(
    theta: FloatArray,
    log_n: FloatArray,
    log_loss: FloatArray,
    low: FloatArray,
    high: FloatArray,
    damping: FloatArray,
) -> FloatArray:
    """Return a damped Gauss-Newton step of the reweighted squares, [S, 3].

    A parameter at a bound that the gradient pushes it against stays.
    """
    predicted, falling = _log_law(theta, log_n)
    residual = log_loss - predicted
    weight = HUBER / np.maximum(np.abs(residual), HUBER)
    share = falling / (theta[:, 1:2] + falling)
    rate = np.exp(-predicted)
    slope = np.stack((share, rate, -share * log_n), axis=1)  # [S, 3, N]
    weighted = slope * weight[:, None]
    gradient = np.einsum("spn,sn->sp", weighted, residual)
    normal = np.einsum("spn,sqn->spq", weighted, slope)
    held = ((theta <= low) & (gradient < 0)) | ((theta >= high) & (gradient > 0))
    free = ~held
    normal = normal * (free[:, :, None] & free[:, None, :])
    scale = np.einsum("spp->sp", normal)
    floor = np.maximum(scale.max(axis=1, keepdims=True) * 1e-12, 1e-300)
    diagonal = np.where(free, scale + damping[:, None] * scale + floor, 1.0)
    normal[:, range(3), range(3)] = diagonal
    return np.asarray(np.linalg.solve(normal, (gradient * free)[:, :, None])[:, :, 0])
