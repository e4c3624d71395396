"""Two measurements of the same held-out windows, and whether they differ by more than noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.mixing.objective import Objective
from megatron.mixing.observation import FloatArray
from megatron.mixing.reported import Reported

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """A report validation as it is remembered.

    Attributes:
        step: training steps done; of a mean, the last of them.
        loss: nats per token of each measured domain, [N]; NaN where not measured.
        windows: losses of each domain's windows, in their order.
    """

    step: int
    loss: FloatArray
    windows: tuple[FloatArray, ...]

    @classmethod
    def of(cls, reported: Reported) -> Measurement:
        """Take what was reported."""
        return cls(
            step=reported.step,
            loss=np.array(reported.loss, dtype=np.float64),
            windows=tuple(
                np.array(reported.window_loss[reported.window_domain == place], dtype=np.float64)
                for place in range(len(reported.loss))
            ),
        )

    def averaged(self, other: Measurement, *, count: int) -> Measurement:
        """Return the mean of this, which is one of ``count`` already, and another."""
        part = 1.0 / (count + 1)

        def mean(mine: FloatArray, new: FloatArray) -> FloatArray:
            if len(mine) != len(new):
                return new
            with np.errstate(over="ignore", invalid="ignore"):
                moved = mine + (new - mine) * part
            return np.where(np.isfinite(moved), moved, np.where(np.isfinite(new), new, mine))

        return Measurement(
            step=other.step,
            loss=mean(self.loss, other.loss),
            windows=tuple(mean(a, b) for a, b in zip(self.windows, other.windows, strict=True)),
        )

    def state_dict(self, names: Sequence[str]) -> dict[str, Any]:
        """Return it by name, JSON-able."""
        return {
            "step": self.step,
            "loss": dict(zip(names, _plain(self.loss), strict=True)),
            "windows": dict(zip(names, map(_plain, self.windows), strict=True)),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], names: Sequence[str]) -> Measurement:
        """Read back what :meth:`state_dict` gave; a domain that is new has no loss.

        Raises:
            KeyError, TypeError, ValueError: it is damaged.
        """
        return cls(
            step=int(state["step"]),
            loss=np.concatenate([_read([state["loss"].get(name)]) for name in names]),
            windows=tuple(_read(state["windows"].get(name, [])) for name in names),
        )


def _plain(values: FloatArray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _read(values: Sequence[float | None]) -> FloatArray:
    return np.array([np.nan if value is None else float(value) for value in values])


class Yardstick:
    """The objective of a run, as a number of each measurement.

    Args:
        objective: over units.
        units: the weights of the N measured domains in each unit's loss, [units, N]: the
            identity where every domain is a unit, a row per group where groups are.
    """

    def __init__(self, objective: Objective, units: Matrix) -> None:
        self._objective, self._units = objective, units

    def value(self, loss: FloatArray) -> float:
        """Return the objective of the losses, [N], nats per token; NaN if nothing counts."""
        return self._objective.value(self._unit_losses(loss)[0])

    def weights(self, loss: FloatArray) -> FloatArray:
        """Return how much each loss counts, [N]; those that are not measured do not."""
        found, rows = self._unit_losses(loss)
        return np.asarray(self._objective.weights(found) @ rows)

    def broken(self, loss: FloatArray) -> bool:
        """Whether a loss that may count is infinite."""
        return bool((np.isinf(loss) & (self._units > 0).any(axis=0)).any())

    def difference(self, now: FloatArray, then: FloatArray) -> float:
        """Return by how much ``now`` is worse, over what both measured; NaN for nothing."""
        both = np.isfinite(now) & np.isfinite(then)
        return self.value(np.where(both, now, np.nan)) - self.value(np.where(both, then, np.nan))

    def paired_error(self, now: Measurement, then: Measurement) -> float | None:
        """Return the standard error of the difference of two measurements.

        Both are of the same windows, so what makes one window harder than another cancels:
        what counts is how the differences of the windows scatter.  The variances of the
        domains' means are combined with the squares of the objective's present weights.

        Returns:
            Nats per token; None if the windows do not tell.
        """
        pairs = [
            a - b if len(a) == len(b) else np.zeros(0)
            for a, b in zip(now.windows, then.windows, strict=True)
        ]
        both = np.isfinite(now.loss) & np.isfinite(then.loss)
        return self._error(pairs, np.where(both, now.loss, np.nan))

    def own_error(self, now: Measurement) -> float | None:
        """Return the standard error of one measurement by itself; see :meth:`paired_error`."""
        return self._error(now.windows, now.loss)

    def _unit_losses(self, loss: FloatArray) -> tuple[FloatArray, Matrix]:
        """Return the units' losses and, for each, the weights of the measured domains."""
        known = np.isfinite(loss)
        rows = np.where(known, self._units, 0.0)
        sums = rows.sum(axis=1, keepdims=True)
        rows = rows / np.where(sums > 0, sums, 1.0)
        found = rows @ np.where(known, loss, 0.0)
        return np.where(sums[:, 0] > 0, found, np.nan), rows

    def _error(self, values: Sequence[FloatArray], loss: FloatArray) -> float | None:
        weights = self.weights(loss)
        kept = [part[np.isfinite(part)] for part in values]
        counts = np.array([len(part) for part in kept])
        if (counts[weights > 0] == 0).any() or not (counts > 1).any():
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            spread = np.array([part.var(ddof=1) if len(part) > 1 else np.nan for part in kept])
            # A domain with one window says nothing of its scatter: the others' stands for it.
            spread = np.where(np.isnan(spread), np.nanmean(spread), spread)
            parts = weights[weights > 0] ** 2 * (spread / np.maximum(counts, 1))[weights > 0]
            error = float(np.sqrt(parts.sum()))
        return None if np.isnan(error) else error
