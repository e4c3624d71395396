"""Optimizer state and parameters in the host's memory: the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import runs
from support.gloo import run_ranks
from support.training import Harness

CPU = {"device": "cpu"}
CELLS: dict[str, dict[str, Any]] = {
    "1": {"stage": 1},
    "1 offloaded": {"stage": 1, "offload_optimizer": CPU},
    "2 offloaded": {"stage": 2, "offload_optimizer": CPU},
    "3 offloaded": {"stage": 3, "offload_optimizer": CPU},
    "3 offloaded whole": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
}


def body(rank: int, world_size: int, files: list[Path]) -> list[list[dict[str, Any]]]:
    ledgers = []
    for file in files:
        harness = Harness(file)
        assert ("offload_optimizer" in harness.config.zero.options) == ("offloaded" in file.stem)
        harness.run(4)
        ledgers.append(harness.ledger)
    return ledgers


def test_offloading_changes_nothing_but_the_place(tmp_path: Path) -> None:
    runs.make_data(tmp_path / "data")
    files = [
        runs.write_config(
            tmp_path / f"{name}.yml",
            runs.config(tmp_path / "data", tmp_path / "run", zero_optimization=options),
        )
        for name, options in CELLS.items()
    ]
    plain, *others = run_ranks(body, 2, files)[0]
    for name, ledger in zip(list(CELLS)[1:], others, strict=True):
        for expected, found in zip(plain, ledger, strict=True):
            assert found["samples"] == expected["samples"], name
            assert found["domain_loss"] == pytest.approx(
                expected["domain_loss"], rel=1e-5, nan_ok=True
            ), name
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5), name


@pytest.mark.option("exit_interval")
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_run_resumes_with_the_same_bits(tmp_path: Path, stage: int) -> None:
    runs.make_data(tmp_path / "data")

    def run(name: str, **changes: Any) -> Path:
        zero = {"stage": stage, "offload_optimizer": CPU}
        content = runs.config(
            tmp_path / "data", tmp_path / name, train_iters=8, zero_optimization=zero, **changes
        )
        runs.train(runs.write_config(tmp_path / f"{name}.yml", content))
        return tmp_path / name

    whole = run("whole")
    run("parts", exit_interval=5)
    parts = run("parts")
    for name in ("mixture", "samples", "metrics"):
        assert runs.records(whole, name) == runs.records(parts, name), name
