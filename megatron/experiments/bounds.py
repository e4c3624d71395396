"""Which mixtures are allowed: floors, ceilings, and as much data as there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError
from megatron.mixing.reading import by_domain, require
from megatron.mixing.simplex import project

FloatArray = npt.NDArray[np.float64]

SLACK: Final = 1e-12
"""How far sums of bounds may be from 1: a third, three times, need not be one."""

_NO_LIMIT: Final = 1e100
"""Epochs that no run reaches."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bounds:
    """The mixtures with floor <= p <= ceiling and sum 1.

    Attributes:
        floor: least weights, [K].
        ceiling: greatest weights, [K].

    Raises:
        ConfigError: a bound outside [0, 1], a floor above its ceiling, or no mixture left.
    """

    floor: FloatArray
    ceiling: FloatArray

    def __post_init__(self) -> None:
        """Check that there is a mixture between them."""
        for key, values in (("floor", self.floor), ("ceiling", self.ceiling)):
            if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
                raise ConfigError(f"{key} is {values}; it must be one number in [0, 1] per domain")
        if len(self.floor) != len(self.ceiling) or (self.floor > self.ceiling).any():
            raise ConfigError(f"floor {self.floor} is not below ceiling {self.ceiling} everywhere")
        if self.floor.sum() > 1 + SLACK:
            raise ConfigError(f"the floors sum to {self.floor.sum():.6g}, weights to 1; lower them")
        if self.ceiling.sum() < 1 - SLACK:
            raise ConfigError(
                f"the ceilings sum to {self.ceiling.sum():.6g}, weights to 1; raise them, or "
                f"allow more epochs"
            )

    @property
    def count(self) -> int:
        """The number of domains, K."""
        return len(self.floor)

    def contains(self, mixtures: FloatArray, *, slack: float = 1e-9) -> npt.NDArray[np.bool_]:
        """Tell which of the mixtures [..., K] are allowed, up to ``slack``."""
        inside = (mixtures >= self.floor - slack) & (mixtures <= self.ceiling + slack)
        return np.asarray(inside.all(axis=-1) & (np.abs(mixtures.sum(axis=-1) - 1) <= slack))

    def nearest(self, mixture: FloatArray) -> FloatArray:
        """Return the allowed mixture nearest to ``mixture`` [K] (Euclidean)."""
        return project(np.asarray(mixture, dtype=np.float64), self.floor, self.ceiling)

    def above_floor(self, mixtures: FloatArray) -> FloatArray:
        """Shrink the whole simplex onto the one above the floors: mixtures [..., K].

        Linear: vertices become the vertices of what the floors leave.  Ceilings are not seen.
        """
        return np.asarray(self.floor + max(0.0, 1.0 - self.floor.sum()) * mixtures)


def free_bounds(domains: int) -> Bounds:
    """Return the bounds that allow every mixture of so many domains."""
    return Bounds(floor=np.zeros(domains), ceiling=np.ones(domains))


def make_bounds(
    domains: Sequence[str],
    *,
    floor: float | Mapping[str, float] = 0.0,
    ceiling: float | Mapping[str, float] = 1.0,
    max_epochs: float | Mapping[str, float] | None = None,
    samples_per_epoch: Sequence[float] | None = None,
    samples: float | None = None,
) -> Bounds:
    """Read the limits that a user gives by domain.

    The cap on repetition becomes a ceiling: a run of ``samples`` samples passes over domain j
    ``p_j * samples / samples_per_epoch_j`` times.

    Args:
        domains: their names, K.
        floor: least weight; one number for all, or by name (others 0).
        ceiling: greatest weight, likewise (others 1).
        max_epochs: most passes over a domain's data; one number, or by name (others no limit).
        samples_per_epoch: size of each domain [K]; any unit.
        samples: size of the whole run the mixture is for, in the same unit.

    Raises:
        ConfigError: an unknown domain, a value out of range, a cap without the sizes, or
            bounds that no mixture satisfies.
    """
    low = by_domain("floor", _given(floor), domains, missing=0.0)
    high = by_domain("ceiling", _given(ceiling), domains, missing=1.0)
    if max_epochs is not None:
        if samples_per_epoch is None or samples is None:
            raise ConfigError("max_epochs needs the size of each domain and that of the run")
        require("the run's samples", samples, samples > 0, "above 0")
        sizes = np.asarray(samples_per_epoch, dtype=np.float64)
        if len(sizes) != len(domains):
            raise ConfigError(f"sizes are given for {len(sizes)} of {len(domains)} domains")
        passes = by_domain("max_epochs", _given(max_epochs), domains, missing=_NO_LIMIT)
        require("max_epochs", max_epochs, bool((passes >= 0).all()), "at least 0")
        high = np.minimum(high, passes * sizes / samples)
    return Bounds(floor=low, ceiling=high)


def _given(value: float | Mapping[str, float]) -> float | dict[str, float]:
    return dict(value) if isinstance(value, Mapping) else value
