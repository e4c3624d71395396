"""``tools/mix.py fidelity`` from the command line, killed among its children and begun again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import kills, runs, studies

from megatron.checkpoint.bundle import read_bundle
from megatron.experiments.table import Row, read_table, tag

pytestmark = pytest.mark.slow

NAMES = ("walk", "noise")
AIOLI = {"method": "aioli", "update_every": 20, "lp_rounds": 1, "lp_steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fidelity")
    runs.make_data(place / "data")
    studies.base(
        place,
        train_iters=60,
        eval_interval=20,
        domains={name: {"train": str(place / "data" / name)} for name in NAMES},
        mixing={**AIOLI, "validation_samples": 16},
    )
    return place


def words(folder: Path) -> list[str]:
    files = [str(folder / "base.yml"), "--out", str(folder / "out")]
    return ["fidelity", *files, "--points", "2", "--child-steps", "8", "--methods", "aioli", "odm"]


def test_a_killed_comparison_goes_on_from_its_cache(folder: Path) -> None:
    shown = runs.tool("mix.py", *words(folder), "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "14 runs" in shown.stdout  # two methods, two points each, three children a point
    assert not (folder / "runs").exists()

    kills.kill_once(folder, lambda: len(kills.finished(folder)) >= 3, *words(folder))
    before = {name: kills.stamp(folder / "runs" / name) for name in kills.finished(folder)}
    assert 3 <= len(before) < 14

    again = runs.tool("mix.py", *words(folder))
    assert again.returncode == 0, again.stdout + again.stderr
    assert {name: kills.stamp(folder / "runs" / name) for name in before} == before
    assert len(kills.finished(folder)) == 14
    check_results(folder)

    third = runs.tool("mix.py", *words(folder))
    assert third.returncode == 0, third.stderr
    assert " started in " not in third.stdout


def check_results(folder: Path) -> None:
    found = json.loads((folder / "out" / "fidelity.json").read_text())
    assert found["methods"]["aioli"]["points"] == found["methods"]["odm"]["points"] == 2
    rows = read_table(folder / "out")
    folders = {run["run"]: Path(run["folder"]) for run in plan(folder)}
    for one in found["points"]:
        assert one["step"] in (20, 40)
        assert -1 <= one["fidelity"] <= 1
        # What the children measured is what the law gives back where it is exact.
        matrix, start = np.array(one["A_star"]), np.array(one["before"])
        assert (np.diag(matrix) > 0).all()  # training on a domain helps it
        ends = [
            row
            for row in rows
            if row["run"].startswith(f"{one['run']}-step-{one['step']}-child") and row["last"]
        ]
        assert len({row["run"] for row in ends}) == 3
        for row in ends:
            if row["split"] == "valid":
                shares = {r["domain"]: r["share"] for r in ends if r["run"] == row["run"]}
                place = one["measured"].index(row["domain"])
                told = start[place] - matrix[place] @ [shares[name] for name in one["domains"]]
                assert row["loss"] == pytest.approx(told, abs=0.02)
        state = read_bundle(folders[one["run"]] / "checkpoints" / f"global_step{one['step']}")
        own = state["planner"]["mixer"]["rule"]
        if one["method"] == "aioli":
            kept = [[own["smoothed"][i][j] for j in NAMES] for i in NAMES]
            assert one["A_method"] == kept
        else:
            assert one["A_method_sums"] == [own["estimate"][name] for name in NAMES]
    # Children start where their parent was at that step (on held-out windows of their own).
    for label in ("aioli", "odm"):
        for at, other in ((20, 40), (40, 20)):
            start = average(rows, label=label, role="child", at=at, step=0)
            own, far = (average(rows, label=label, role="parent", step=s) for s in (at, other))
            assert abs(start - own) < abs(start - far)
    assert (
        f"| aioli | {found['methods']['aioli']['fidelity']:.3f} | 2 of 2 |"
        in (folder / "out" / "summary.md").read_text()
    )


def average(rows: list[Row], *, step: int, **tags: Any) -> float:
    """Return the mean loss over the domains and runs that have these tags."""
    mine = [r for r in rows if r["step"] == step and r["split"] == "valid"]
    mine = [r for r in mine if all(tag(r, name) == value for name, value in tags.items())]
    assert mine
    return float(np.mean([r["loss"] for r in mine]))


def plan(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "out" / "plan.json").read_text())["runs"]
