"""The wish to save and stop, as a rank sees it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType, TracebackType

EXIT_SAVED = 143
EXIT_INTERRUPTED = 130

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """A flag raised by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1: save, then stop.

    The handler only sets the flag; a step is never cut short.  The loop carries
    :attr:`requested` in the step's all-reduce, so that all ranks learn of it after the
    same step, save, and end with :attr:`exit_code`.

    Usage::

        with StopFlag() as stop:
            ...
            buffer[-1] = float(stop.requested)     # max- or sum-reduced over the ranks
    """

    def __init__(self, signals: Iterable[signal.Signals] = STOP_SIGNALS) -> None:
        """Make a lowered flag that :meth:`install` will tie to ``signals``."""
        self._signals = tuple(signals)
        self._received: int | None = None
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to save and stop."""
        return self._received is not None

    @property
    def signal_name(self) -> str | None:
        """Name of the first signal that arrived, for the log; ``None`` if there was none."""
        return None if self._received is None else signal.Signals(self._received).name

    @property
    def exit_code(self) -> int:
        """Code to end with once saved: 143, whichever signal it was and whichever rank got it."""
        return EXIT_SAVED

    def request(self, signum: int = signal.SIGTERM) -> None:
        """Raise the flag as if ``signum`` had arrived; the first one counts."""
        if self._received is None:
            self._received = int(signum)

    def install(self) -> StopFlag:
        """Take over the signals (main thread only) and return self."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("signal handlers can only be installed from the main thread")
        for signum in self._signals:
            if signum not in self._previous:
                self._previous[signum] = signal.signal(signum, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
        return self

    def restore(self) -> None:
        """Give the signals back to whoever had them before :meth:`install`."""
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # type: ignore[arg-type]

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self.request(signum)

    def __enter__(self) -> StopFlag:
        return self.install()

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.restore()
