"""How a long preprocessing run shows itself: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

_TERMINAL_SECONDS, _PLAIN_SECONDS = 0.2, 10.0


class Progress:
    """Reports documents, text per second and the time left."""

    def __init__(
        self,
        *,
        total_bytes: int,
        total_documents: int | None,
        log_interval: int,
        done_bytes: int = 0,
        stream: TextIO | None = None,
    ) -> None:
        """Start reporting.

        Args:
            total_bytes: bytes of all inputs on disk.
            total_documents: their documents, if the user knows.
            log_interval: documents between two reports, at least.
            done_bytes: input bytes done by an earlier run.
            stream: where to; standard error if None.
        """
        self._stream = stream or sys.stderr
        self._total_bytes = total_bytes
        self._total_documents = total_documents
        self._log_interval = log_interval
        self._first_bytes = done_bytes
        self._started = self._last = time.monotonic()
        self._reported = 0
        self._bar = self._make_bar(done_bytes) if self._stream.isatty() else None
        self._every = _PLAIN_SECONDS if self._bar is None else _TERMINAL_SECONDS

    def update(self, *, documents: int, text_bytes: int, input_bytes: int) -> None:
        """Report if it is time to: totals of this run, and input bytes done over all runs."""
        now = time.monotonic()
        if documents - self._reported < self._log_interval or now - self._last < self._every:
            return
        self._last, self._reported = now, documents
        speed = text_bytes / 1e6 / max(now - self._started, 1e-9)
        line = f"{documents:,} documents, {speed:.1f} MB/s of text"
        if self._bar is not None:
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.update(input_bytes - self._bar.n)
            return
        share = self._share(documents, input_bytes)
        left = (now - self._started) * (1 - share) / share if share > 0 else None
        eta = f", {_duration(left)} left" if left is not None else ""
        print(f"{line}, {100 * self._overall(documents, input_bytes):.0f} %{eta}",
              file=self._stream, flush=True)  # fmt: skip

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def _overall(self, documents: int, input_bytes: int) -> float:
        if self._total_documents and not self._first_bytes:
            return min(documents / self._total_documents, 1.0)
        return min(input_bytes / max(self._total_bytes, 1), 1.0)

    def _share(self, documents: int, input_bytes: int) -> float:
        """Return how much of what this run has to do is done."""
        if self._total_documents and not self._first_bytes:
            return self._overall(documents, input_bytes)
        ours = self._total_bytes - self._first_bytes
        return min((input_bytes - self._first_bytes) / max(ours, 1), 1.0)

    def _make_bar(self, done_bytes: int) -> Any:
        try:
            import tqdm
        except ImportError:
            return None
        return tqdm.tqdm(
            total=self._total_bytes,
            initial=done_bytes,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            file=self._stream,
            bar_format="{percentage:3.0f}% |{bar}| {elapsed} < {remaining} {postfix}",
        )


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
