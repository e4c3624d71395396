"""A recorded ledger, replayed as a schedule, is the same run again, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

from support import runs


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
