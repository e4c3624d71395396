"""Objectives: which losses count, and how much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from megatron.errors import ConfigError
from megatron.mixing.observation import BoolArray, FloatArray
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
            "help": "uniform: the mean loss of the domains that are trained on; worst: the "
            "highest loss of them; weights: a weighted mean of the losses that are named"
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
            "domain furthest above it is the worst, of those that are named (one that is never "
            "trained on may be)",
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
        domains: what is trained on, [K].
        targets: what is measured and never trained on, [M]; these count where they are
            named, and nowhere else.

    Raises:
        ConfigError: it names a domain that is not among them.
    """

    def __init__(
        self, options: ObjectiveOptions, domains: Sequence[str], targets: Sequence[str] = ()
    ) -> None:
        self.kind, self.names = options.kind, (*domains, *targets)
        self._domains, self._targets = tuple(domains), tuple(targets)
        self._given: FloatArray = np.repeat([1.0, 0.0], (len(domains), len(targets)))
        self._above: FloatArray = np.zeros(len(self.names))
        if options.weights is not None:
            read = by_domain("objective: weights", options.weights, self.names, missing=0.0)
            self._given = normalise(read)
        if options.above is not None:
            read = by_domain("objective: above", options.above, self.names, missing=0.0)
            named = np.array([name in options.above for name in self.names])
            self._above, self._given = read, named.astype(np.float64)

    @property
    def counted(self) -> BoolArray:
        """Which losses can count, [N]: the domains', then the targets', N = K + M."""
        return self._given > 0

    @property
    def fixed(self) -> FloatArray | None:
        """How much each loss counts if all are measured, [N], sum 1; None for ``worst``."""
        return None if self.kind == "worst" else normalise(self._given)

    def check_trained(self, method: str) -> None:
        """Refuse an objective over losses that no training batch tells.

        Raises:
            ConfigError: it counts domains that are never trained on.
        """
        names = [name for name in self._targets if self._given[self.names.index(name)] > 0]
        if names:
            raise ConfigError(
                f"mixing method '{method}': the objective counts {', '.join(names)}, never "
                f"trained on, and the method reads training losses alone; use aioli, or skillit "
                f"with a graph"
            )

    def weights(self, losses: FloatArray) -> FloatArray:
        """Return how much each loss counts, [N]: sum 1 over the measured ones.

        Args:
            losses: nats per token, [N]; NaN where not measured.  Of the worst, all that
                are equally bad share the weight.

        Returns:
            [N]; all 0 if nothing that counts has been measured.
        """
        counted = np.isfinite(losses) & self.counted
        if not counted.any():
            return np.zeros(len(losses))
        if self.kind != "worst":
            return normalise(np.where(counted, self._given, 0.0))
        excess = np.where(counted, losses - self._above, -np.inf)
        return normalise((excess == excess.max()).astype(np.float64))

    def factors(self, losses: FloatArray) -> FloatArray:
        """Return what multiplies the terms of a sum over the losses, [N]: mean 1 where counted.

        Exactly 1 for every domain under ``uniform``, whatever has been measured, so that a
        rule with the factors is the rule without them.
        """
        if self.kind == "uniform":
            return self._given.copy()
        return self.weights(losses) * float(self.counted.sum())

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
        options = ObjectiveOptions(kind="weights", weights=named)
        return Objective(options, self._domains, self._targets)

    def describe(self) -> dict[str, float] | str:
        """Return it for a log: its kind, or its weights by name."""
        if self.kind != "weights":
            return self.kind
        return {
            name: float(weight)
            for name, weight in zip(self.names, self._given, strict=True)
            if weight > 0
        }
