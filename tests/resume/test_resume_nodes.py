"""A real run on two "nodes" of this machine: stopped on one command, resumed, the same run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support import runs

PROGRAMS = runs.ROOT / "tests/unit/launch/programs"


@pytest.mark.slow
def test_a_run_on_two_nodes_saves_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.make_data(tmp_path / "data")
    shell = tmp_path / "bin/pdsh"
    shell.parent.mkdir()
    shell.write_text(
        f'#!/bin/sh\nexec {sys.executable} {PROGRAMS / "standin_shell.py"} pdsh "$@"\n'
    )
    shell.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shell.parent}:{os.environ['PATH']}")
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")

    straight = runs.write_config(
        tmp_path / "straight.yml", runs.config(tmp_path / "data", tmp_path / "straight")
    )
    runs.train(straight)
    content = runs.config(tmp_path / "data", tmp_path / "nodes", master_port=29517)
    del content["num_gpus"]
    nodes = runs.write_config(
        tmp_path / "nodes.yml", {**content, "hostfile": str(tmp_path / "hosts")}
    )
    live = runs.LiveRun(nodes)
    live.wait_for_step(6)
    live.process.send_signal(signal.SIGTERM)
    assert live.process.wait(timeout=120) == 143, live.text()
    assert "asked 2 rank(s) on 2 hosts" in live.text()
    runs.train(nodes)
    runs.assert_same_run(tmp_path / "straight", tmp_path / "nodes", 24)
