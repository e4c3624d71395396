"""When each domain's data runs out, said long before it does."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final, Literal

import numpy as np

from megatron.mixing.observation import FloatArray

SOON: Final = 0.1
"""Part of the run before a domain's end at which it is announced again."""
_WHAT_THEN: Final = {
    "repeat": "a domain that has ended is read again (max_epochs limits that)",
    "stop": "the run stops with the first domain that ends",
    "drop": "a domain that has ended is left out",
}


def exhaustion_forecast(
    *,
    seen: FloatArray,
    unique: FloatArray,
    weights: FloatArray,
    samples_per_step: int,
    step: int,
) -> FloatArray:
    """Return the step that ends the present pass over each domain if the weights hold, [K].

    Args:
        seen: samples drawn after ``step`` steps, [K].
        unique: samples of one pass, [K].
        weights: the distribution that draws from now on, [K].
        samples_per_step: of a global batch.
        step: steps done.

    Returns:
        The first step, whole, after which the pass is over; infinite for a domain that is
        not drawn.
    """
    unique = np.maximum(unique, 1.0)
    left = (np.floor(seen / unique) + 1.0) * unique - seen
    rate = weights * samples_per_step
    with np.errstate(divide="ignore", over="ignore"):
        # A hair below the whole number is that number: shares are not exact.
        steps = np.ceil(left / rate * (1.0 - 1e-12))
    return np.where(rate > 0, step + np.maximum(steps, 1.0), np.inf)


class _Said(IntEnum):
    NOTHING = 0
    FORECAST = 1
    SOON = 2
    OVER = 3


class ExhaustionWatch:
    """Turns successive forecasts into messages about the first end of each domain.

    Each is said once: as soon as the end lies within the run, again when it is a tenth of the
    run away, and when it has come; what is due for several domains at a step is one message.
    A domain that was at its end before the first forecast (of a resumed run) is not spoken of.

    Args:
        domains: names.
        unique: samples of one pass over each, [K].
        samples_per_step: of a global batch.
        total_steps: of the run.
        on_exhausted: what happens then, as configured.
        unit: samples that are drawn at once; a domain that is left out at its end (``drop``) is
            so as soon as fewer are left of it.
    """

    def __init__(
        self,
        *,
        domains: Sequence[str],
        unique: Sequence[float],
        samples_per_step: int,
        total_steps: int,
        on_exhausted: Literal["repeat", "stop", "drop"] = "repeat",
        unit: int = 1,
    ) -> None:
        self._domains, self._unique = tuple(domains), np.array(unique, dtype=np.float64)
        self._batch, self._total = samples_per_step, total_steps
        self._then = _WHAT_THEN[on_exhausted]
        self._needed = unit if on_exhausted == "drop" else 1
        self._said = [_Said.NOTHING] * len(self._domains)
        self._started = False

    def messages(self, *, step: int, seen: FloatArray, weights: FloatArray | None) -> list[str]:
        """Return what is to be said after ``step`` steps, nothing most of the time.

        Args:
            step: steps done.
            seen: samples drawn from each domain by then, [K].
            weights: the distribution that draws from now on, [K]; None while one draws that
                will not last (a probe's), by which nothing can be forecast.
        """
        over = seen >= self._unique - self._needed + 1
        if not self._started:
            self._started = True
            self._said = [_Said.OVER if done else _Said.NOTHING for done in over]
        ends = exhaustion_forecast(
            seen=seen,
            unique=self._unique,
            weights=np.zeros(len(self._domains)) if weights is None else weights,
            samples_per_step=self._batch,
            step=step,
        )
        news: dict[_Said, list[int]] = {}
        for k in range(len(self._domains)):
            due = self._due(step, bool(over[k]), float(ends[k]))
            if due > self._said[k]:
                self._said[k] = due
                news.setdefault(due, []).append(k)
        left = np.maximum(self._unique - seen, 0.0)
        return [self._text(due, found, step, ends, left) for due, found in sorted(news.items())]

    def _due(self, step: int, over: bool, end: float) -> _Said:
        if over:
            return _Said.OVER
        if end > self._total:
            return _Said.NOTHING
        return _Said.SOON if end - step <= SOON * self._total else _Said.FORECAST

    def _text(
        self, due: _Said, found: list[int], step: int, ends: FloatArray, left: FloatArray
    ) -> str:
        sizes = [f"{self._domains[k]} ({self._unique[k]:,.0f} samples)" for k in found]
        if due is _Said.OVER:
            for place, k in enumerate(found):
                if left[k] > 0:
                    rest = f"samples, of which the last {left[k]:,.0f} fill no draw)"
                    sizes[place] = f"{self._domains[k]} ({self._unique[k]:,.0f} {rest}"
            return f"data: read to the end by step {step}: {', '.join(sizes)}; {self._then}"
        when = "soon" if due is _Said.SOON else "within this run"
        listed = [f"{size} at step {ends[k]:.0f}" for k, size in zip(found, sizes, strict=True)]
        return (
            f"data: will end {when}, if the weights hold: {', '.join(listed)} of {self._total}; "
            f"{self._then}"
        )
