"""Objectives: which losses count, and how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from megatron.errors import ConfigError
from megatron.mixing.observation import FloatArray
from megatron.mixing.reading import Block, by_domain
from megatron.mixing.simplex import normalise


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(Block):
    """What a run is to become good at.

    It may be written shorter: ``worst``, or the weights by name.

    Raises:
        ConfigError: keys that contradict each other, or a number out of its range.
    """

    shorthand: ClassVar[Any] = Literal["uniform", "worst"] | dict[str, float]

    kind: Literal["uniform", "worst", "weights"] = field(
        default="uniform",
        metadata={
            "help": "uniform: the mean of all losses that are measured, those of domains that are "
            "never trained on included; worst: the highest of them; weights: a weighted mean"
        },
    )
    weights: dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "for weights: how much each domain counts, by name (others 0), a domain that "
            "is never trained on among them if wanted; their sum does not matter"
        },
    )
    above: dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "for worst: the loss that each domain could reach at best, by name; then the "
            "domain furthest above it is the worst, of those that are named",
            "unit": "nats per token",
        },
    )

    def __post_init__(self) -> None:
        """Check what does not depend on the domains."""
        if (self.weights is not None) != (self.kind == "weights"):
            raise ConfigError(
                f"kind is {self.kind!r} and weights is {self.weights!r}; give weights with the "
                f"kind 'weights', and with no other"
            )
        if self.above is not None and self.kind != "worst":
            raise ConfigError(
                f"above is given, but kind is {self.kind!r}; only the kind 'worst' looks at it"
            )
        if self.weights is not None and not _can_weigh(self.weights):
            raise ConfigError(
                f"weights is {self.weights!r}; they must be finite numbers of at least 0, and one "
                f"of them above 0"
            )
        if self.above is not None and not (
            self.above and all(math.isfinite(value) for value in self.above.values())
        ):
            raise ConfigError(f"above is {self.above!r}; name at least one domain, with a number")

    @classmethod
    def expand(cls, value: Any) -> Any:
        """Turn a kind alone, or weights by name, into the block that they stand for."""
        if isinstance(value, str):
            return {"kind": value}
        if not isinstance(value, dict) or not value:
            return value
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in value.values()):
            return {"kind": "weights", "weights": value}
        if "kind" not in value and value.get("weights") is not None:
            return {"kind": "weights", **value}
        if "kind" not in value and value.get("above") is not None:
            return {"kind": "worst", **value}
        return value


def _can_weigh(weights: dict[str, float]) -> bool:
    values = list(weights.values())
    return all(math.isfinite(value) and value >= 0 for value in values) and any(values)


class Objective:
    """An objective over the measured losses of one run.

    Args:
        options: what the user asked for.
        names: of the losses: the domains, then those that are never trained on, [N].

    Raises:
        ConfigError: it names a domain that is not among them.
    """

    def __init__(self, options: ObjectiveOptions, names: Sequence[str]) -> None:
        self.kind, self.names = options.kind, tuple(names)
        self._given: FloatArray = np.ones(len(self.names))
        self._above: FloatArray = np.zeros(len(self.names))
        if options.weights is not None:
            read = by_domain("objective: weights", options.weights, self.names, missing=0.0)
            self._given = normalise(read)
        if options.above is not None:
            read = by_domain("objective: above", options.above, self.names, missing=0.0)
            named = np.array([name in options.above for name in self.names])
            self._above, self._given = read, named.astype(np.float64)

    @property
    def fixed(self) -> FloatArray | None:
        """How much each loss counts where all are measured, [N], sum 1; None for ``worst``."""
        return None if self.kind == "worst" else normalise(self._given)

    def weights(self, losses: FloatArray) -> FloatArray:
        """Return how much each loss counts, [N]: sum 1 over the measured ones.

        Args:
            losses: nats per token, [N]; NaN where not measured.  Of the worst, all that
                are equally bad share the weight.

        Returns:
            [N]; all 0 if nothing that counts has been measured.
        """
        counted = np.isfinite(losses) & (self._given > 0)
        if not counted.any():
            return np.zeros(len(losses))
        if self.kind != "worst":
            return normalise(np.where(counted, self._given, 0.0))
        excess = np.where(counted, losses - self._above, -np.inf)
        return normalise((excess == excess.max()).astype(np.float64))

    def factors(self, losses: FloatArray) -> FloatArray:
        """Return the weights times their number, [N]: what multiplies terms that were added up.

        Exactly 1 each for ``uniform``, whatever has been measured, so that a rule with them
        is the rule without them.
        """
        if self.kind == "uniform":
            return np.ones(len(losses))
        return self.weights(losses) * len(losses)

    def value(self, losses: FloatArray) -> float:
        """Return the objective, nats per token: the weighted mean, above the reference if any.

        NaN if nothing that counts has been measured.
        """
        weights = self.weights(losses)
        if not weights.any():
            return math.nan
        return float(weights @ np.where(weights > 0, losses - self._above, 0.0))

    def pinned(self, losses: FloatArray) -> Objective:
        """Return the objective whose weights stay those of ``losses``.

        Comparisons over time need one: under ``worst`` the domain that counts may change.

        Raises:
            ValueError: nothing that counts has been measured.
        """
        weights = self.weights(losses)
        if not weights.any():
            raise ValueError("none of the losses that count has been measured")
        named = {
            name: float(weight)
            for name, weight in zip(self.names, weights, strict=True)
            if weight > 0
        }
        return Objective(ObjectiveOptions(kind="weights", weights=named), self.names)

    def describe(self) -> dict[str, float] | str:
        """Return it for a log: its kind, or its weights by name."""
        if self.kind != "weights":
            return self.kind
        return {
            name: float(weight)
            for name, weight in zip(self.names, self._given, strict=True)
            if weight > 0
        }
