"""What the methods share that draw by the given weights and weigh the losses instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from megatron.mixing.base import Mixer, RunContext
from megatron.mixing.migrate import Follow, log_share, reset, share
from megatron.mixing.multiplicative import RunningMean, distribution, logarithms
from megatron.mixing.observation import FloatArray
from megatron.mixing.options import CommonOptions
from megatron.mixing.simplex import normalise


class Reweighter(Mixer):
    """A mixer whose domain weights stand in the loss and not in the draw.

    The draw stays the given weights.  Floors and ceilings bound the draw, as for every
    method, and the domain weights; the rule goes on from the domain weights before them.
    A domain that is never drawn is left out.
    """

    follows: ClassVar[Mapping[str, Follow]] = {
        "log_weights": log_share,
        "total": share,
        "ahead": reset(None),
    }

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: CommonOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._support = self._weights > 0
        self._log_weights = logarithms(self._weights)
        self._mean = RunningMean(len(self.domains))

    def result(self) -> FloatArray | None:
        """Return the mean of the domain weights, [K]; None before there are any."""
        return self._mean.value

    def _uniform(self) -> FloatArray:
        """Return the uniform distribution over the domains that are drawn, [K]."""
        return normalise(self._support.astype(np.float64))

    def _domain_weights(self, log_weights: FloatArray) -> FloatArray:
        """Return the domain weights of their logarithms, within floors and ceilings, [K]."""
        return self._bounded(distribution(log_weights, self._support))

    def _reweighted(self, before: FloatArray) -> None:
        """Let a domain that was not drawn start from its given share, and one leave."""
        started = np.where(before == 0, logarithms(self._given), self._log_weights)
        self._log_weights = np.where(self._support, started, 0.0)

    def _save_weights(self) -> dict[str, Any]:
        log_weights = np.where(self._support, self._log_weights, np.nan)
        return {
            "log_weights": self._by_name(log_weights),
            "total": self._by_name(self._mean.total),
            "count": self._mean.count,
        }

    def _read_weights(self, rule: Mapping[str, Any]) -> tuple[FloatArray, FloatArray, int]:
        """Read back what :meth:`_save_weights` wrote; nothing is changed.

        A domain that is drawn now and was not then starts from its share of the draw.
        """
        read = self._vector(rule["log_weights"], "log_weights")
        log_weights = np.where(np.isnan(read), logarithms(self._weights), read)
        total = self._finite(rule["total"], "total")
        count = self._whole(rule["count"], "count", least=0)
        if not np.isfinite(log_weights).all():
            raise self._damaged("log_weights", rule["log_weights"])
        if (total < 0).any() or bool(total.any()) != (count > 0):
            raise self._damaged("total", rule["total"])
        return log_weights, total, count

    def _take_weights(self, read: tuple[FloatArray, FloatArray, int]) -> None:
        self._log_weights, self._mean.total, self._mean.count = read

    def _finite(self, values: Mapping[str, Any], name: str) -> FloatArray:
        read = self._vector(values, name)
        if not np.isfinite(read).all():
            raise self._damaged(name, values)
        return read

    def _block(self, values: object, name: str, keys: frozenset[str]) -> Mapping[str, Any]:
        """Return a part of the state that must hold exactly ``keys``."""
        if not isinstance(values, Mapping):
            raise self._damaged(name, values)
        self._check_rule(values, keys)
        return values
