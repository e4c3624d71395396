"""A DoReMi run that stops goes on to the bit, with a reference's model and with its losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support import relayout, runs
from support.pool import RankPools
from support.scored import REFERENCE, scored, write

from megatron.training.reference import RECORD_NAME
from megatron.training.scoring import ScoreRequest

STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, pools: RankPools) -> Path:
    folder = tmp_path_factory.mktemp("doremi-resume")
    runs.make_data(folder / "data", documents=60)
    assert pools.call(relayout.train, 2, write(folder, "ref", "ref", **REFERENCE)) == [0, 0]
    file = write(folder, "score", "score", mixing={"method": "doremi", "reference": "unused"})
    request = ScoreRequest(checkpoint=str(folder / "ref"), out=str(folder / "store"))
    assert [code for code, _ in pools.call(scored, 2, file, request)] == [0, 0]
    return folder


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("model", {"pipe_parallel_size": 2}),
        ("model", {"mixing": {"loss_lag": 0}, "zero_optimization": {"stage": 3}}),
        ("store", {"mixing": {"lag": 1}}),
    ],
    ids=["pipeline", "ahead", "store"],
)
def test_a_run_goes_on_to_the_bit(
    folder: Path, pools: RankPools, form: str, changes: dict[str, Any]
) -> None:
    source = {"reference": str(folder / "ref")}
    if form == "store":
        source = {"reference_losses": str(folder / "store")}
    mixing = {"method": "doremi", "update_every": 2, **source, **changes.pop("mixing", {})}
    name = "-".join(map(str, (form, *changes)))
    settings = {"train_iters": STEPS, "save_interval": 5, "mixing": mixing, **changes}
    whole = write(folder, f"{name}-whole", f"{name}-whole", **settings)
    parts = write(folder, f"{name}-parts", f"{name}-parts", exit_interval=5, **settings)
    assert pools.call(relayout.train, 2, whole) == [0, 0]
    for _ in range(2):
        assert pools.call(relayout.train, 2, parts) == [0, 0]
    one, other = (folder / f"{name}-{kind}" for kind in ("whole", "parts"))
    runs.assert_same_run(one, other, STEPS)
    mixtures = [yaml.safe_load((run / "mixture.yml").read_text()) for run in (one, other)]
    assert mixtures[0] == mixtures[1]
    assert (one / RECORD_NAME).read_bytes() == (other / RECORD_NAME).read_bytes()
