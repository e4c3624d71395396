"""The page on reliability shows the figures of the committed campaign, and no others."""

from __future__ import annotations

import json
import sys

import pytest
from support.campaign.catalogue import ROWS
from support.source import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import fault_campaign


def test_the_table_of_the_page_is_that_of_the_results() -> None:
    content = json.loads(fault_campaign.RESULTS.read_text(encoding="utf-8"))
    text = fault_campaign.DOCUMENT.read_text(encoding="utf-8")
    assert fault_campaign.with_table(text, content) == text, (
        "run python tools/fault_campaign.py --write-docs"
    )


def test_the_committed_campaign_has_no_failure_that_the_table_hides() -> None:
    content = json.loads(fault_campaign.RESULTS.read_text(encoding="utf-8"))
    assert content["column"] == "release"
    known = {row.name: row for row in ROWS}
    assert content["rows"].keys() == known.keys()
    for name, row in content["rows"].items():
        assert (row["fault"], row["criterion"]) == (known[name].fault, known[name].criterion)
        assert (row["wanted"], row["seed"]) == (known[name].release, 0)
        enough = row["trials"] >= max(known[name].release, 1)
        assert row["complete"] == (enough and not row.get("cut"))
        within = row["failures"] <= known[name].allowed * row["trials"]
        assert row["passed"] == (within and row["trials"] > 0)


def test_figures_stand_between_the_marks() -> None:
    start, end = fault_campaign.BLOCK
    content = {
        "rows": {
            "R2": {
                "row": "R2", "fault": "a", "criterion": "b", "trials": 3, "wanted": 2000,
                "failures": 0, "complete": False, "passed": True, "skipped": "",
            }
        }
    }  # fmt: skip
    text = fault_campaign.with_table(f"before\n{start}stale\n{end}after\n", content)
    assert text.startswith(f"before\n{start}\n| row |")
    assert "| R2 | a | b | 3 of 2000 | 0 | no failure yet |" in text
    assert text.endswith(f"\n\n{end}after\n")
    assert "stale" not in text
    with pytest.raises(KeyError):
        fault_campaign.with_table(text, {})
