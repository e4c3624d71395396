"""Keys that change what is computed or summed, in training and in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from support import runs
from support.equality import relative
from support.optimizers import Watched
from support.pool import RankPools

from megatron.config import load_config
from megatron.parallel.layout import Layout
from megatron.parallel.partition import Partition
from megatron.parallel.topology import Topology
from megatron.training.engines import training_loss

STEPS = 3
SHAPES: dict[str, dict[str, Any]] = {
    "zero1": {},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "tensor": {"model_parallel_size": 2, "sequence_parallel": True},
    "pipe": {"pipe_parallel_size": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numbers")
    runs.make_data(folder / "data")
    return folder


def body(rank: int, world: int, files: dict[str, Path]) -> dict[str, Any]:
    """Train what each file describes, one after the other."""
    found = {}
    for name, file in files.items():
        harness = Watched(file)
        try:
            harness.run(STEPS)
            optimizer = harness.parts.engine.optimizer
            inner = getattr(optimizer, "optimizer", optimizer)
            found[name] = {
                "losses": [record["domain_loss"] for record in harness.ledger],
                "lr": [record["lr"] for record in harness.ledger],
                "norms": [record["grad_norm"] for record in harness.ledger],
                "statistics": harness.statistics,
                "betas": inner.param_groups[0]["betas"],
                "before": (
                    not getattr(optimizer, "postscale_gradients", True),
                    getattr(optimizer, "gradient_predivide_factor", None),
                ),
            }
        finally:
            harness.close()
    return found


def train(
    pools: RankPools, data: Path, cases: dict[str, dict[str, Any]], ranks: int = 2
) -> dict[str, Any]:
    files = {}
    for name, changes in cases.items():
        still = {"mixing": {"method": "static"}, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        content = runs.config(data / "data", data / name, **{**still, "num_gpus": ranks, **changes})
        files[name] = data / f"{name}.yml"
        files[name].write_text(yaml.safe_dump(content))
    found: dict[str, Any] = pools.call(body, ranks, files)[0]
    return found


@pytest.mark.option("z_loss")
def test_a_z_loss_trains_alike_in_every_layout_and_is_not_reported(
    pools: RankPools, data: Path
) -> None:
    asked = {"z_loss": 0.1}
    alone = train(pools, data, {"plain": {}, "z": asked}, ranks=1)
    plain, z = alone["plain"], alone["z"]
    assert z["losses"][0] == plain["losses"][0]
    assert z["norms"][0] != plain["norms"][0]
    assert z["losses"][1:] != plain["losses"][1:]
    cut = train(pools, data, {f"z-{name}": {**asked, **shape} for name, shape in SHAPES.items()})
    for name, found in cut.items():
        assert relative(found["norms"], z["norms"]) <= 1e-4, name
        for ours, theirs in zip(found["losses"], z["losses"], strict=True):
            assert relative(ours, theirs) <= 1e-4, name


@pytest.mark.option("scheduler")
def test_a_cycle_sets_the_rates_and_the_momentum_of_every_step(
    pools: RankPools, data: Path
) -> None:
    params = {"cycle_min_lr": 1e-4, "cycle_max_lr": 3e-4, "cycle_first_step_size": 2}
    asked = {"scheduler": {"type": "OneCycle", "params": params}}
    cases = {"plain": {}, "cycle-zero3": {**asked, **SHAPES["zero3"]}}
    cases |= {"cycle-pipe": {**asked, **SHAPES["pipe"]}}
    found = train(pools, data, cases)
    assert found["plain"]["betas"] == (0.9, 0.95)
    for name in ("cycle-zero3", "cycle-pipe"):
        assert found[name]["lr"] == pytest.approx([1e-4, 1e-4 + 1e-4, 3e-4])
        assert found[name]["betas"] == pytest.approx((0.8, 0.99))


def half_loss(rank: int, world: int, file: Path) -> dict[str, Any]:
    """Return the losses and gradients of what a configuration's loss is, on fp16 logits."""
    config = load_config([str(file)])
    topology = Topology.create(Layout(world_size=world, tensor_size=world), rank)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 5, 8, generator=generator).half().requires_grad_()
    weight = torch.randn(120, 8, generator=generator).half()
    targets = torch.randint(0, 120, (2, 5), generator=generator)
    seen: list[Any] = []
    loss_fn = training_loss(config, topology, lambda *told: seen.append(told))  # type: ignore[arg-type]
    rows = Partition(dim=0, blocks=(120,)).part(weight, rank, world).clone().requires_grad_()
    labels = (targets, torch.ones(2, 5), torch.zeros(2, dtype=torch.int64), torch.full((2,), 0.1))
    loss_fn((hidden, rows), labels).backward()
    logits = hidden.detach() @ weight.T
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    # The sum of exponentials and its logarithm in half precision, as theirs.
    at_target = shifted.gather(-1, targets[..., None]).squeeze(-1)
    narrow = shifted.exp().sum(dim=-1).log() - at_target
    wide = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return {
        "sums": seen[0][0].numpy(),
        "narrow": narrow.double().sum(dim=1).numpy(),
        "wide": wide.view(2, 5).double().sum(dim=1).numpy(),
        "gradient": hidden.grad.float().numpy(),
    }


@pytest.mark.option("fp16_lm_cross_entropy")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_in_half_precision_is_that_of_half_logits(
    pools: RankPools, data: Path, ranks: int
) -> None:
    files = {}
    for name, asked in (("narrow", True), ("wide", False)):
        changes = {"fp16": {"enabled": True}, "fp16_lm_cross_entropy": asked}
        content = runs.config(data / "data", data / name, **changes)
        files[name] = data / f"half-{name}.yml"
        files[name].write_text(yaml.safe_dump(content))
    narrow = pools.call(half_loss, ranks, files["narrow"])[0]
    wide = pools.call(half_loss, ranks, files["wide"])[0]
    assert relative(wide["sums"], wide["wide"]) < 1e-6
    assert relative(narrow["sums"], narrow["narrow"]) < 1e-3
    assert relative(narrow["sums"], narrow["wide"]) > 1e-6
    most = np.abs(wide["gradient"]).max()
    assert 0 < np.abs(narrow["gradient"] - wide["gradient"]).max() < 5e-3 * most


@pytest.mark.option("prescale_gradients", "gradient_predivide_factor")
def test_gradients_divided_before_their_sum_are_the_same(pools: RankPools, data: Path) -> None:
    """By powers of two, the same to the bit but for the order of the sum."""
    cases: dict[str, dict[str, Any]] = {}
    for name in ("zero1", "zero2", "zero3"):
        cases[f"{name}-after"] = SHAPES[name]
        cases[f"{name}-before"] = {**SHAPES[name], "prescale_gradients": True}
        cases[f"{name}-part"] = {**SHAPES[name], "gradient_predivide_factor": 4.0}
    found = train(pools, data, cases)
    for name in ("zero1", "zero2", "zero3"):
        after = found[f"{name}-after"]
        assert after["before"] == (False, 1.0)
        assert found[f"{name}-before"]["before"] == (True, 1.0)
        assert found[f"{name}-part"]["before"] == (False, 4.0)
        for kind in ("before", "part"):
            other = found[f"{name}-{kind}"]
            assert relative(other["norms"], after["norms"]) <= 1e-6, (name, kind)
            assert np.allclose(other["losses"], after["losses"], rtol=1e-6, equal_nan=True)


@pytest.mark.option("wall_clock_breakdown", "flops_profiler", "checkpoint_in_cpu")
def test_measuring_changes_nothing_in_any_layout(pools: RankPools, data: Path) -> None:
    parts = {"forward", "backward", "optimizer", "batch generator", "backward-allreduce"}
    recomputed = {"checkpoint_activations": True, "log_interval": 2}
    cases: dict[str, dict[str, Any]] = {}
    for name, shape in SHAPES.items():
        cases[f"{name}-plain"] = {**shape, **recomputed}
        cases[f"{name}-measured"] = {
            **shape,
            **recomputed,
            "checkpoint_in_cpu": True,
            "wall_clock_breakdown": True,
            "flops_profiler": {"enabled": True, "profile_step": 2},
        }
    found = train(pools, data, cases)
    totals = {}
    for name in SHAPES:
        plain, measured = found[f"{name}-plain"], found[f"{name}-measured"]
        assert measured["losses"] == plain["losses"], name
        assert measured["norms"] == plain["norms"], name
        for step, statistics in measured["statistics"].items():
            told = {key.removeprefix("timers/") for key in statistics}
            # Step 3 is not logged.
            assert told == ((parts | ({"pipe"} & told)) if step < 3 else set()), (name, step)
        assert ("timers/pipe" in measured["statistics"][1]) is (name == "pipe")
        assert plain["statistics"] == {1: {}, 2: {}, 3: {}}
        profile = (data / f"{name}-measured" / "profile" / "flops.txt").read_text()
        totals[name] = int(profile.split("total ")[1].split()[0].replace(",", ""))
    assert totals["zero1"] == totals["zero2"]
    # ZeRO 3's hooks let recomputation run to the end of a block.
    assert totals["zero1"] <= totals["zero3"] < 1.1 * totals["zero1"]
    assert 0 < totals["pipe"] < totals["zero1"] * 2
