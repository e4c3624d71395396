"""Runs a Python program, and its children, in an interpreter that notes what it connects to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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
    line = f"{event} {host} {' '.join(sys.argv)[:200]}\\n"
    descriptor = os.open(os.environ["NETWORK_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, line.encode())
    os.close(descriptor)

sys.addaudithook(_watch)
"""


def watched(
    folder: Path, *words: str, python: Sequence[str] = ()
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run ``python WORDS``; return it, and a line for each address that is not this machine's.

    What C++ does without Python (gloo, NCCL) is not seen.

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
    return done, log.read_text(encoding="utf-8").splitlines() if log.exists() else []
