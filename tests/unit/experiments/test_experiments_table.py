"""The table of a study, and the best mixture in it."""

from __future__ import annotations

import math

import pytest
from support import runs, studies

from megatron.errors import RunError
from megatron.experiments.execute import execute
from megatron.experiments.points import point_results, summary
from megatron.experiments.study import Variant
from megatron.experiments.table import COLUMNS, read_table, study_rows, tag, write_table
from megatron.model.accounting import flops_per_token


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    place = tmp_path_factory.mktemp("table")
    runs.make_data(place / "data")
    variants = [
        Variant(
            name=f"p{point}-s{seed}", overrides=(f"seed={point + 1}{seed}",), tags={"point": point}
        )
        for point in (0, 1)
        for seed in (1, 2)
    ]
    planned = studies.plan(place, *variants)
    assert execute(planned.runs, studies.pretending("good"), say=lambda _: None).exit_code == 0
    return planned


def test_a_row_says_everything_about_a_loss(study):
    rows = study_rows("study", study.runs)
    assert len(rows) == 4 * 2 * 3
    assert all(row.keys() == COLUMNS.keys() for row in rows)
    first, last = rows[0], rows[3]
    assert (first["step"], first["tokens"], first["flops"]) == (0, 0, 0.0)
    assert (last["run"], last["domain"], last["split"]) == ("p0-s1", "walk", "valid")
    assert (last["step"], last["last"], last["loss"]) == (12, True, 1.5)
    assert last["weight"] == pytest.approx(0.5 + 6.5 / 100)
    assert (last["share"], last["tokens"], last["domain_tokens"]) == (0.5, 12 * 128, 12 * 64)
    assert (last["extra_tokens"], last["extra_by_kind"]) == (120, '{"validation": 120}')
    assert last["flops"] == pytest.approx(12 * 128 * flops_per_token(study.runs[0].config.model))
    assert last["seconds"] == pytest.approx(12 * 128 / 1280)
    assert last["run_seconds"] > 0
    assert math.isnan(last["bits_per_byte"])
    assert tag(last, "point") == 0
    assert tag(last, "nothing") is None


def test_both_files_hold_the_table(study, tmp_path):
    rows = study_rows("study", study.runs)
    paths = write_table(rows, tmp_path)
    assert [path.name for path in paths] == ["table.csv", "table.parquet"]
    back = read_table(tmp_path)
    parquet = pytest.importorskip("pyarrow.parquet").read_table(paths[1]).to_pylist()
    for row, csv_row, parquet_row in zip(rows, back, parquet, strict=True):
        for name in COLUMNS:
            if row[name] != row[name]:
                assert math.isnan(csv_row[name])
                assert math.isnan(parquet_row[name])
            else:
                assert row[name] == csv_row[name] == parquet_row[name]


def test_a_table_that_is_none_is_refused(tmp_path):
    with pytest.raises(RunError, match="cannot be read"):
        read_table(tmp_path)
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="not a study's table"):
        read_table(tmp_path)


def test_the_best_point_has_the_lowest_mean(study):
    rows = study_rows("study", study.runs)
    for row in rows:
        if row["last"]:
            row["loss"] = 3.0 + tag(row, "point") * -1.0 + (row["seed"] % 10) * 0.1
    best, other = point_results(rows)
    assert (best.point, other.point) == (1, 0)
    assert best.mean == pytest.approx(2.15)
    assert best.deviation == pytest.approx(0.1 / math.sqrt(2))
    assert best.seeds == 2
    text = summary(study, [best, other], ["p9: exit code 3"])
    assert text.index("| 1 |") < text.index("| 0 |")
    assert "p9: exit code 3" in text


def test_a_run_without_a_loss_at_its_end_is_no_point(study):
    rows = study_rows("study", study.runs)
    kept = [row for row in rows if not (row["last"] and row["run"] == "p1-s2")]
    with pytest.raises(RunError, match=r"point 1, seed 22"):
        point_results(kept)


def test_damaged_files_are_named(study, tmp_path):
    damaged = studies.plan(study.runs[0].folder.parents[1], runs_dir=tmp_path / "runs")
    execute(damaged.runs, studies.pretending("good"), say=lambda _: None)
    ledger = damaged.runs[0].folder / "mixture.jsonl"
    ledger.write_text(ledger.read_text().replace('"step": 3', '"step": '))
    with pytest.raises(RunError, match="1 lines"):
        study_rows("study", damaged.runs)
    ledger.unlink()
    with pytest.raises(RunError, match="is missing"):
        study_rows("study", damaged.runs)
