"""Interpreters that note what they connect to: of a program, or of a whole session of tests.

What C++ does without Python (gloo, NCCL) is not seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.source import ROOT

# Read at the start of every interpreter (PYTHONPATH), before anything else is imported.
_WATCH = """
import os, sys

def _watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) and address else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if not isinstance(host, str) or not host:
        return  # a socket of this machine's file system, or any address of this machine
    own = ("localhost", "::1", "0.0.0.0", "::", os.uname().nodename)
    if host.startswith("127.") or host in own:
        return
    if event == "socket.getaddrinfo" and (":" in host or host.replace(".", "").isdigit()):
        return  # an address, which nobody is asked for
    where = os.environ.get("PYTEST_CURRENT_TEST", "") or " ".join(sys.argv)[:200]
    line = f"{event} {host} {where}\\n"
    descriptor = os.open(os.environ["NETWORK_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, line.encode())
    os.close(descriptor)

sys.addaudithook(_watch)
"""


def watched(
    folder: Path, *words: str, python: Sequence[str] = ()
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run ``python WORDS``; return it, and a line for each address that is not this machine's.

    Args:
        folder: an empty one.
        words: of the command line.
        python: the interpreter, and what stands before it; this one if not given.
    """
    (folder / "sitecustomize.py").write_text(_WATCH, encoding="utf-8")
    log = folder / "connections"
    done = subprocess.run(
        [*(python or [sys.executable]), *words],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "NETWORK_LOG": str(log),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done, _lines(log)


class SessionWatch:
    """A plugin of pytest: a session in which anything connects elsewhere fails, and says so."""

    def __init__(self) -> None:
        """Watch this process, and the interpreters that it starts from now on."""
        self.folder = tempfile.TemporaryDirectory(prefix="network-watch-")
        folder = Path(self.folder.name)
        self.log = folder / "connections"
        (folder / "sitecustomize.py").write_text(_WATCH, encoding="utf-8")
        paths = (self.folder.name, os.environ.get("PYTHONPATH", ""))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        os.environ["NETWORK_LOG"] = str(self.log)
        exec(_WATCH, {})

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Let the session fail."""
        if _lines(self.log) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what was connected to."""
        found = _lines(self.log)
        if found:
            terminalreporter.section("connections to other machines", red=True)
            terminalreporter.write_line("\n".join(found))


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8").splitlines() if log.exists() else []
