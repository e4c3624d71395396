"""Asked to stop, a run saves the step it is at on all ranks, and the same command goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support import runs

from megatron.checkpoint.store import CheckpointStore

STEPS = 90


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and an undisturbed run with a lag, accumulation and apportioned draws."""
    folder = tmp_path_factory.mktemp("signals")
    runs.make_data(folder / "data")
    file = write(folder, folder / "data")
    runs.train(file)
    return folder / "data", folder / "run"


def write(folder: Path, data: Path) -> Path:
    content = runs.config(
        data,
        folder / "run",
        train_iters=STEPS,
        save_interval=1000,
        keep_last_n_checkpoints=2,
        mixing={"method": "exp3", "lag": 1, "update_every": 3},
    )
    return runs.write_config(folder / "config.yml", content)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_signal_saves_and_the_run_goes_on(
    reference: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    data, whole = reference
    file = write(tmp_path, data)
    live = runs.LiveRun(file)
    try:
        live.wait_for_step(7)
        os.kill(live.process.pid, number)
        assert live.process.wait(timeout=90) == 143, live.text()
        assert not live.family()
    finally:
        live.end()
    steps = CheckpointStore(tmp_path / "run" / "checkpoints").steps()
    assert steps == [runs.steps_done(tmp_path / "run")]
    assert 7 <= steps[0] < STEPS
    runs.train(file)
    runs.assert_same_run(whole, tmp_path / "run", STEPS)


def test_a_second_run_in_the_folder_is_refused(
    reference: tuple[Path, Path], tmp_path: Path
) -> None:
    file = write(tmp_path, reference[0])
    live = runs.LiveRun(file)
    try:
        live.wait_for_step(1)
        second = runs.run("train.py", file)
        assert second.returncode == 2
        assert str(live.process.pid) in second.stderr
        assert "Traceback" not in second.stderr
        assert live.process.poll() is None
    finally:
        live.end()
