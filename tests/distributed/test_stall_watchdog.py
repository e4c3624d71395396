"""Two real ranks, one of which never comes: who says what, and how the run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import runs

STALL = {"stall_report": 3, "stall_timeout": 8, "train_iters": 4000, "eval_interval": 4000}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    runs.make_data(tmp_path / "data")
    content = runs.config(tmp_path / "data", tmp_path / "run", save_interval=4000, **STALL)
    return runs.write_config(tmp_path / "run.yml", content)


@pytest.fixture
def live(file: Path) -> Iterator[runs.LiveRun]:
    run = runs.LiveRun(file)
    yield run
    run.end()


def test_a_rank_held_in_the_reader_is_named(file: Path, tmp_path: Path) -> None:
    program = runs.ROOT / "tests/support/slow_reader.py"
    done = subprocess.run(
        [sys.executable, str(runs.ROOT / "deepy.py"), str(program), str(file)],
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if "still at" in line]
    assert said, done.stderr
    assert "rank 1 on " in said[-1]
    assert "is still at 'reading the batch of step 4' for" in said[-1]
    assert "(likely the cause); rank 0 waits in 'forward and backward of step 4'" in said[-1]
    assert done.stderr.splitlines()[-1].startswith("error: nothing has moved for stall_timeout = 8")
    # Its own log says where in the program it hangs.
    log = (tmp_path / "run/logs/rank_1.log").read_text(encoding="utf-8")
    assert "time.sleep(3600)" in log


@pytest.mark.slow
def test_a_stopped_rank_is_reported_as_not_answering(live: runs.LiveRun) -> None:
    live.wait_for_step(4)
    stopped = [p for p, line in live.family().items() if "train.py" in line and _rank(p) == "1"]
    assert len(stopped) == 1
    os.kill(stopped[0], signal.SIGSTOP)
    end = time.monotonic() + 120
    while live.process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    assert live.process.poll() == 1, live.text()
    assert "rank 1 on" in live.text()
    assert "does not answer: stopped, gone or cut off (likely the cause); rank 0" in live.text()


@pytest.mark.slow
def test_the_others_speak_where_the_first_rank_is_stopped(live: runs.LiveRun) -> None:
    live.wait_for_step(4)
    stopped = [p for p, line in live.family().items() if "train.py" in line and _rank(p) == "0"]
    os.kill(stopped[0], signal.SIGSTOP)
    end = time.monotonic() + 120
    while live.process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    assert live.process.poll() == 1, live.text()
    assert "and rank 0, which collects the places of all ranks, does not answer" in live.text()


def _rank(pid: int) -> str:
    """Return the rank of a process by its environment; guardians have it too, with other words."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    if b"megatron.launch" in line or b"deepy.py" in line:
        return ""
    return next((w[5:].decode() for w in words if w.startswith(b"RANK=")), "")
