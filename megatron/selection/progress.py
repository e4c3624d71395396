"""How a long scoring shows itself: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Final, TextIO

_PLAIN_SECONDS: Final = 10.0


class Progress:
    """Documents done, documents per second, and the time left."""

    def __init__(self, *, total: int, done: int, what: str, stream: TextIO | None = None) -> None:
        """Start reporting.

        Args:
            total: documents in all.
            done: of them by earlier runs.
            what: is being done ("scored").
            stream: where to; standard error if None.
        """
        self._stream = stream or sys.stderr
        self._total, self._first, self._done, self._what = total, done, done, what
        self._started = self._last = time.monotonic()
        self._bar = self._make_bar() if self._stream.isatty() else None

    def add(self, documents: int) -> None:
        """Count documents, and report if it is time to."""
        self._done += documents
        if self._bar is not None:
            self._bar.update(documents)
            return
        now = time.monotonic()
        if now - self._last < _PLAIN_SECONDS:
            return
        self._last = now
        speed = (self._done - self._first) / max(now - self._started, 1e-9)
        left = (self._total - self._done) / max(speed, 1e-9)
        print(
            f"{self._done:,} of {self._total:,} documents {self._what}, {speed:,.0f} a second, "
            f"{_duration(left)} left",
            file=self._stream,
            flush=True,
        )

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def _make_bar(self) -> Any:
        try:
            import tqdm
        except ImportError:
            return None
        return tqdm.tqdm(
            total=self._total,
            initial=self._first,
            unit=" documents",
            unit_scale=True,
            dynamic_ncols=True,
            desc=self._what,
            file=self._stream,
        )


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
