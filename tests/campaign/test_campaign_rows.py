"""The rows of the fault table: a small part in every run, their column among the slow tests."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.campaign.catalogue import ROWS
from support.campaign.hostile import YAML
from support.campaign.pickles import touch
from support.campaign.row import Bench, Row, run_row
from support.pool import RankPools

# Rows without trials of their own are tests elsewhere, which the long suite runs anyway.
COLUMN = [row for row in ROWS if not isinstance(row.run, partial)]
QUICK = [row for row in COLUMN if row.quick]


def check(row: Row, trials: int, folder: Path, pools: RankPools) -> None:
    bench = Bench(folder=folder, seed=0, row=row.name, column="ci", pools=pools)
    tally = run_row(row, bench, trials)
    if tally.skipped:
        pytest.skip(tally.skipped)
    assert tally.failures <= row.allowed * tally.trials, "\n\n".join(tally.told)
    assert tally.trials >= max(trials, 1)


@pytest.mark.parametrize("row", QUICK, ids=lambda row: row.name)
def test_a_few_trials(row: Row, tmp_path: Path, pools: RankPools) -> None:
    check(row, row.quick, tmp_path, pools)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("row", COLUMN, ids=lambda row: row.name)
def test_the_column_of_continuous_integration(row: Row, tmp_path: Path, pools: RankPools) -> None:
    check(row, row.ci, tmp_path, pools)


def test_every_row_of_the_table_is_there() -> None:
    names = [row.name for row in ROWS]
    assert names == [f"R{number}" for number in range(1, len(ROWS) + 1)]
    assert len(names) >= 17
    assert {row.name for row in QUICK} <= {row.name for row in COLUMN} < set(names)
    assert QUICK
    assert all(row.ci <= row.release for row in ROWS)


def test_the_payloads_are_real(tmp_path: Path) -> None:
    """Read without care they do what they are for."""
    sentinel = tmp_path / "yaml"
    yaml.unsafe_load(YAML[0].replace("SENTINEL", str(sentinel)))
    assert sentinel.is_dir()
    array = np.empty(1, dtype=object)
    array[0] = touch(tmp_path / "npy")
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.load(tmp_path / "a.npy", allow_pickle=True)
    assert (tmp_path / "npy").is_dir()
    pickle.loads(pickle.dumps(touch(tmp_path / "pickle")))
    assert (tmp_path / "pickle").is_dir()
