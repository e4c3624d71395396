"""Compiled runs in several layouts: equal to one that is not compiled, and resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import relayout, runs
from support.pool import RankPools
from torch._dynamo.utils import counters

pytestmark = pytest.mark.slow

STEPS, EVERY = 6, 4
PLAIN: dict[str, Any] = {
    "gpt_j_residual": True,
    "train_iters": STEPS,
    "save_interval": STEPS,
    "eval_interval": 3,
}
TENSOR = {"model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"model_parallel_size": 2},
    "sequence": {**TENSOR, "checkpoint_activations": True},
    "pipeline": {"pipe_parallel_size": 2},
    "data": {"zero_optimization": {"stage": 2}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    runs.make_data(folder)
    return folder


def train(
    pools: RankPools, data: Path, name: str, ranks: int = 2, **changes: Any
) -> tuple[Path, list[Any]]:
    """Train; return the run's folder and what dynamo counted on each rank."""
    run = data / name
    content = runs.config(data, run, **{**PLAIN, "num_gpus": ranks, **changes})
    return run, pools.call(trained, ranks, runs.write_config(data / f"{name}.yml", content))


def trained(rank: int, world: int, file: Path) -> dict[str, int]:
    torch._dynamo.reset()  # as in a process of its own
    counters.clear()
    assert relayout.train(rank, world, file) == 0
    assert not counters["graph_break"]
    return dict(counters["stats"])


def losses(run: Path) -> list[list[float]]:
    return [record["domain_loss"] for record in runs.records(run, "mixture")]


def test_every_layout_trains_as_one_process_that_compiles_nothing(
    data: Path, pools: RankPools
) -> None:
    # An eps under which Adam does not make much of a gradient that is rounding alone.
    adam = {"type": "Adam", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-3}}
    still = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "mixing": {"method": "static"},
        "optimizer": adam,
    }
    whole, counted = train(pools, data, "whole", ranks=1, **still)
    assert not counted[0]
    for name, layout in LAYOUTS.items():
        run, counted = train(pools, data, name, torch_compile=True, **still, **layout)
        # A graph to train and one to evaluate.
        assert all(one["unique_graphs"] == 2 for one in counted), (name, counted)
        for step, (ours, plain) in enumerate(zip(losses(run), losses(whole), strict=True)):
            bound = 1e-5 if step == 0 else 1e-4
            assert ours == pytest.approx(plain, rel=bound), (name, step)


@pytest.mark.parametrize("layout", ["sequence", "pipeline"])
def test_stopped_and_resumed_with_dropout(data: Path, pools: RankPools, layout: str) -> None:
    options = {**LAYOUTS[layout], "torch_compile": True}
    whole, _ = train(pools, data, f"{layout}-whole", **options)
    parts = data / f"{layout}-parts"
    for stop in (EVERY, STEPS):
        train(pools, data, parts.name, exit_interval=EVERY, **options)
        assert runs.steps_done(parts) == stop
    runs.assert_same_run(whole, parts, STEPS)
    # It was compiled: dropout's masks are others than those of a run that is not.
    plain, _ = train(pools, data, f"{layout}-plain", **LAYOUTS[layout])
    assert losses(plain) != losses(whole)
