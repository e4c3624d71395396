"""A step waits for its device once: the ledger's one copy to the host, whatever mixes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support import runs
from support.host_syncs import host_syncs
from support.pool import RankPools
from support.training import Harness

STEPS, BAD = 6, 3
BF16 = {"bf16": {"enabled": True}}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "fp32": (1, {}),
    "bf16, ZeRO 2, data 2": (2, {**BF16, "zero_optimization": {"stage": 2}}),
    "bf16, ZeRO 3, clipped": (
        2,
        {**BF16, "zero_optimization": {"stage": 3}, "gradient_clipping": 0.5},
    ),
    "tensor 2": (2, {"model_parallel_size": 2}),
    "pipeline 2": (2, {"pipe_parallel_size": 2}),
}
METHODS: dict[str, dict[str, Any]] = {
    "static": {},
    "odm": {},
    "odm, ahead": {"lag": 1},
    "exp3": {},
    "ema": {},
    "smoothed_mean": {},
    "smoothed_mean_exp": {},
    "ado": {"first_fit": 4, "fit_every": 1, "smoothing_window": 5, "subsample": 1},
    "auto": {},
    "aioli": {"update_every": 4, "lp_rounds": 1, "lp_steps": 1, "validation_samples": 4},
    "skillit": {"update_every": 2, "validation_samples": 4},
    "naive_validation": {"update_every": 2, "validation_samples": 4},
}


class Counting(Harness):
    """Counts what every step waits for, by place, and which steps measured held-out losses."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self.waits: dict[int, dict[str, int]] = {}
        self.measured: list[int] = []

    def step(self, planned: Any, *arguments: Any, **named: Any) -> None:
        if planned.valid_loss is not None:
            self.measured.append(planned.step)

    def count(self, steps: int) -> None:
        with host_syncs() as counted:

            def after(step: int, ending: Any) -> None:
                self.waits[step] = dict(counted.places)
                counted.places.clear()

            self.after_step = after  # type: ignore[method-assign]
            self.run(steps)
        assert sorted(self.waits) == list(range(1, steps + 1))


def count(rank: int, world_size: int, files: list[Path]) -> list[tuple[dict[int, Any], list[int]]]:
    results = []
    for file in files:
        harness = Counting(file)
        try:
            harness.count(STEPS)
        finally:
            harness.close()
        results.append((harness.waits, harness.measured))
    return results


def write(folder: Path, name: str, **changes: Any) -> Path:
    if not (folder / "data").exists():
        runs.make_data(folder / "data")
    content = runs.config(folder / "data", folder / "run", train_iters=STEPS, **changes)
    return runs.write_config(folder / f"{name}.yml", content)


def steady(waits: dict[int, dict[str, int]]) -> list[dict[str, int]]:
    """Leave the first step out: stages tell each other shapes there, ZeRO-3 sets itself up."""
    return [places for step, places in sorted(waits.items()) if step > 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_copies_one_buffer_to_the_host(
    pools: RankPools, tmp_path: Path, layout: str
) -> None:
    ranks, changes = LAYOUTS[layout]
    file = write(tmp_path, "config", num_gpus=ranks, mixing={"method": "odm"}, **changes)
    for (waits, _), *_ in pools.call(count, ranks, [file]):
        for places in steady(waits):
            assert sum(places.values()) == 1, places
            assert "ledger.py" in next(iter(places))


def test_where_the_host_decides_it_asks_once_more(pools: RankPools, tmp_path: Path) -> None:
    """For optimizers that know no flag DeepSpeed asks for the norm before an update."""
    lion = write(tmp_path, "lion", num_gpus=2, optimizer={"type": "Lion", "params": {"lr": 1e-4}})
    for (waits, _), *_ in pools.call(count, 2, [lion]):
        # Once by itself, and with clipping once for every group of parameters.
        assert all(1 < sum(places.values()) <= 4 for places in steady(waits)), waits


def test_mixing_online_adds_no_wait(pools: RankPools, tmp_path: Path) -> None:
    files = [
        write(
            tmp_path,
            str(number),
            num_gpus=1,
            mixing={"method": name.split(",")[0], **options},
        )
        for number, (name, options) in enumerate(METHODS.items())
    ]
    (results,) = pools.call(count, 1, files)
    for name, (waits, measured) in zip(METHODS, results, strict=True):
        for step, places in waits.items():
            # Held-out losses that a method asks for are one more copy, where it asks for them.
            assert sum(places.values()) <= 1 + (step in measured) + (step == 1), (name, places)


def train(rank: int, world_size: int, file: Path, on_device: bool) -> dict[str, Any]:
    """Train with a gradient that is not finite at one step, though the losses are."""
    applies = "megatron.engine.engine.applies"
    with mock.patch(applies, return_value=False) if not on_device else mock.MagicMock():
        harness = Harness(file)
    engine = harness.parts.engine
    assert (engine._skip is not None) == on_device
    parameter = next(iter(engine.module.parameters()))
    now = {"step": 0}
    take = harness.parts.planner.take

    def noting(step: int) -> Any:
        now["step"] = step
        return take(step)

    harness.parts.planner.take = noting  # type: ignore[method-assign]
    parameter.register_hook(
        lambda gradient: gradient * float("nan") if now["step"] == BAD and rank == 0 else gradient
    )
    harness.run(STEPS)
    inner = engine.optimizer.optimizer
    state = [
        {name: value.clone() for name, value in entry.items()} for entry in inner.state.values()
    ]
    result = {
        "ledger": harness.ledger,
        "parameters": harness.parameters(),
        "state": state,
        "skipped": engine._engine.skipped_steps,
    }
    harness.close()
    return result


@pytest.mark.parametrize(
    "precision",
    [{}, BF16, {**BF16, "zero_optimization": {"stage": 3}}],
    ids=["fp32", "bf16", "bf16, ZeRO 3"],
)
def test_a_skip_on_the_device_is_the_skip_of_the_host(
    pools: RankPools, tmp_path: Path, precision: dict[str, Any]
) -> None:
    """Weights, moments, counts and the ledger are those of DeepSpeed's own decision, to the bit."""
    file = write(tmp_path, "config", on_nonfinite="skip(2)", gradient_clipping=0.5, **precision)
    for ours, theirs in zip(
        pools.call(train, 2, file, True), pools.call(train, 2, file, False), strict=True
    ):
        assert ours["skipped"] == theirs["skipped"] == 1
        assert [step["skipped"] for step in ours["ledger"]] == [
            step == BAD for step in range(1, STEPS + 1)
        ]
        for one, other in zip(ours["ledger"], theirs["ledger"], strict=True):
            np.testing.assert_equal(one, other)
        for name, value in theirs["parameters"].items():
            np.testing.assert_array_equal(ours["parameters"][name], value, err_msg=name)
        for one, other in zip(ours["state"], theirs["state"], strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)
