"""A loss that is not finite on one rank: every rank does the same, and nothing is harmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import runs
from support.pool import RankPools
from support.training import Harness

from megatron.errors import NeomixError

STEPS, BAD = 6, 3


def body(rank: int, world_size: int, file: Path, bad_steps: tuple[int, ...]) -> dict[str, Any]:
    harness = Harness(file)
    module = harness.parts.engine.module
    loss_fn, planner = module.loss_fn, harness.parts.planner
    now = {"step": 0}
    take, before = planner.take, {}

    def noting(step: int) -> Any:
        now["step"] = step
        before[step] = (harness.parameters(), planner._mixer.state_dict())
        return take(step)

    class Poisoned:
        def __call__(self, output: Any, labels: Any) -> torch.Tensor:
            hidden, weight = output
            if rank == 1 and now["step"] in bad_steps:
                hidden = hidden * float("nan")
            return loss_fn((hidden, weight), labels)

    planner.take = noting
    module.loss_fn = Poisoned()
    error = None
    try:
        harness.run(STEPS)
    except NeomixError as raised:
        error = (str(raised), raised.exit_code)
    harness.close()
    return {"ledger": harness.ledger, "error": error, "before": before}


def write(folder: Path, policy: str, precision: dict[str, Any], stage: int) -> Path:
    runs.make_data(folder / "data")
    content = runs.config(
        folder / "data",
        folder / "run",
        train_iters=STEPS,
        on_nonfinite=policy,
        zero_optimization={"stage": stage},
        mixing={"method": "smoothed_mean"},
        **precision,
    )
    return runs.write_config(folder / "config.yml", content)


@pytest.mark.parametrize(
    ("precision", "stage"),
    [
        pytest.param({}, 1, id="fp32 ZeRO 1"),
        pytest.param({"bf16": {"enabled": True}}, 2, id="bf16 ZeRO 2", marks=pytest.mark.slow),
        pytest.param({}, 3, id="fp32 ZeRO 3", marks=pytest.mark.slow),
    ],
)
def test_skip_leaves_weights_and_mixture_alone(
    pools: RankPools, tmp_path: Path, precision: dict[str, Any], stage: int
) -> None:
    file = write(tmp_path, "skip(2)", precision, stage)
    results = pools.call(body, 2, file, (BAD,))
    for result in results:
        assert result["error"] is None
        assert [step["skipped"] for step in result["ledger"]] == [
            step == BAD for step in range(1, STEPS + 1)
        ]
        (weights, mixture), (after, mixture_after) = (
            result["before"][BAD],
            result["before"][BAD + 1],
        )
        assert all(np.array_equal(weights[name], after[name]) for name in weights)
        assert mixture == mixture_after
        moved, mixture_moved = result["before"][BAD + 2]
        assert not all(np.array_equal(weights[name], moved[name]) for name in weights)
        assert mixture_moved != mixture
    # Every step used up its data: the skipped one is not drawn again.
    ledger = results[0]["ledger"]
    ids = [tuple(sample) for step in ledger for sample in step["samples"]]
    assert len(set(ids)) == len(ids)


def test_stop_is_the_default_and_all_ranks_say_the_same(pools: RankPools, tmp_path: Path) -> None:
    results = pools.call(body, 2, write(tmp_path, "stop", {}, 1), (BAD,))
    messages = {result["error"] for result in results}
    assert len(messages) == 1
    text, code = messages.pop()
    assert code == 1
    assert f"step {BAD}" in text
    assert any(f"'{name}'" in text for name in runs.DOMAINS)
    assert "sample" in text
    assert all(len(result["ledger"]) == BAD - 1 for result in results)


@pytest.mark.slow
def test_k_in_a_row_stop_the_run(pools: RankPools, tmp_path: Path) -> None:
    results = pools.call(body, 2, write(tmp_path, "skip(2)", {}, 1), (BAD, BAD + 1))
    assert all("2 in a row" in result["error"][0] for result in results)
