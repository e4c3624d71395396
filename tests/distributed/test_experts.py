"""Mixtures of experts train alike on one process, and on every layout of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import runs
from support.pool import RankPools
from support.training import Harness

from megatron.config import load_config
from megatron.parallel.layout import Layout
from megatron.parallel.partition import Partition
from megatron.training.layout import run_layout

STEPS = 4
EXPERTS = {
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_router_type": "topk",
    "moe_loss_coeff": 0.3,
    "moe_z_loss_coeff": 0.01,
    "moe_jitter_eps": 0.1,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "gradient_clipping": 0.5,
    "log_interval": 1,
    "log_param_norm": True,
    "log_grad_norm": True,
    "log_optimizer_states": True,
    "mixing": {"method": "static"},
    "init_method_std": 0.2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-3}},
}
SHARED = {"moe_expert_parallel_size": 2}
ZERO_2 = {"zero_optimization": {"stage": 2, "contiguous_gradients": True}}
SINKHORN = {"moe_router_type": "sinkhorn", "moe_top_k": 1, "moe_expert_interval": 2}


class Run(Harness):
    """Keeps what a step says of the experts beside its losses."""

    def step(self, planned: Any, totals: Any, outcome: Any, **rest: Any) -> None:
        super().step(planned, totals, outcome, **rest)
        self.ledger[-1]["statistics"] = dict(outcome.statistics)


def body(rank: int, world_size: int, files: Mapping[str, Path]) -> dict[str, Any]:
    found = {}
    for name, file in files.items():
        harness = Run(file)
        harness.run(STEPS)
        cuts = {name: cut for name, cut in harness.parts.engine.partitions.items() if cut}
        valid = harness.parts.validation.measure(harness.parts.engine).loss.tolist()
        found[name] = {
            "ledger": harness.ledger,
            "parameters": harness.parameters(),
            "cuts": cuts,
            "valid": valid,
        }
        harness.close()
    return found


def files(folder: Path, layouts: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    made = {}
    for name, changes in layouts.items():
        content = runs.config(folder / "data", folder / "run", **{**EXPERTS, **changes})
        made[name] = runs.write_config(folder / f"{name.replace(' ', '_')}.yml", content)
    return made


def layout_of(file: Path, world: int) -> Layout:
    return run_layout(load_config([str(file)]), world)


def joined(results: Sequence[Mapping[str, Any]], layout: Layout) -> dict[str, np.ndarray]:
    """Put the ranks' parts together; what several hold has to be the same to the bit."""
    import torch

    whole: dict[str, np.ndarray] = {}
    for pipe in range(layout.pipe_size):
        for data in range(layout.data_size):
            ranks = [
                layout.rank_at(pipe=pipe, data=data, tensor=tensor)
                for tensor in range(layout.tensor_size)
            ]
            for name in results[ranks[0]]["parameters"]:
                parts = [torch.from_numpy(results[rank]["parameters"][name]) for rank in ranks]
                cut: Partition | None = results[ranks[0]]["cuts"].get(name)
                if cut is None:
                    assert all(torch.equal(parts[0], part) for part in parts), name
                    value = parts[0]
                else:
                    value = cut.unpad(cut.join(parts))
                if name in whole:
                    assert np.array_equal(whole[name], value.numpy()), name
                whole[name] = value.numpy()
    return whole


def check(
    pools: RankPools,
    folder: Path,
    world: int,
    layouts: Mapping[str, Mapping[str, Any]],
    **model: Any,
) -> None:
    (alone,) = pools.call(body, 1, files(folder, {"one": model}))
    one = alone["one"]
    made = files(folder, {name: {**model, **layout} for name, layout in layouts.items()})
    results = pools.call(body, world, made)
    for name, file in made.items():
        own = [result[name] for result in results]
        for record, other in zip(own[0]["ledger"], one["ledger"], strict=True):
            where = f"{name}, step {record['step']}"
            assert record["samples"] == other["samples"], where
            for key in ("domain_loss", "grad_norm"):
                assert np.allclose(record[key], other[key], rtol=2e-5, equal_nan=True), (
                    f"{where}: {key} {record[key]}, {other[key]}"
                )
            for key, value in other["statistics"].items():
                assert record["statistics"][key] == pytest.approx(value, rel=1e-4), (where, key)
        assert all(result["ledger"] == own[0]["ledger"] for result in own), name
        assert np.allclose(own[0]["valid"], one["valid"], rtol=2e-5), name
        layout = layout_of(file, world)
        for rank, result in enumerate(own):
            # A stage may have no block of them.
            held = {key.split(".")[3] for key in result["parameters"] if ".experts." in key}
            place = layout.coordinates(rank).data % layout.expert_size
            part = 4 // layout.expert_size
            expected = {str(place * part + one) for one in range(part)}
            assert held == expected or (layout.pipe_size > 1 and not held), name
        weights = joined(own, layout)
        assert weights.keys() == one["parameters"].keys()
        for key, value in one["parameters"].items():
            value = value[: weights[key].shape[0]]
            assert np.abs(weights[key] - value).max() < 2e-5, (name, key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    runs.make_data(folder / "data")
    return folder


@pytest.mark.option("moe_expert_parallel_size")
def test_two_ranks_train_as_one(folder: Path, pools: RankPools) -> None:
    layouts = {
        "tensor": {"model_parallel_size": 2},
        "sequence": {"model_parallel_size": 2, "sequence_parallel": True},
        "pipeline": {"pipe_parallel_size": 2},
        "data": {"checkpoint_activations": True},
        "zero 3": {"zero_optimization": {"stage": 3}},
        "shared": SHARED,
        "shared, zero 2": {**SHARED, **ZERO_2, "checkpoint_activations": True},
    }
    check(pools, folder, 2, layouts)


def test_interval_and_sinkhorn_on_two_ranks(folder: Path, pools: RankPools) -> None:
    gated = {"activation": "swiglu", "intermediate_size": 48, "use_bias_in_mlp": False}
    layouts = {
        "sequence": {"model_parallel_size": 2, "sequence_parallel": True},
        "pipeline": {"pipe_parallel_size": 2},
        "shared": SHARED,
    }
    check(pools, folder, 2, layouts, **SINKHORN, **gated)


@pytest.mark.slow
def test_four_ranks_train_as_one(folder: Path, pools: RankPools) -> None:
    layouts = {
        "shared by four": {"moe_expert_parallel_size": 4},
        "two groups": {**SHARED, **ZERO_2},
        "two groups, zero 1": {**SHARED, "train_micro_batch_size_per_gpu": 1},
        "tensor": {**SHARED, "model_parallel_size": 2},
        "sequence": {**SHARED, "model_parallel_size": 2, "sequence_parallel": True, **ZERO_2},
        "pipeline": {**SHARED, "pipe_parallel_size": 2},
    }
    check(pools, folder, 4, layouts)


@pytest.mark.slow
def test_half_precision_is_near(folder: Path, pools: RankPools) -> None:
    layouts = {
        "bf16": {**SHARED, "bf16": {"enabled": True}},
        "bf16, zero 2": {**SHARED, **ZERO_2, "bf16": {"enabled": True}, "moe_lbl_in_fp32": True},
    }
    (alone,) = pools.call(body, 1, files(folder, {"one": {}}))
    made = files(folder, layouts)
    results = pools.call(body, 2, made)
    for name in made:
        for record, other in zip(results[0][name]["ledger"], alone["one"]["ledger"], strict=True):
            assert not record["skipped"]
            assert np.allclose(record["domain_loss"], other["domain_loss"], rtol=1e-2), name
            assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-2), name
        assert results[0][name]["ledger"] == results[1][name]["ledger"]
