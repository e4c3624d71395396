"""One piece of work at a time on a thread beside the main one."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """Runs one piece of work beside the caller, who hears of its failure by :meth:`wait`."""

    def __init__(self, name: str) -> None:
        """Do nothing yet; ``name`` is the thread's."""
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether the work has ended with an error that nobody has heard of."""
        return self._error is not None

    def start(self, work: Callable[[], None]) -> None:
        """Begin ``work``, once what was begun before has ended well."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # A daemon: a process that must end does not wait for it.
        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the work has ended; return False if it still goes on after ``timeout``.

        Raises:
            BaseException: what the work has ended with; once.
        """
        if self._thread is None:
            return True
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
        return True
