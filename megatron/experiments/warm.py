"""Starting runs out of a process that has done their imports."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from megatron.launch import wire
from megatron.launch.process import die_with_parent

_IMPORT_SECONDS = 120.0
_ANSWER_SECONDS = 20.0
_END_SECONDS = 5.0
_PROGRAM = (
    "import sys; root = sys.argv[1]; sys.path[:] = [root, *filter(None, sys.path)]; "
    "from megatron.experiments.forking import serve; serve(int(sys.argv[2]))"
)


class WarmRun:
    """A run that was forked; what the runner asks of ``subprocess.Popen``.

    Attributes:
        pid: its process, which leads a session of its own.
        returncode: None until :meth:`poll` has found it ended; −n if signal n killed it.
    """

    def __init__(self, pid: int, parent: WarmParent) -> None:
        """Take note of a process that ``parent`` started."""
        self.pid = pid
        self.returncode: int | None = None
        self._parent = parent

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        if self.returncode is None:
            self._parent.listen(0.0)
        return self.returncode

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        while self.returncode is None:
            self._parent.listen(None)
        return self.returncode


class WarmParent:
    """A process that has imported what runs need, and forks them (:mod:`.forking`).

    It starts with the object and dies with this process; its runs die with it.  It can fail
    at any time: then :meth:`start` returns None, and runs are started without it.
    """

    def __init__(self, root: Path, environment: Mapping[str, str]) -> None:
        """Start it; it imports while this process goes on.

        Args:
            root: folder of ``train.py``.
            environment: of it and of all its runs.

        Raises:
            OSError: no process can be started.
        """
        self.environment = dict(environment)
        self.trouble: str | None = None
        """Why it can start no more runs; None: nothing is wrong."""
        self._ready = False
        self._runs: dict[int, WarmRun] = {}
        self._answer: WarmRun | None = None
        self._give_up = time.monotonic() + _IMPORT_SECONDS
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed with it)
        self._connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = os.getpid()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", _PROGRAM, str(root), str(other.fileno())],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(other.fileno(),),
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(own),
            )
        except BaseException:
            self._connection.close()
            self._output.close()
            raise
        finally:
            other.close()

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def settled(self) -> bool:
        """Tell whether it has done its imports, or has failed to."""
        if not self._ready and self.trouble is None:
            self.listen(0.0)
            if not self._ready and time.monotonic() > self._give_up:
                self._fail(f"no sign of it after {_IMPORT_SECONDS:g} s")
        return self._ready or self.trouble is not None

    def start(self, arguments: Sequence[str], output: IO[bytes]) -> WarmRun | None:
        """Fork a run.

        Args:
            arguments: its ``sys.argv``.
            output: where its standard output and errors go.

        Returns:
            The run; None if it cannot be started this way (``trouble`` says why).
        """
        if not self._ready or self.trouble is not None:
            return None
        self._answer = None
        order = {"start": list(arguments), "cwd": os.getcwd()}
        try:
            wire.send(self._connection, order, (output.fileno(),))
        except OSError as error:
            self._fail(str(error))
            return None
        give_up = time.monotonic() + _ANSWER_SECONDS
        while self._answer is None and self.trouble is None:
            self.listen(max(0.0, give_up - time.monotonic()))
            if self._answer is None and time.monotonic() > give_up:
                self._fail(f"no answer for {_ANSWER_SECONDS:g} s")
        return self._answer

    def listen(self, seconds: float | None) -> None:
        """Take what it has to say, waiting ``seconds`` for it (None: until it says something)."""
        wait = seconds
        while self._connection.fileno() >= 0:
            readable, _, _ = select.select([self._connection], [], [], wait)
            if not readable:
                return
            message, _ = wire.receive(self._connection)
            if message is None:
                self._fail(self._last_words())
                return
            self._take(message)
            wait = 0.0

    def close(self) -> None:
        """End it and whatever runs are left."""
        self._fail("it was closed")

    def _take(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self._ready = True
        elif "started" in message:
            self._answer = WarmRun(message["started"], self)
            self._runs[self._answer.pid] = self._answer
        elif "ended" in message:
            self._runs.pop(message["ended"]).returncode = message["code"]
        else:
            # It keeps watching over the runs that it has started.
            self.trouble = self.trouble or message["unfit"]

    def _fail(self, why: str) -> None:
        """Have done with it: its runs die with it."""
        self.trouble = self.trouble or why
        if self._connection.fileno() < 0:
            return
        self._connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._runs else _END_SECONDS)
        self._process.kill()
        self._process.wait()
        self._output.close()
        for run in self._runs.values():
            run.returncode = -signal.SIGKILL
        self._runs.clear()

    def _last_words(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", errors="replace").rstrip().splitlines()
        return f"it ended ({lines[-1]})" if lines else "it ended"
