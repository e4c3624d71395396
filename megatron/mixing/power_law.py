"""Fitting L(n) = epsilon + beta n^(-alpha): robust, bounded, from many starts, in NumPy.

The objective is the mean Huber loss of log residuals, log L - log(epsilon + beta n^-alpha).
Its threshold is tiny, so it is nearly the mean absolute deviation: outliers count little.
Minimised by Levenberg-Marquardt on iteratively reweighted least squares, all starts of
some domains at once; bounds by projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
_NUMBERS_AT_ONCE: Final = 1 << 15  # more would leave the cache, fewer be mostly calls

_Points = tuple[FloatArray, FloatArray]  # log n and log L, [N] each


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
    return fit_power_laws(n[:, None], loss[:, None], least_epsilon=least_epsilon)[0]


def fit_power_laws(
    n: FloatArray, loss: FloatArray, *, least_epsilon: float = 0.0
) -> list[PowerLaw]:
    """Fit a law to each column, as :func:`fit_power_law` does; several are worked out at once.

    Args:
        n: data seen, [N, K].
        loss: nats per token, [N, K].
        least_epsilon: lower bound of epsilon, nats per token.
    """
    laws = [NOT_FOUND] * n.shape[1]
    alike: dict[int, list[tuple[int, _Points]]] = {}
    for column in range(n.shape[1]):
        own_n, own_loss = n[:, column], loss[:, column]
        usable = np.isfinite(own_n) & np.isfinite(own_loss) & (own_n > 0) & (own_loss > 0)
        points = (np.log(own_n[usable]), np.log(own_loss[usable]))
        if len(points[0]) >= _LEAST_POINTS:
            alike.setdefault(len(points[0]), []).append((column, points))
    for count, columns in alike.items():
        starts = (1 + len(_START_SHARES)) * len(_START_ALPHAS)
        together = max(1, _NUMBERS_AT_ONCE // (starts * min(count, _COARSE_POINTS)))
        for first in range(0, len(columns), together):
            part = columns[first : first + together]
            found = _fit([points for _, points in part], least_epsilon)
            for (column, _), law in zip(part, found, strict=True):
                laws[column] = law
    return laws


def _fit(domains: Sequence[_Points], least_epsilon: float) -> Iterator[PowerLaw]:
    """Fit a law to each of some domains, which have equally many points."""
    low = np.array([-np.inf, least_epsilon, LEAST_ALPHA])
    high = np.array([LARGEST_LOG_BETA, np.inf, LARGEST_ALPHA])
    count = len(domains[0][0])
    thin = np.unique(np.linspace(0, count - 1, _COARSE_POINTS).astype(np.int64))
    coarse = [(log_n[thin], log_loss[thin]) for log_n, log_loss in domains]
    starts = [np.clip(_starts(*points, least_epsilon), low, high) for points in coarse]
    starts = _minimise(starts, coarse, low, high, steps=_COARSE_STEPS)
    if len(thin) < count:
        for place, points in enumerate(domains):
            order = np.argsort(_objective(starts[place], *points), kind="stable")
            starts[place] = starts[place][order[:_FINE_STARTS]]
        for place, points in enumerate(domains):
            starts[place] = _minimise([starts[place]], [points], low, high, steps=_FINE_STEPS)[0]
    for theta, points in zip(starts, domains, strict=True):
        objective = _objective(theta, *points)
        best = theta[int(np.argmin(np.where(np.isfinite(objective), objective, np.inf)))]
        with np.errstate(under="ignore"):
            law = PowerLaw(
                epsilon=float(best[1]), beta=float(np.exp(best[0])), alpha=float(best[2])
            )
        yield law if np.isfinite(objective).any() and law.finite else NOT_FOUND


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
    """Return log L and beta n^(-alpha), each [S, N], for parameters [S, 3] and [N] or [S, N]."""
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        falling = np.exp(np.minimum(theta[:, :1] - theta[:, 2:] * log_n, 300.0))
        return np.log(theta[:, 1:2] + falling), falling


def _mean_huber(residual: FloatArray) -> FloatArray:
    """Return the mean Huber loss of each row, [S]."""
    size = np.abs(residual)
    near = np.minimum(size, HUBER)
    # 0.5 r^2 where |r| is below the threshold h, and h (|r| - 0.5 h) above it.
    return np.asarray((near * (size - 0.5 * near)).mean(axis=1))


def _objective(theta: FloatArray, log_n: FloatArray, log_loss: FloatArray) -> FloatArray:
    """Return the mean Huber loss of each start, [S]."""
    return _mean_huber(log_loss - _log_law(theta, log_n)[0])


def _minimise(
    starts: Sequence[FloatArray],
    domains: Sequence[_Points],
    low: FloatArray,
    high: FloatArray,
    *,
    steps: int,
) -> list[FloatArray]:
    """Improve every start on its own, [S, 3] of each domain; none gets worse.

    What a start's next step is made of is worked out when the start has moved.  A start whose
    steps have come to nothing is not tried any more, nor is a domain of which all starts have.
    """
    owner = np.repeat(np.arange(len(starts)), [len(one) for one in starts])
    log_n, log_loss = (np.stack([one[part] for one in domains])[owner] for part in (0, 1))
    theta = np.concatenate(starts)
    predicted, falling = _log_law(theta, log_n)
    value = _mean_huber(log_loss - predicted)
    gradient, normal = _equations(theta, predicted, falling, log_n, log_loss)
    damping = np.full(len(theta), 1e-2)
    going = np.arange(len(theta))
    settled = np.zeros(len(theta), dtype=np.bool_)
    for _ in range(steps):
        step = _step(theta[going], gradient[going], normal[going], low, high, damping[going])
        trial = np.clip(theta[going] + step, low, high)
        predicted, falling = _log_law(trial, log_n[going])
        reached = _mean_huber(log_loss[going] - predicted)
        better = reached < value[going]
        gain = np.where(better, value[going] - reached, 0.0)
        moved = going[better]
        theta[moved], value[moved] = trial[better], reached[better]
        if len(moved):
            gradient[moved], normal[moved] = _equations(
                trial[better], predicted[better], falling[better], log_n[moved], log_loss[moved]
            )
        damping[going] *= np.where(better, 0.3, 4.0)
        stuck = ~better & (damping[going] > 1e8)
        settled[going] = (gain <= 1e-9 * value[going]) & (better | stuck)
        damping = np.clip(damping, 1e-12, 1e9)
        unsettled = np.bincount(owner[~settled], minlength=len(starts)) > 0
        going = going[~stuck & unsettled[owner[going]]]
        if not len(going):
            break
    return np.split(theta, np.cumsum([len(one) for one in starts])[:-1])


def _equations(
    theta: FloatArray,
    predicted: FloatArray,
    falling: FloatArray,
    log_n: FloatArray,
    log_loss: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """Return gradient [S, 3] and normal matrix [S, 3, 3] of the reweighted squares.

    Args:
        theta: parameters, [S, 3].
        predicted: log L at them, [S, N].
        falling: beta n^(-alpha) at them, [S, N].
        log_n: of the data, [S, N].
        log_loss: what is fitted, [S, N].
    """
    residual = log_loss - predicted
    weight = HUBER / np.maximum(np.abs(residual), HUBER)
    slope = np.empty((len(theta), 3, log_n.shape[1]))
    np.divide(1.0, theta[:, 1:2] + falling, out=slope[:, 1])
    np.multiply(falling, slope[:, 1], out=slope[:, 0])
    np.multiply(slope[:, 0], -log_n, out=slope[:, 2])
    weighted = slope * weight[:, None]
    gradient = np.matmul(weighted, residual[:, :, None])[:, :, 0]
    return gradient, np.matmul(weighted, slope.transpose(0, 2, 1))


def _step(
    theta: FloatArray,
    gradient: FloatArray,
    normal: FloatArray,
    low: FloatArray,
    high: FloatArray,
    damping: FloatArray,
) -> FloatArray:
    """Return a damped Gauss-Newton step of the reweighted squares, [S, 3].

    A parameter at a bound that the gradient pushes it against stays.
    """
    held = ((theta <= low) & (gradient < 0)) | ((theta >= high) & (gradient > 0))
    free = ~held
    normal = normal * (free[:, :, None] & free[:, None, :])
    scale = np.einsum("spp->sp", normal)
    floor = np.maximum(scale.max(axis=1, keepdims=True) * 1e-12, 1e-300)
    diagonal = np.where(free, scale + damping[:, None] * scale + floor, 1.0)
    normal[:, range(3), range(3)] = diagonal
    return np.asarray(np.linalg.solve(normal, (gradient * free)[:, :, None])[:, :, 0])
