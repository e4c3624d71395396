"""What mixing costs: host and device seconds by kind, collected between two records.

    with overhead.time("update"):
        mixer.observe(observation)
    with overhead.time("reference", device):     # forward passes on a GPU
        …
    overhead.add("collective", seconds)          # measured elsewhere
    spent = overhead.take()                      # {"update": 0.0002, …} since the last take

Nothing here waits for a device.  Work on a GPU is bracketed by two events on the current
stream and read when both have passed; the step's own copy of the ledger to the host makes
that so before the step is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    import torch

KINDS: Final[Mapping[str, str]] = {
    "collective": "the per-domain losses' one all-reduce a step, with the wait for other ranks",
    "update": "the controller: what it learns from a step, and its next decision",
    "validation": "held-out losses measured for the controller (not those of the report)",
    "probes": "steps that were drawn to learn about the domains, not to train best",
    "reference": "forward passes of the reference model",
    "foresight": "gradients and held-out batches measured before a step trains",
}
"""Every kind of cost, in the order they are shown, with what it is."""


class Mark(Protocol):
    """A place in a device's queue of work: what is used of torch's CUDA events."""

    def record(self) -> None:
        """Stand where the queue ends now."""
        ...

    def query(self) -> bool:
        """Tell whether the device has come this far."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Return the milliseconds from here to ``end``, both passed."""
        ...


class Overhead:
    """Seconds by kind since they were last taken.

    Kinds may be nested in each other only if they are the same work; each counts for itself.

    Args:
        clock: seconds from any origin; a test gives one that stands still.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start with nothing spent."""
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._total: dict[str, float] = {}
        self._pending: list[tuple[str, Mark, Mark]] = []

    @contextmanager
    def time(self, kind: str, device: torch.device | None = None) -> Iterator[None]:
        """Add what the block takes to ``kind``.

        Args:
            kind: one of :data:`KINDS`.
            device: where the block's work is done, if that is not the host.  On a CUDA
                device the time is the stream's, between two events; the host's is not
                counted, because it only queues.

        Raises:
            KeyError: an unknown kind.
        """
        check_kind(kind)
        if device is not None and device.type == "cuda":
            begin, end = _events()
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._pending.append((kind, begin, end))
            return
        started = self._clock()
        try:
            yield
        finally:
            self.add(kind, self._clock() - started)

    def add(self, kind: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere.

        Raises:
            KeyError: an unknown kind.
        """
        check_kind(kind)
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Return the seconds by kind since the last call, and start afresh.

        Device work that is still under way is left for the next call.
        """
        waiting = []
        for kind, begin, end in self._pending:
            if end.query():
                self.add(kind, begin.elapsed_time(end) / 1e3)
            else:
                waiting.append((kind, begin, end))
        self._pending = waiting
        seconds, self._seconds = self._seconds, {}
        for kind, more in seconds.items():
            self._total[kind] = self._total.get(kind, 0.0) + more
        return _ordered(seconds)

    @property
    def total(self) -> dict[str, float]:
        """All seconds by kind that were taken so far."""
        return _ordered(self._total)


def overhead_text(seconds: Mapping[str, float]) -> str:
    """Return seconds by kind in words: ``1.5 s (update 1.2 s, collective 300 ms)``."""
    most_first = sorted(seconds.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{kind} {seconds_text(taken)}" for kind, taken in most_first)
    return f"{seconds_text(sum(seconds.values()))} ({parts})"


def seconds_text(seconds: float) -> str:
    """Return a time with three digits: ``85 µs``, ``12.3 ms``, ``4.56 s``, ``1,234 s``."""
    for size, unit in ((1e-6, "µs"), (1e-3, "ms")):
        if seconds < 0.9995 * size * 1e3:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def check_kind(kind: str) -> None:
    """Refuse a kind that no report would show.

    Raises:
        KeyError: it is none of :data:`KINDS`.
    """
    if kind not in KINDS:
        raise KeyError(f"'{kind}' is no kind of cost; known: {', '.join(KINDS)}")


def _ordered(seconds: Mapping[str, float]) -> dict[str, float]:
    return {kind: seconds[kind] for kind in KINDS if kind in seconds}


def _events() -> tuple[Mark, Mark]:
    import torch

    event: Any = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)
