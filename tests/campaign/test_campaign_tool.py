"""The campaign's command: a table, a file that is gone on with, and an exit code."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.campaign import catalogue
from support.campaign.row import Bench, Row, SkippedRowError, Trial, attempt, complete, run_row
from support.pool import RankPools
from support.source import ROOT

from megatron.errors import ConfigError

sys.path.insert(0, str(ROOT / "tools"))

import fault_campaign


def result(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "row": name, "trials": 5, "failures": 0, "told": [], "seconds": 1.0, "skipped": "",
        "fault": "a fault", "criterion": "a criterion", "wanted": 5, "seed": 0, "passed": True,
        "complete": True, **changes,
    }  # fmt: skip


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for the rows; return which were run."""
    names: list[str] = []

    def child(name: str, options: Any) -> dict[str, Any]:
        names.append(name)
        return result(name, passed=name != "R3", failures=int(name == "R3"), told=["it broke"])

    monkeypatch.setattr(fault_campaign, "_child", child)
    return names


def test_rows_that_passed_are_not_run_again(
    called: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deep" / "campaign.json"
    words = ["--json", str(file), "--rows"]
    assert fault_campaign.main([*words, "R2", "R8"]) == 0
    assert called == ["R2", "R8"]
    assert fault_campaign.main([*words, "R2", "R3", "R8"]) == 1
    assert called == ["R2", "R8", "R3"]
    printed = capsys.readouterr().out
    assert "| R3 | a fault | 5 | 1 | a criterion | **fail** | 1 |" in printed
    assert "it broke" in printed
    assert sorted(json.loads(file.read_text())["rows"]) == ["R2", "R3", "R8"]
    assert "| R8 | a fault | 5 | 0 |" in file.with_suffix(".md").read_text()
    # What failed is tried again, and another seed is another campaign.
    assert fault_campaign.main([*words, "R3"]) == 1
    assert fault_campaign.main([*words, "R8", "--seed", "1"]) == 0
    assert called[3:] == ["R3", "R8"]
    with pytest.raises(ConfigError, match="holds the column 'ci'"):
        fault_campaign.main([*words, "R8", "--column", "release"])


def test_an_unknown_row_is_refused(called: list[str]) -> None:
    with pytest.raises(ConfigError, match="no row 'R99'"):
        fault_campaign.main(["--rows", "R99"])
    assert not called


def test_a_row_that_is_cut_short_says_so() -> None:
    told = fault_campaign.table([result("R2", trials=3, complete=False)])
    assert "| 3 of 5 | 0 | a criterion | no failure yet |" in told
    told = fault_campaign.table([result("R2", skipped="no root", passed=False)])
    assert "not run: no root" in told


def test_one_row_for_real(tmp_path: Path) -> None:
    file = tmp_path / "campaign.json"
    words = ["--rows", "R10", "--trials", "3", "--json", str(file)]
    assert fault_campaign.main(words) == 0
    (row,) = json.loads(file.read_text())["rows"].values()
    assert (row["trials"], row["failures"], row["complete"]) == (3, 0, False)
    assert row["fault"] == catalogue.row("R10").fault


def make_row(run: Any, **changes: Any) -> Row:
    return Row(name="R1", fault="", criterion="", run=run, ci=1, release=1, **changes)


def test_what_a_tally_counts(tmp_path: Path, pools: RankPools) -> None:
    bench = Bench(folder=tmp_path, seed=0, row="R1", column="ci", pools=pools)

    def trials(bench: Bench, wanted: int) -> Any:
        yield Trial(count=9)
        yield attempt(lambda: 1 / 0)
        raise ValueError("and then it ended")

    tally = run_row(make_row(trials), bench, 3)
    assert (tally.trials, tally.failures) == (11, 2)
    assert "ZeroDivisionError" in tally.told[0]
    assert "and then it ended" in tally.told[1]
    assert not tally.passed(make_row(trials))
    assert tally.passed(make_row(trials, allowed=0.2))

    def none(bench: Bench, wanted: int) -> Any:
        raise SkippedRowError("not here")
        yield

    tally = run_row(make_row(none), bench, 1)
    assert tally.skipped == "not here"
    assert not tally.passed(make_row(none))
    late = replace(bench, minutes=-1.0)
    assert run_row(make_row(trials), late, 30).trials == 9
    assert not complete(make_row(trials), run_row(make_row(trials), late, 0), "ci")

    def told(bench: Bench, wanted: int) -> Any:
        yield from [Trial(made=True)] * 4

    assert run_row(make_row(told), late, 0).trials == 4
    assert complete(make_row(told), run_row(make_row(told), late, 0), "ci")
    assert bench.chance(1).random() == bench.chance(1).random() != bench.chance(2).random()
