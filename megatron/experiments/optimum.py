"""The best mixture by a law: a smooth function's minimum on the bounded simplex."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import Bounds, FloatArray
from megatron.experiments.designs import dirichlet, one_hot
from megatron.experiments.libraries import load

_RANDOM_STARTS: Final = 4
_TOLERANCE: Final = 1e-14
_STEPS: Final = 500


class Law(Protocol):
    """What predicts the losses of M measured domains from a mixture of K trained ones."""

    def predict(self, mixtures: FloatArray) -> FloatArray:
        """Return the losses [..., M] of mixtures [..., K]."""
        ...

    def gradient(self, mixture: FloatArray) -> FloatArray:
        """Return the slopes at a mixture [K], [M, K]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimum:
    """The best mixture that a law knows.

    Attributes:
        mixture: its weights, [K].
        losses: what the law predicts for it, [M].
        value: the objective there, nats per token.
    """

    mixture: FloatArray
    losses: FloatArray
    value: float


def objective_weights(weights: FloatArray | None, measured: int) -> FloatArray:
    """Return how much each measured domain counts, [M], summing to 1; equally if None.

    Raises:
        ConfigError: a wrong number of weights, a negative one, or none above 0.
    """
    if weights is None:
        return np.full(measured, 1.0 / measured)
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != (measured,) or not (given >= 0).all() or not 0 < given.sum() < np.inf:
        raise ConfigError(f"the objective's weights are {given}; {measured} are needed, none < 0")
    return np.asarray(given / given.sum())


def best_mixture(
    law: Law,
    bounds: Bounds,
    *,
    weights: FloatArray | None = None,
    seed: int = 0,
    starts: FloatArray | None = None,
) -> Optimum:
    """Return the allowed mixture with the least weighted mean of the predicted losses.

    Scipy's SLSQP with exact slopes from the centre, the corners and random points.  (The
    static law is convex in p: there, every start ends at the same value.)

    Args:
        law: predicts losses.
        bounds: the allowed mixtures; a cap on repetition is a ceiling
            (:func:`megatron.experiments.bounds.make_bounds`).
        weights: how much each measured domain counts, [M]; equally if None.
        seed: of the random starts.
        starts: where to start instead, [S, K].

    Raises:
        ConfigError: the weights do not fit.
        MissingExtraError: scipy is not installed.
    """
    centre = bounds.nearest(np.full(bounds.count, 1.0 / bounds.count))
    share = objective_weights(weights, len(law.predict(centre)))
    if starts is None:
        random = dirichlet(bounds, count=_RANDOM_STARTS, seed=seed)
        starts = np.concatenate((centre[None], one_hot(bounds), random))
    values = law.predict(starts) @ share
    scale = float(np.ptp(values)) or 1.0

    def value(p: FloatArray) -> float:
        return float(law.predict(p) @ share) / scale

    def slope(p: FloatArray) -> FloatArray:
        return np.asarray(share @ law.gradient(p)) / scale

    found = [_minimise(value, slope, bounds, start) for start in starts]
    # A start that the solver could not improve is a candidate too.
    candidates = [bounds.nearest(point) for point in (*found, starts[int(values.argmin())])]
    best = min(candidates, key=value)
    losses = law.predict(best)
    return Optimum(mixture=best, losses=losses, value=float(losses @ share))


def _minimise(
    value: Callable[[FloatArray], float],
    slope: Callable[[FloatArray], FloatArray],
    bounds: Bounds,
    start: FloatArray,
) -> FloatArray:
    optimize = load("scipy.optimize", "the best mixture of a law")
    found: Any = optimize.minimize(
        value,
        start,
        jac=slope,
        method="SLSQP",
        bounds=np.stack((bounds.floor, bounds.ceiling), axis=1),
        constraints={
            "type": "eq",
            "fun": lambda p: p.sum() - 1.0,
            "jac": lambda p: np.ones_like(p),
        },
        options={"ftol": _TOLERANCE, "maxiter": _STEPS},
    )
    point = np.asarray(found.x, dtype=np.float64)
    return point if np.isfinite(point).all() else start
