"""In every layout a run killed at a random step goes on as if nothing had happened, to the bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support import relayout, runs
from support.cells import Cell
from support.pool import RankPools

STEPS = 14
FIRST_SAVE = 3  # of runs.config: a run that has gone on after it has a checkpoint
PATIENCE = 900.0  # four ranks on two busy cores take their time


CELLS = (
    Cell(1, 1, 2, 1),
    Cell(1, 1, 2, 2),
    Cell(1, 1, 2, 3),
    Cell(2, 1, 1, 1),
    Cell(2, 1, 2, 1),
    Cell(2, 1, 2, 2),
    Cell(2, 1, 2, 3),
    Cell(1, 2, 1, 1),
    Cell(1, 2, 2, 1),
    Cell(2, 2, 1, 1),
    Cell(1, 1, 1, 2),
    Cell(1, 2, 2, 1),
)
METHODS: dict[str, dict[str, Any]] = {
    "static": {"method": "static"},
    "odm": {"method": "odm", "draw": "multinomial", "lag": 1},
}
# Tied weights in both kinds of method.
SHORT = {(Cell(1, 2, 1, 1), "odm")}


def write(file: Path, data: Path, run_dir: Path, cell: Cell, method: str) -> Path:
    content = runs.config(
        data,
        run_dir,
        num_gpus=cell.ranks,
        model_parallel_size=cell.tensor,
        pipe_parallel_size=cell.pipe,
        zero_optimization={"stage": cell.stage},
        no_weight_tying=method == "static",
        train_iters=STEPS,
        train_micro_batch_size_per_gpu=1,
        mixing=METHODS[method],
    )
    return runs.write_config(file, content)


@pytest.mark.parametrize(
    ("cell", "method"),
    [
        pytest.param(cell, method, marks=[] if (cell, method) in SHORT else [pytest.mark.slow])
        for cell in CELLS
        for method in METHODS
    ],
    ids=str,
)
def test_killed_in_any_layout(tmp_path: Path, pools: RankPools, cell: Cell, method: str) -> None:
    data = tmp_path / "data"
    runs.make_data(data)
    undisturbed = write(tmp_path / "whole.yml", data, tmp_path / "whole", cell, method)
    assert pools.call(relayout.train, cell.ranks, undisturbed) == [0] * cell.ranks

    chance = random.Random(f"{cell} {method}")
    # DeepSpeed takes names of folders for patterns.
    run_dir = tmp_path / "run [1+1]"
    file = write(tmp_path / "config.yml", data, run_dir, cell, method)
    live = runs.LiveRun(file)
    try:
        live.wait_for_step(chance.randint(FIRST_SAVE + 1, STEPS - 4), timeout=PATIENCE)
        time.sleep(chance.random() * 0.1)
        for pid in list(live.family()):
            os.kill(pid, signal.SIGKILL)
    finally:
        live.end()
    kept = runs.steps_done(run_dir)
    assert kept < STEPS, "the run had ended before it could be killed"
    done = runs.train(file, timeout=PATIENCE)
    assert "loaded" in done.stdout
    runs.assert_same_run(tmp_path / "whole", run_dir, STEPS)
