"""A spike of the loss on one rank: every rank leaves the same update out, or goes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import relayout, runs
from support.pool import RankPools
from support.training import Harness

STEPS, BAD = 9, 7


class Raised:
    """A loss that is far too high at one step, on the ranks that compute one."""

    def __init__(self, loss_fn: Any, now: dict[str, int]) -> None:
        self.loss_fn, self.now = loss_fn, now

    def __call__(self, output: Any, labels: Any) -> torch.Tensor:
        hidden, weight = output
        return self.loss_fn((hidden * (30.0 if self.now["step"] == BAD else 1.0), weight), labels)


def body(rank: int, world_size: int, file: Path) -> dict[str, Any]:
    harness = Harness(file)
    planner, module = harness.parts.planner, harness.parts.engine.module
    now, take, before = {"step": 0}, planner.take, {}

    def noting(step: int) -> Any:
        now["step"] = step
        before[step] = (harness.parameters(), planner._mixer.state_dict())
        return take(step)

    planner.take, module.loss_fn = noting, Raised(module.loss_fn, now)
    harness.run(STEPS)
    state = harness.parts.guard.state_dict()
    harness.close()
    return {"ledger": harness.ledger, "before": before, "state": state}


def write(folder: Path, policy: str, **changes: Any) -> Path:
    runs.make_data(folder / "data")
    content = runs.config(
        folder / "data",
        folder / "run",
        train_iters=STEPS,
        on_loss_spike=policy,
        loss_spike_window=4,
        save_interval=4,
        eval_interval=1000,
        mixing={"method": "smoothed_mean"},
        **changes,
    )
    return runs.write_config(folder / "config.yml", content)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="ZeRO 1"),
        pytest.param({"pipe_parallel_size": 2}, id="pipeline", marks=pytest.mark.slow),
        pytest.param({"zero_optimization": {"stage": 3}}, id="ZeRO 3", marks=pytest.mark.slow),
        pytest.param(
            {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
            id="bf16 ZeRO 2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            id="offload",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_skip_leaves_weights_and_mixture_alone(
    pools: RankPools, tmp_path: Path, changes: dict[str, Any]
) -> None:
    results = pools.call(body, 2, write(tmp_path, "skip(2)", **changes))
    plain = pools.call(body, 2, write(tmp_path, "off", **changes))
    for result, other in zip(results, plain, strict=True):
        assert [step["skipped"] for step in result["ledger"]] == [
            step == BAD for step in range(1, STEPS + 1)
        ]
        (weights, mixture), (after, mixture_after) = (result["before"][n] for n in (BAD, BAD + 1))
        assert all(np.array_equal(weights[name], after[name]) for name in weights)
        assert mixture == mixture_after
        moved, _ = result["before"][BAD + 2]
        assert not all(np.array_equal(weights[name], moved[name]) for name in weights)
        # Without the policy the same step does change them, and before it nothing differs.
        assert all(np.array_equal(weights[name], other["before"][BAD][0][name]) for name in weights)
        moved, _ = other["before"][BAD + 1]
        assert not all(np.array_equal(weights[name], moved[name]) for name in weights)
    assert results[0]["state"] == results[1]["state"]
    assert "spikes" not in plain[0]["state"]


def spoiled(rank: int, world_size: int, file: Path) -> dict[str, Any]:
    """Train a whole run whose loss spikes, noting what becomes of the weights."""
    from megatron.training import run as program

    now, build, noted = {"step": 0}, program.build, {}

    def building(*arguments: Any) -> Any:
        parts = build(*arguments)
        take, module = parts.planner.take, parts.engine.module

        def taking(step: int) -> Any:
            now["step"] = step
            noted[step] = {n: p.detach().clone().numpy() for n, p in module.named_parameters()}
            return take(step)

        parts.planner.take, module.loss_fn = taking, Raised(module.loss_fn, now)
        return parts

    program.build = building
    try:
        return {"code": relayout.train(rank, world_size, file), "weights": noted}
    finally:
        program.build = build


def test_rollback_takes_the_newest_checkpoint_and_the_next_data(
    pools: RankPools, tmp_path: Path
) -> None:
    for folder in ("back", "plain"):
        (tmp_path / folder).mkdir()
    back = pools.call(spoiled, 2, write(tmp_path / "back", "rollback(1)"))
    pools.call(relayout.train, 2, write(tmp_path / "plain", "off"))
    for result in back:
        assert result["code"] == 0
        weights = result["weights"]
        assert all(np.array_equal(weights[5][name], weights[BAD + 1][name]) for name in weights[5])
        assert not all(
            np.array_equal(weights[BAD][name], weights[BAD + 1][name]) for name in weights[5]
        )
    ledger = runs.records(tmp_path / "back" / "run", "mixture")
    assert [record["step"] for record in ledger] == list(range(1, STEPS + 1))
    assert [bool(record.get("skipped")) for record in ledger] == [
        step == BAD for step in range(1, STEPS + 1)
    ]
    # The data is that of a run without a spike: none comes twice.
    assert (
        runs.records(tmp_path / "back" / "run", "samples")[:BAD]
        == runs.records(tmp_path / "plain" / "run", "samples")[:BAD]
    )
    ids = [
        tuple(one)
        for record in runs.records(tmp_path / "back" / "run", "samples")
        for one in record["samples"]
    ]
    assert len(set(ids)) == len(ids)
