"""Neither importing anything of ours nor the tests speak to another machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.network_watch import watched
from support.source import ROOT, python_files

# Where a library would like to look something up: hubs, tokenizers, launchers, evaluation.
SAMPLE = (
    "tests/unit/launch",
    "tests/unit/exchange",
    "tests/unit/corpora",
    "tests/unit/inference",
    "tests/unit/tokenizer",
    "tests/unit/checkpoint",
    "tests/unit/monitor",
    "tests/distributed/test_training_nonfinite.py",
)


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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tests_open_no_connection(tmp_path: Path) -> None:
    there = [name for name in SAMPLE if (ROOT / name).exists()]
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *there)
    done, found = watched(tmp_path, *words)
    assert done.returncode == 0, done.stdout[-3000:]
    assert found == []
