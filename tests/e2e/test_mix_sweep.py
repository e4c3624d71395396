"""``tools/mix.py sweep`` from the command line, killed in its middle and begun again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support import kills, runs, studies

from megatron.config import load_config
from megatron.experiments.table import read_table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sweep")
    runs.make_data(place / "data")
    # Long enough that a kill finds a run between two of its checkpoints.
    studies.base(place, train_iters=120, save_interval=10, eval_interval=60)
    return place


def words(folder: Path) -> list[str]:
    design = ["--design", "one-hot", "--ceiling", "0.8", "--seeds", "1"]
    files = [str(folder / "base.yml"), "--out", str(folder / "out")]
    return ["sweep", *files, *design]


def steps(folder: Path) -> dict[str, int]:
    return {path.name: runs.steps_done(path) for path in (folder / "runs").glob("*")}


def test_a_killed_sweep_goes_on_without_repeating_a_finished_run(folder):
    shown = runs.tool("mix.py", *words(folder), "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "3 runs, 46.1k tokens" in shown.stdout
    assert not (folder / "runs").exists()

    shown = kills.go_on(folder, *words(folder))
    assert "1 of 3 runs are finished already" in shown
    assert set(steps(folder).values()) == {120}
    _check_results(folder)


def _check_results(folder: Path) -> None:
    rows = read_table(folder / "out")
    assert len(rows) == 3 * 3 * 4  # runs, steps 0, 60 and 120 with its test, domains
    ends = [row for row in rows if row["last"] and row["split"] == "valid"]
    mean = {
        name: sum(row["loss"] for row in ends if row["run"] == name) / 3
        for name in {row["run"] for row in ends}
    }
    best = min(mean, key=lambda name: mean[name])
    weights = {row["domain"]: row["start_weight"] for row in ends if row["run"] == best}
    written = yaml.safe_load((folder / "out" / "mixture.yml").read_text())
    assert written["mixing"]["weights"] == pytest.approx(weights)
    files = [str(folder / "base.yml"), str(folder / "out" / "mixture.yml")]
    taken = load_config(files)
    assert {name: domain.weight for name, domain in taken.domains.items()} == pytest.approx(weights)
    assert f"| {best.split('-')[1]} |" in (folder / "out" / "summary.md").read_text()
    assert (folder / "out" / "table.parquet").stat().st_size > 0
    page = (folder / "out" / "report.html").read_text()
    assert "mix.py sweep" in page
    assert f"{mean[best]:.4f}" in page
    assert page.count('<a href="./../runs/') == 3
