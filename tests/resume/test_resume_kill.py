"""Killed at any moment, a run goes on as if nothing had happened, to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from support import runs

STEPS = 30
KINDS = ("rank", "launcher")  # those that leave something alive; more is row R2 of the campaign


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and a run over it that nobody disturbed."""
    folder = tmp_path_factory.mktemp("reference")
    runs.make_data(folder / "data")
    file = runs.write_config(
        folder / "config.yml", runs.config(folder / "data", folder / "run", train_iters=STEPS)
    )
    runs.train(file)
    return folder / "data", folder / "run"


def victims(live: runs.LiveRun, kind: str) -> list[int]:
    family = live.family()
    if kind == "launcher":
        return [live.process.pid]
    ranks = [
        pid
        for pid, line in family.items()
        if "train.py" in line
        and "megatron.launch" not in line
        and "deepy.py" not in line
        and "deepspeed.launcher" not in line
    ]
    return ranks[-1:]


@pytest.mark.parametrize("kind", KINDS)
def test_kill_9(reference: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    data, whole = reference
    chance = random.Random(f"{kind} 0")
    file = runs.write_config(
        tmp_path / "config.yml", runs.config(data, tmp_path / "run", train_iters=STEPS)
    )
    live = runs.LiveRun(file)
    try:
        live.wait_for_step(chance.randint(1, STEPS - 10))
        time.sleep(chance.random() * 0.2)
        assert live.process.poll() is None, "the run had ended before it could be killed"
        everyone = list(live.family())
        for pid in victims(live, kind):
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while runs.alive(everyone) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not runs.alive(everyone), f"left behind: {live.family()}\n{live.text()}"
    finally:
        live.end()
    runs.train(file)
    runs.assert_same_run(whole, tmp_path / "run", STEPS)
    again = runs.train(file)
    assert "nothing to do" in again.stdout
