"""Checkpoints written behind the next steps are those of a save that is waited for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import held, relayout, runs
from support.pool import RankPools

STEPS, EVERY = 5, 2
EXPERTS = {
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_router_type": "topk",
    "moe_expert_parallel_size": 2,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data zero 1": {"num_gpus": 2},
    "data zero 2 bf16": {
        "num_gpus": 2,
        "zero_optimization": {"stage": 2},
        "precision": "bfloat16",
    },
    "data zero 3": {"num_gpus": 2, "zero_optimization": {"stage": 3}},
    "experts": {"num_gpus": 2, **EXPERTS},
    "tensor and pipe": {"num_gpus": 4, "model_parallel_size": 2, "pipe_parallel_size": 2},
}


def write(folder: Path, data: Path, *, behind: bool, **changes: Any) -> Path:
    content = {
        "train_iters": STEPS,
        "save_interval": EVERY,
        "eval_interval": 1000,
        "log_interval": 1,
        **changes,
        "async_save": behind,
    }
    folder.mkdir(parents=True, exist_ok=True)
    return runs.write_config(folder / "config.yml", runs.config(data, folder / "run", **content))


def files(folder: Path, step: int) -> dict[str, Any]:
    path = folder / "run" / "checkpoints" / f"global_step{step}" / "manifest.json"
    entries: dict[str, Any] = json.loads(path.read_text())["files"]
    return entries


@pytest.mark.parametrize(
    "layout",
    [
        name if name == "data zero 1" else pytest.param(name, marks=pytest.mark.slow)
        for name in LAYOUTS
    ],
)
def test_the_same_files_are_written_and_resumed_from(
    pools: RankPools, tmp_path: Path, layout: str
) -> None:
    data, settings = tmp_path / "data", LAYOUTS[layout]
    ranks = settings["num_gpus"]
    runs.make_data(data)
    whole, behind = tmp_path / "whole", tmp_path / "behind"
    for folder in (whole, behind):
        file = write(folder, data, behind=folder == behind, **settings)
        assert pools.call(relayout.train, ranks, file) == [0] * ranks
    for step in (2, 4, STEPS):
        assert runs.weights_hash(behind / "run", step) == runs.weights_hash(whole / "run", step)
        # Under ZeRO 3 a file also holds numbers that count the models of the process.
        if layout != "data zero 3":
            assert files(behind, step) == files(whole, step)  # to the byte
    checkpoints = behind / "run" / "checkpoints"
    shutil.rmtree(checkpoints / f"global_step{STEPS}")
    assert pools.call(relayout.train, ranks, file) == [0] * ranks
    runs.assert_same_run(whole / "run", behind / "run", STEPS)
    assert (checkpoints / "latest").read_text() == f"global_step{STEPS}\n"


def test_training_goes_on_meanwhile_and_whoever_needs_the_save_waits_for_it(
    pools: RankPools, tmp_path: Path
) -> None:
    runs.make_data(tmp_path / "data")
    file = write(tmp_path, tmp_path / "data", behind=True, train_iters=20)
    checkpoints = tmp_path / "run" / "checkpoints"
    for seen in pools.call(held.hold, 2, file, checkpoints):
        assert not seen["latest"]  # while it is written it does not count
        assert seen["back"] == ["global_step2"]
        assert seen["error"] == "as a step that is not finite"
    # The error came while the second was being written.
    assert held.complete(checkpoints) == [2, 4]
    assert (checkpoints / "latest").read_text() == "global_step4\n"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_that_is_full_behind_the_steps_ends_the_run_on_all_ranks(
    pools: RankPools, tmp_path: Path, victim: int
) -> None:
    runs.make_data(tmp_path / "data")
    told = {}
    for behind in (False, True):
        folder = tmp_path / str(behind)
        file = write(folder, tmp_path / "data", behind=behind, train_iters=20)
        results = pools.call(held.refuse, 2, file, victim)
        assert results[0] == results[1]  # after the same step, with the same words
        told[behind] = results[0]
        assert held.complete(folder / "run" / "checkpoints") == [2]
    for seen in told.values():
        assert "global_step4.tmp" in seen["error"]
        assert "No space left on device" in seen["error"]
        assert "bytes needed" in seen["error"] or "B) needed" in seen["error"]
        assert seen["code"] == 2
    assert told[False]["steps"] == 4
    assert told[True]["steps"] in (5, 6)  # at the latest when the next save is due
