"""The guardian of one rank: ``python -m megatron.launch.rank SCRIPT ARGUMENTS…``.

DeepSpeed's launcher starts one guardian per rank.  The guardian starts the rank, keeps
its error output, and tells the supervisor (``deepy.py``) how it ended; it stays until
the supervisor lets it go, so that the launcher does not see a failed rank and begin to
kill the others in its own way.  Guardian and rank die with their parent.

Without a supervisor the guardian becomes the rank.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from megatron.launch import wire
from megatron.launch.process import die_with_parent

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_TAIL_LINES, _TAIL_BYTES = 60, 8192
_BURST_SECONDS = 20.0
_COMPLAINT = re.compile(rb"^(Traceback \(most recent call last\)|error: |\w*Error\b)", re.MULTILINE)


def main(arguments: list[str]) -> int:
    """Run the rank and return its exit code as a shell would give it."""
    command = [sys.executable, "-u", *arguments]
    environment = _rank_environment()
    address = os.environ.get(wire.SUPERVISOR_VARIABLE)
    if not address:
        die_with_parent()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        os.execve(command[0], command, environment)
    with wire.make_socket() as connection:
        connection.connect("\0" + address)
        wire.send(connection, {"hello": int(os.environ.get("RANK", "0")), "pid": os.getpid()})
        orders, fds = wire.receive(connection)
        if orders is None:
            return 1
        die_with_parent(int(orders["launcher"]))
        return _Guardian(connection, orders, fds).run(command, environment)


def _rank_environment() -> dict[str, str]:
    environment = dict(os.environ)
    environment.pop("PYTHONSAFEPATH", None)
    if environment.get("DS_ACCELERATOR") == "cpu":
        # DeepSpeed's launcher sets it to the rank numbers even for its CPU accelerator.
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


class _Output:
    """The rank's captured output: into its log, to the user if live, and the end kept."""

    def __init__(self, log: Path, live: int | None) -> None:
        self._targets: dict[str, int] = {} if live is None else {"the terminal": live}
        try:
            self._targets[str(log)] = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            self._complain(str(log), error)
        self._tail: deque[bytes] = deque(maxlen=_TAIL_LINES)
        self._partial = b""
        self.spoke: float | None = None

    def write(self, data: bytes) -> None:
        if _COMPLAINT.search(self._partial + data):
            # When its last trouble began: a failing rank may complain again while it ends.
            now = time.monotonic()
            if self.spoke is None or now - self.spoke > _BURST_SECONDS:
                self.spoke = now
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._tail.extend(lines)
        for name, descriptor in list(self._targets.items()):
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
            except OSError as error:
                # A full disk or a closed terminal must not stop the training.
                del self._targets[name]
                self._complain(name, error)

    def tail(self) -> list[str]:
        text = b"\n".join([*self._tail, self._partial])[-_TAIL_BYTES:]
        return text.decode("utf-8", errors="replace").rstrip().splitlines()

    def _complain(self, name: str, error: OSError) -> None:
        message = f"neomix: output is no longer written to {name}: {error.strerror}\n".encode()
        for descriptor in self._targets.values():
            try:
                os.write(descriptor, message)
            except OSError:
                continue


class _Guardian:
    """One rank's process, output and line to the supervisor."""

    def __init__(
        self, connection: socket.socket, orders: Mapping[str, Any], fds: list[int]
    ) -> None:
        self._connection = connection
        self._live = bool(orders["live"]) and len(fds) == 2
        self._stdout = fds[0] if self._live else None
        self._output = _Output(Path(orders["log"]), fds[1] if self._live else None)
        self._process: subprocess.Popen[bytes] | None = None
        self._wake = -1

    def run(self, command: list[str], environment: dict[str, str]) -> int:
        for signum in FORWARDED:
            signal.signal(signum, self._forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
        reading, writing = os.pipe()
        self._wake, waker = os.pipe()
        for descriptor in (self._wake, waker, reading):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # only to be woken
        guardian = os.getpid()
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=writing if self._stdout is None else self._stdout,
            stderr=writing,
            preexec_fn=lambda: die_with_parent(guardian),
        )
        os.close(writing)
        self._tell({"started": self._process.pid})
        code = self._watch(self._process, reading)
        at = self._output.spoke or time.monotonic()
        self._tell({"ended": code, "at": at, "tail": self._output.tail()})
        wire.receive(self._connection)
        return code if code >= 0 else 128 - code

    def _watch(self, process: subprocess.Popen[bytes], reading: int) -> int:
        with selectors.DefaultSelector() as selector:
            for source in (reading, self._wake, self._connection.fileno()):
                selector.register(source, selectors.EVENT_READ)
            while True:
                code = process.poll()
                if code is not None:
                    self._drain(reading)
                    return code
                for key, _ in selector.select(timeout=1.0):
                    if key.fd == self._wake:
                        os.read(self._wake, 4096)
                    elif key.fd == reading:
                        if not self._copy(reading):
                            selector.unregister(reading)
                    elif wire.receive(self._connection)[0] is None:
                        process.kill()
                        selector.unregister(self._connection)

    def _copy(self, reading: int) -> bool:
        """Pass one piece of output on; False at its end."""
        try:
            data = os.read(reading, 65536)
        except BlockingIOError:
            return True
        self._output.write(data)
        return bool(data)

    def _drain(self, reading: int) -> None:
        # Children of the rank may hold the pipe open: what is there counts, not its end.
        for _ in range(256):
            try:
                data = os.read(reading, 65536)
            except BlockingIOError:
                return
            if not data:
                return
            self._output.write(data)

    def _tell(self, message: Mapping[str, Any]) -> None:
        try:
            wire.send(self._connection, message)
        except OSError:
            if self._process is not None:
                self._process.kill()

    def _forward(self, signum: int, _frame: FrameType | None) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signum)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
