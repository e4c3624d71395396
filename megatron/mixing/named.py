"""Vectors by name: how a method writes what it remembers, and reads it back strictly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import numpy as np

from megatron.errors import CheckpointError
from megatron.mixing.observation import FloatArray


class Named(ABC):
    """Something with domains, whose state is keyed by their names."""

    method: ClassVar[str]
    domains: tuple[str, ...]

    @property
    @abstractmethod
    def measured(self) -> tuple[str, ...]:
        """Names of what validation measures: the domains, then those never trained on."""

    def _by_name(self, values: FloatArray) -> dict[str, float | None]:
        """Key a vector by domain; NaN becomes None, so that any JSON reader takes it."""
        return {
            name: None if np.isnan(value) else float(value)
            for name, value in zip(self.domains, values, strict=True)
        }

    def _vector(self, values: Mapping[str, Any], name: str) -> FloatArray:
        """Read back what :meth:`_by_name` wrote, in the order of the domains."""
        try:
            if len(values) != len(self.domains):
                raise KeyError(name)
            read = [np.nan if values[d] is None else float(values[d]) for d in self.domains]
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(name, values) from error
        return np.array(read, dtype=np.float64)

    def _by_measured(self, values: FloatArray) -> dict[str, float | None]:
        """Key a vector [K + M] by the names in ``measured``; NaN becomes None."""
        return {
            name: None if np.isnan(value) else float(value)
            for name, value in zip(self.measured, values, strict=True)
        }

    def _measured_vector(self, values: object, name: str) -> FloatArray:
        """Read back what :meth:`_by_measured` wrote, [K + M].

        Domains that are never trained on may come and go between two launches: a new one
        is NaN, one that is gone is left out.
        """
        if not isinstance(values, Mapping):
            raise self._damaged(name, values)
        own = {domain: values[domain] for domain in self.domains if domain in values}
        try:
            read = [values.get(target) for target in self.measured[len(self.domains) :]]
            others = [np.nan if value is None else float(value) for value in read]
        except (TypeError, ValueError) as error:
            raise self._damaged(name, values) from error
        return np.append(self._vector(own, name), others)

    def _check_rule(self, rule: Mapping[str, Any], keys: Collection[str]) -> None:
        """Refuse what :meth:`_restore` got unless it holds exactly ``keys``."""
        if rule.keys() != set(keys):
            raise CheckpointError(
                f"the state of mixing method '{self.method}' holds {sorted(rule)} where "
                f"{sorted(keys)} belong"
            )

    def _damaged(self, name: str, value: object) -> CheckpointError:
        """Return the error of a state that no run of ours can have written."""
        return CheckpointError(
            f"the state of mixing method '{self.method}' is damaged: {name} is {value!r}"
        )

    def _whole(self, value: object, name: str, *, least: int) -> int:
        """Read back a whole number of at least ``least``."""
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._damaged(name, value)
        return value
