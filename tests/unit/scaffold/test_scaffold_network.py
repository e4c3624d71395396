"""Neither importing anything of ours nor the tests speak to another machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.network_watch import watched
from support.source import ROOT, python_files


def test_importing_everything_opens_no_connection(tmp_path: Path) -> None:
    modules = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in python_files("megatron", "deepy.py", "train.py", "evaluate.py", "generate.py")
    ]
    assert len(modules) > 300
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)"
    done, found = watched(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert found == []


def test_a_connection_would_be_noticed(tmp_path: Path) -> None:
    code = """
import contextlib, socket, subprocess, sys
with contextlib.suppress(OSError):
    socket.create_connection(("127.0.0.1", 1))
with contextlib.suppress(OSError):
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9))
subprocess.run([sys.executable, "-c", "import socket; socket.getaddrinfo('example.invalid', 80)"])
"""
    done, found = watched(tmp_path, "-c", code)
    assert [line.split()[:2] for line in found] == [
        ["socket.sendto", "192.0.2.1"],
        ["socket.getaddrinfo", "example.invalid"],
    ], done.stderr


SESSION = """
import subprocess, sys

def test_that_asks_for_a_host():
    code = "import socket; socket.getaddrinfo('example.invalid', 80)"
    assert subprocess.run([sys.executable, "-c", code]).returncode
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_a_session_of_tests_that_connects_fails(tmp_path: Path, workers: tuple[str, ...]) -> None:
    """All tests run in such a session: nothing of them connects elsewhere where they pass."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_one.py").write_text(SESSION)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout
    assert "socket.getaddrinfo example.invalid" in done.stdout
    assert done.returncode == 1
