"""Gradients that no other rank has are not added up, norms take no copy; no number changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from support import runs
from support.pool import RankPools
from support.training import Harness

STEPS = 5
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32, two micro-batches": (1, {"train_micro_batch_size_per_gpu": 4}),
    "bf16, ZeRO 2": (1, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}),
    "tied, tensor 2": (2, {"model_parallel_size": 2, "no_weight_tying": False}),
    "pipeline 2": (2, {"pipe_parallel_size": 2, "bf16": {"enabled": True}}),
}


def train(rank: int, world_size: int, file: Path, spared: bool) -> dict[str, Any]:
    from megatron.engine import engine
    from megatron.engine.gradient_norm import take_norms
    from megatron.engine.lone_rank import spare_reduction

    done: list[bool] = []

    def spare(optimizer: Any) -> None:
        done.append(spared and spare_reduction(optimizer))

    def take(optimizer: Any) -> None:
        assert not spared or take_norms(optimizer)

    with (
        mock.patch.object(engine, "spare_reduction", spare),
        mock.patch.object(engine, "take_norms", take),
    ):
        harness = Harness(file)
    harness.run(STEPS)
    result = {"ledger": harness.ledger, "parameters": harness.parameters(), "done": done}
    harness.close()
    return result


def write(folder: Path, **changes: Any) -> Path:
    runs.make_data(folder / "data")
    content = runs.config(folder / "data", folder / "run", train_iters=STEPS, **changes)
    return runs.write_config(folder / "config.yml", {**content, "gradient_clipping": 0.5})


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_those_of_the_whole_reduction(
    pools: RankPools, tmp_path: Path, case: str
) -> None:
    ranks, changes = CASES[case]
    file = write(tmp_path, num_gpus=ranks, **changes)
    ours, theirs = (pools.call(train, ranks, file, spared) for spared in (True, False))
    for one, other in zip(ours, theirs, strict=True):
        assert one["done"] == [True]
        np.testing.assert_equal(one["ledger"], other["ledger"])
        np.testing.assert_equal(one["parameters"], other["parameters"])


def test_data_ranks_go_on_adding_up(pools: RankPools, tmp_path: Path) -> None:
    file = write(tmp_path, num_gpus=2)
    ours, theirs = (pools.call(train, 2, file, spared) for spared in (True, False))
    for one, other in zip(ours, theirs, strict=True):
        assert one["done"] == [False]
        np.testing.assert_equal(one["ledger"], other["ledger"])
        np.testing.assert_equal(one["parameters"], other["parameters"])
