"""Figures in the documents are those that the benchmarks wrote."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from support.source import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.support.measure import RESULTS, ratios, shown, spread
from benchmarks.support.tables import DOCUMENTS, with_figures


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_document_shows_the_figures_of_the_results(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert "<!-- figures: " in text
    assert with_figures(text) == text, "run tools/generate_docs.py"


def test_another_result_changes_the_documents(tmp_path):
    for path in RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    content = json.loads((tmp_path / "train.json").read_text())
    row = content["results"][0]["contestants"]["transformers, compiled"]
    row["time_over_ours_compiled"]["processor"] |= {"median": 7.77, "low": 7.7, "high": 7.8}
    (tmp_path / "train.json").write_text(json.dumps(content))
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert "7.77 (7.70–7.80)" in with_figures(text, tmp_path)


def test_a_ratio_is_taken_turn_by_turn():
    found = ratios([2.0, 4.0, 30.0, 8.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0])
    assert found == {"median": 2.0, "low": 2.0, "high": 2.0, "least": 2.0, "most": 10.0}
    assert shown(spread([1.0, 1.5, 2.0, 2.5])) == "1.75 (1.50–2.00)"
