"""What a fallback mixture would have reached: from an earlier run of it, or from this run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from megatron.mixing.observation import FloatArray
from megatron.mixing.power_law import PowerLaw, fit_power_law

MODEL_ERROR: Final = 0.15
"""One standard error of an extrapolated fall, as a share of it.

Losses follow a power law in steps only roughly (learning rates have schedules), so a
forecast counts for less the further it reaches.
"""
_PRIOR: Final = np.array([3.0, 1.0, 0.3])  # of log beta, epsilon (in losses) and alpha
_PARAMETERS: Final = 3


def interpolated(steps: Sequence[int], losses: FloatArray, step: int) -> FloatArray | None:
    """Return the losses of a recorded run at ``step``, [N]; None outside of its record.

    Args:
        steps: of its validations, rising, [P].
        losses: [P, N]; NaN where not measured.
        step: linear between two validations, which is on the high side of a falling curve.
    """
    if not steps or not steps[0] <= step <= steps[-1]:
        return None
    return np.array([np.interp(step, steps, column) for column in losses.T])


class FittedForecast:
    """A power law in steps through losses, and how far it may be wrong.

    Args:
        steps: where they were measured, rising, [P].
        losses: nats per token, [P].
    """

    def __init__(self, steps: Sequence[int], losses: Sequence[float]) -> None:
        n = np.array(steps, dtype=np.float64)
        values = np.array(losses, dtype=np.float64)
        kept = (n > 0) & (values > 0)
        self._n, self._values = n[kept], values[kept]
        self._law: PowerLaw = fit_power_law(self._n, self._values)

    @property
    def known(self) -> bool:
        """Whether there is a law."""
        return self._law.finite

    def value(self, step: float) -> float:
        """Return the loss forecast for ``step``, nats per token."""
        return float(self._law.epsilon + self._law.beta * step**-self._law.alpha)

    def scatter(self, step: int) -> float:
        """Return the standard error that the points' scatter leaves at ``step``, nats per token.

        It is carried there through the law, with a wide prior on the law's parameters, so
        that what the points leave open stays open.
        """
        residual = self._values - np.array([self.value(n) for n in self._n])
        freedom = max(1, len(self._n) - _PARAMETERS)
        prior = np.array([1.0, max(float(self._values.max()), 1e-6), 1.0]) * _PRIOR
        # By directions: each knows its variance, where a matrix of all could not be inverted.
        with np.errstate(over="ignore", invalid="ignore"):
            variance = max(float(residual @ residual) / freedom, 1e-16)
            known = self._slope(self._n) * prior / np.sqrt(variance)
            here = self._slope(np.array([float(step)]))[0] * prior
            if not (np.isfinite(known).all() and np.isfinite(here).all()):
                return float("inf")
            _, strengths, directions = np.linalg.svd(known)
            spread = directions @ here
            spread[: len(strengths)] /= np.hypot(1.0, strengths)
            return float(np.linalg.norm(spread))

    def model_error(self, step: int) -> float:
        """Return :data:`MODEL_ERROR` of the fall since the last point, nats per token."""
        return abs(MODEL_ERROR * (self.value(float(self._n[-1])) - self.value(step)))

    def _slope(self, n: FloatArray) -> FloatArray:
        """Return the law's derivatives by log beta, epsilon and alpha, [len(n), 3]."""
        falling = self._law.beta * n**-self._law.alpha
        return np.stack((falling, np.ones(len(n)), -np.log(n) * falling), axis=1)
