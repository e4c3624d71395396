"""What a run writes about itself when it is asked to, and checkpoints without an optimizer."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from support import runs


@pytest.mark.option("wall_clock_breakdown", "flops_profiler", "comms_logger", "dump_state")
@pytest.mark.option("csv_monitor", "steps_per_print")
@pytest.mark.option("no_save_optim", "checkpoint_validation_with_forward_pass")
def test_a_run_that_is_asked_for_everything(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data")
    folder = tmp_path / "run"
    asked = {
        "train_iters": 4,
        "eval_interval": 100,
        "save_interval": 2,
        "log_interval": 4,
        "steps_per_print": 1,
        "zero_optimization": {"stage": 2},
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": True, "profile_step": 2, "top_modules": 2},
        "comms_logger": {"enabled": True, "verbose": False},
        "dump_state": True,
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path / "tables")},
        "no_save_optim": True,
        "checkpoint_validation_with_forward_pass": True,
    }
    file = runs.write_config(
        tmp_path / "config.yml", runs.config(tmp_path / "data", folder, **asked)
    )
    done = runs.run("train.py", file)
    assert done.returncode == 0, done.stderr
    shown = [int(step) for step in re.findall(r"^step +(\d+)/4 · loss", done.stdout, re.M)]
    assert shown == [1, 2, 3, 4]
    assert re.search(r"forward \d+\.\d ms", done.stdout)
    _check_measured(folder, tmp_path / "tables")
    names = {path.name for path in (folder / "checkpoints" / "global_step4").iterdir()}
    assert any("model_states" in name for name in names)
    assert not any("optim_states" in name for name in names)

    changes = ("train_iters=6", "no_load_optim=true", "model_parallel_size=2")
    on = runs.run("train.py", file, *(word for one in changes for word in ("--set", one)))
    assert on.returncode == 0, on.stderr
    assert "a forward pass of the loaded weights gives what it gave" in on.stdout
    assert "ended after step 6 of 6" in on.stdout


def _check_measured(folder: Path, tables: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in lines if "loss" in line}
    assert sorted(logged) == [1, 4]
    parts = [logged[4][f"timers/{name}"] for name in ("forward", "backward", "optimizer")]
    assert all(0 < part < logged[4]["seconds"] for part in parts)
    assert logged[4]["timers/batch generator"] >= 0
    profile = (folder / "profile" / "flops.txt").read_text()
    assert "operations of step 2" in profile
    assert "most expensive at depth 2" in profile
    sent = json.loads((folder / "profile" / "communication.json").read_text())
    assert sum(size["count"] for sizes in sent.values() for size in sizes.values()) > 0
    state = json.loads((folder / "deepspeed.json").read_text())
    assert state["given"]["zero_optimization"]["stage"] == state["zero_stage"] == 2
    assert state["parameters"]
    with (tables / "train_learning_rate.csv").open(newline="") as table:
        rows = list(csv.reader(table))
    assert rows[0] == ["step", "train/learning_rate"]
    assert [(int(step), float(rate)) for step, rate in rows[1:]] == [
        (step, logged[step]["learning_rate"]) for step in (1, 4)
    ]
