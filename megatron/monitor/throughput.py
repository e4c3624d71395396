"""Tokens per second, time to the end, and the share of the machine's arithmetic in use."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class Throughput:
    """Measures over a sliding window of steps.

    Validations and checkpoints are left out of the rate (wrap them in
    :meth:`pause` and :meth:`resume`), so it says what training costs.
    """

    def __init__(
        self,
        *,
        window: int = 50,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Measure over ``window`` steps.

        Args:
            window: number of steps that a rate speaks for.
            flops_per_token: floating-point operations to train on one token.
            peak_flops: operations per second of all devices together.
            clock: seconds from any origin.
        """
        self._steps: deque[tuple[float, int]] = deque(maxlen=max(1, window))
        self._clock = clock
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._mark = clock()
        self._paused: float | None = None

    def step(self, tokens: int) -> float:
        """Count a finished step of ``tokens`` tokens; return its duration in seconds."""
        now = self._clock()
        seconds = max(now - self._mark, 1e-9)
        self._mark = now
        self._steps.append((seconds, tokens))
        return seconds

    def pause(self) -> None:
        """Stop the clock: what follows is not training."""
        if self._paused is None:
            self._paused = self._clock()

    def resume(self) -> None:
        """Let the clock run on."""
        if self._paused is not None:
            self._mark += self._clock() - self._paused
            self._paused = None

    @property
    def tokens_per_second(self) -> float | None:
        """Rate over the window, ``None`` before the first step."""
        if not self._steps:
            return None
        return sum(tokens for _, tokens in self._steps) / sum(seconds for seconds, _ in self._steps)

    def eta_seconds(self, steps_left: int) -> float | None:
        """Training time for ``steps_left`` steps at the window's pace."""
        if not self._steps:
            return None
        return max(0, steps_left) * sum(seconds for seconds, _ in self._steps) / len(self._steps)

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilisation (0 to 1), ``None`` if the peak is unknown."""
        rate = self.tokens_per_second
        if rate is None or not self._flops_per_token or not self._peak_flops:
            return None
        return rate * self._flops_per_token / self._peak_flops


def duration(seconds: float) -> str:
    """Return a duration as people write it: ``45s``, ``3m20s``, ``5h07m``, ``2d04h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def short(value: float) -> str:
    """Return a count with three digits and a unit: ``950``, ``18.2k``, ``3.41M``."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{value:.0f}"
