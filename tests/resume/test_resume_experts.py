"""A run with experts goes on exactly, and in another layout of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support import relayout, runs
from support.pool import RankPools

from megatron.checkpoint.store import CheckpointStore
from megatron.config import load_config
from megatron.engine.runtime import start_runtime
from megatron.exchange.weights import LayoutWeights
from megatron.training.inference import OpenModel

STOP, STEPS = 4, 8
EXPERTS = {
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_router_type": "topk",
    "train_iters": STEPS,
    "save_interval": STOP,
    "keep_last_n_checkpoints": 9,
    "eval_interval": 1000,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "make_vocab_size_divisible_by": 16,
}
SHARED = {"moe_expert_parallel_size": 2, "zero_optimization": {"stage": 1}}
ZERO_2 = {"moe_expert_parallel_size": 2, "zero_optimization": {"stage": 2}}


def write(folder: Path, data: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = runs.config(data, folder / "run", **{**EXPERTS, **changes})
    return runs.write_config(folder / "config.yml", content)


def train(pools: RankPools, ranks: int, file: Path) -> None:
    assert pools.call(relayout.train, ranks, file) == [0] * ranks


def stopped(whole: Path, run: Path) -> None:
    """Copy a run as it was when it had been stopped."""
    shutil.copytree(whole, run)
    for folder in (run / "checkpoints").glob("global_step*"):
        if folder.name != f"global_step{STOP}":
            shutil.rmtree(folder)
    (run / "checkpoints" / "latest").write_text(f"global_step{STOP}\n")


def losses(run: Path) -> list[Mapping[str, float]]:
    return [record["domain_loss"] for record in runs.records(run, "mixture")]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the parameters in a checkpoint's own files."""
    store = CheckpointStore(run / "checkpoints")
    model = load_config([str(run / "config.yml")]).model
    opened = LayoutWeights(store.path(step), store.read_manifest(store.path(step)), model)
    return {name: opened.read(name).float() for name in opened._parameters}


def looked_at(rank: int, world: int, file: Path) -> dict[str, torch.Tensor]:
    """Return the parameters of the model that evaluation and generation look at."""
    runtime = start_runtime(deterministic=True)
    config = load_config([str(file)])
    opened = OpenModel.create(config, runtime, rows=2, cache=file.parent / "cache", say=print)
    model, _ = opened.load(STEPS)
    return {name: value.clone() for name, value in model.module.named_parameters()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    runs.make_data(folder)
    return folder


@pytest.mark.parametrize(
    ("before", "cases"),
    [
        ((2, SHARED), [(2, SHARED), (1, {}), (2, {"model_parallel_size": 2})]),
        pytest.param(
            (1, {}),
            [(2, SHARED), (4, {**ZERO_2, "model_parallel_size": 2}), (2, ZERO_2)],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (4, {**ZERO_2, "precision": "bfloat16"}),
            [(4, {**ZERO_2, "precision": "bfloat16"}), (2, {"zero_optimization": {"stage": 3}})],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (4, {**SHARED, "pipe_parallel_size": 2}),
            [(4, {**SHARED, "pipe_parallel_size": 2}), (2, ZERO_2)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["shared", "whole", "half", "pipeline"],
)
def test_a_run_goes_on_wherever_its_experts_are(
    pools: RankPools, data: Path, tmp_path: Path, before: tuple[int, Any], cases: list[Any]
) -> None:
    ranks, layout = before
    train(pools, ranks, write(tmp_path / "whole", data, **layout))
    whole = tmp_path / "whole" / "run"
    last = weights(whole, STEPS)
    assert sum(".experts." in name for name in last) == 2 * 4 * 4
    if ranks == 2:
        # Whoever looks at it has all experts, on any number of ranks.
        (held,) = pools.call(looked_at, 1, tmp_path / "whole" / "config.yml")
        assert held.keys() == last.keys()
        for name, value in last.items():
            assert torch.equal(held[name][: len(value)], value), name
    for number, (world, changes) in enumerate(cases):
        folder = tmp_path / f"case{number}"
        file = write(folder, data, **changes)
        stopped(whole, folder / "run")
        train(pools, world, file)
        assert (folder / "run" / "checkpoints" / f"global_step{STEPS}").is_dir()
        if changes == layout:
            assert losses(folder / "run") == losses(whole)
            assert all(torch.equal(last[k], v) for k, v in weights(folder / "run", STEPS).items())
            continue
        bound = 2e-3 if "precision" in layout else 1e-5
        for one, other in zip(losses(whole), losses(folder / "run"), strict=True):
            for name, loss in one.items():
                assert loss is None or other[name] == pytest.approx(loss, rel=bound), changes
