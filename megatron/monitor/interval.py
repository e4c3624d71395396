"""What happened since the last line that was shown.

A single step of a small batch misses most domains; a line or a chart point
therefore speaks for all the steps since the one before it.
"""

from __future__ import annotations

import numpy as np

from megatron.monitor.record import FloatArray, StepRecord


class Interval:
    """Sums over steps, by domain."""

    def __init__(self) -> None:
        """Start empty."""
        self.steps = 0
        self.domains: tuple[str, ...] = ()
        self._zero(0)

    def _zero(self, count: int) -> None:
        self.steps = 0
        self._samples = np.zeros(count)
        self._asked = np.zeros(count)
        self._tokens = np.zeros(count)
        self._loss_sum = np.zeros(count)

    def add(self, record: StepRecord) -> None:
        """Take a step in."""
        if record.domains != self.domains:
            self.domains = record.domains
            self._zero(len(record.domains))
        self.steps += 1
        self._samples += record.samples
        self._asked += record.probability * record.samples.sum()
        present = (record.tokens > 0) & np.isfinite(record.domain_loss)
        self._tokens[present] += record.tokens[present]
        self._loss_sum[present] += (record.domain_loss * record.tokens)[present]

    def clear(self) -> None:
        """Begin the next interval."""
        self._zero(len(self.domains))

    @property
    def domain_loss(self) -> FloatArray:
        """Token-weighted mean loss ``[K]``, NaN where a domain was absent throughout."""
        return _ratio(self._loss_sum, self._tokens)

    @property
    def loss(self) -> float:
        """Token-weighted mean loss over all domains, NaN if nothing was finite."""
        tokens = float(self._tokens.sum())
        return float(self._loss_sum.sum()) / tokens if tokens else float("nan")

    @property
    def share(self) -> FloatArray:
        """Realised share of the samples ``[K]``."""
        return _ratio(self._samples, np.full_like(self._samples, self._samples.sum()))

    @property
    def asked(self) -> FloatArray:
        """Mean of the distributions that drew the samples ``[K]``."""
        return _ratio(self._asked, np.full_like(self._asked, self._asked.sum()))


def _ratio(above: FloatArray, below: FloatArray) -> FloatArray:
    result = np.full_like(above, np.nan)
    np.divide(above, below, out=result, where=below > 0)
    return result
