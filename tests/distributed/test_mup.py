"""µP through DeepSpeed: each group of weights learns at its own rate, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import runs
from support.pool import RankPools
from support.training import Harness

LR = 1e-3


def body(rank: int, world_size: int, file: Path) -> dict[str, Any]:
    harness = Harness(file)
    before = harness.parameters()
    harness.run(1)
    after = harness.parameters()
    # Adam's first update moves every number with a gradient by the rate.
    moved = {
        name: float(np.median(np.abs(after[name] - before[name])[after[name] != before[name]]))
        for name in after
        if (after[name] != before[name]).any()
    }
    harness.close()
    return {"moved": moved, "ledger": harness.ledger}


@pytest.mark.parametrize(
    "layout",
    [
        {"pipe_parallel_size": 2},
        pytest.param({"zero_optimization": {"stage": 3}}, marks=pytest.mark.slow),
        pytest.param({"model_parallel_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_hidden_matrices_learn_more_slowly(
    pools: RankPools, tmp_path: Path, layout: dict[str, Any]
) -> None:
    runs.make_data(tmp_path / "data")
    content = runs.config(
        tmp_path / "data",
        tmp_path / "run",
        use_mup=True,
        mup_base_hidden_size=8,
        train_iters=1,
        warmup=0.0,
        lr_decay_style="constant",
        mixing={"method": "static"},
        optimizer={"type": "Adam", "params": {"lr": LR, "eps": 1e-15, "weight_decay": 0.0}},
        **layout,
    )
    file = runs.write_config(tmp_path / "config.yml", content)
    results = pools.call(body, 2, file)
    moved = {name: size for result in results for name, size in result["moved"].items()}
    assert any("word_embeddings" in name for name in moved)
    assert sum("dense" in name for name in moved) >= 12
    for name, size in moved.items():
        hidden = name.endswith("weight") and ("dense" in name or "query_key_value" in name)
        assert size == pytest.approx(LR / 4 if hidden else LR, rel=0.02), name
