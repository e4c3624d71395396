"""A replayed ledger is the same run again: to the bit in its layout, and on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import relayout, runs
from support.pool import RankPools

ORIGINALS: dict[str, dict[str, Any]] = {
    "odm": {"method": "odm", "draw": "multinomial", "lag": 1},
    "aioli": {
        "method": "aioli",
        "lp_rounds": 1,
        "lp_steps": 2,
        "update_every": 9,
        "one_hot_factor": 0.6,
        "eta": 5.0,
    },
    "doge": {"method": "doge"},
}
DRAWING = ("draw", "lag")


@pytest.mark.parametrize("method", ORIGINALS)
def test_a_replayed_run_has_the_same_losses_to_the_bit(
    tmp_path: Path, pools: RankPools, method: str
) -> None:
    """Sampling and loss weights, blocks and probes: all that a method decides."""
    data = tmp_path / "data"
    runs.make_data(data)
    original = ORIGINALS[method]
    replay = {"method": "replay", "ledger": str(tmp_path / "first")}
    replay |= {key: original[key] for key in DRAWING if key in original}
    for name, mixing in (("first", original), ("again", replay)):
        content = runs.config(data, tmp_path / name, mixing=mixing)
        file = runs.write_config(tmp_path / f"{name}.yml", content)
        assert pools.call(relayout.train, 2, file) == [0, 0]
    first, again = (runs.records(tmp_path / name, "mixture") for name in ("first", "again"))
    assert len(first) == 24
    for line in first:
        line.pop("valid_loss", None)  # a replay has nothing to validate for
    kept = ("step", "probability", "domain_loss", "loss_weight", "fresh_quota", "probe", "samples")
    for one, other in zip(first, again, strict=True):
        assert {key: one.get(key) for key in kept} == {key: other.get(key) for key in kept}
    assert runs.weights_hash(tmp_path / "first", 24) == runs.weights_hash(tmp_path / "again", 24)
    if method == "aioli":
        assert sum("probe" in line for line in first) == 18
    if method == "doge":
        assert all("loss_weight" in line for line in first)


def test_a_replayed_ledger_draws_the_same_samples(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data")
    first = runs.config(
        tmp_path / "data", tmp_path / "first", hidden_dropout=0.0, attention_dropout=0.0
    )
    runs.train(runs.write_config(tmp_path / "first.yml", first))
    replay = {"method": "schedule", "replay": str(tmp_path / "first"), "draw": "multinomial"}
    again = {**first, "run_dir": str(tmp_path / "again"), "mixing": replay, "num_gpus": 1}
    runs.train(runs.write_config(tmp_path / "again.yml", again))
    assert runs.records(tmp_path / "first", "samples") == runs.records(
        tmp_path / "again", "samples"
    )
    before, after = (runs.records(tmp_path / name, "mixture") for name in ("first", "again"))
    assert [step["probability"] for step in before] == [step["probability"] for step in after]
    for one, other in zip(before, after, strict=True):
        for name, loss in one["domain_loss"].items():
            assert (loss is None) == (other["domain_loss"][name] is None)
            assert loss is None or abs(loss - other["domain_loss"][name]) < 1e-5
