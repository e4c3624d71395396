"""Plans: closed forms, what changes make of them, and what the command says."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.source import ROOT

import megatron.mixing  # noqa: F401
from megatron.config import Config, load_config
from megatron.errors import ConfigError
from megatron.training.layout import run_layout
from megatron.training.plan import Assumptions, Plan, make_plan
from megatron.training.plan.advice import warnings
from megatron.training.plan.assumptions import GIB
from megatron.training.plan.report import report

BASE: dict[str, Any] = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "seq_length": 2048,
    "vocab_size": 50257,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 8,
    "train_iters": 1000,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "domains": {"a": {"train": ["nowhere/a"]}, "b": {"train": ["nowhere/b"]}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    content = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    path = folder / "plan.yml"
    path.write_text(yaml.safe_dump(content))
    return path


def loaded(folder: Path, **changes: Any) -> Config:
    return load_config([str(write(folder, **changes))])


def planned(folder: Path, ranks: int, **changes: Any) -> Plan:
    config = loaded(folder, **changes)
    return make_plan(config, run_layout(config, ranks))


def test_bytes_per_parameter_are_those_of_the_zero_paper(folder: Path) -> None:
    """Rajbhandari et al. 2020, section 5: 2 + 2 + 12 bytes, divided as the stage says."""
    for stage, ranks in itertools.product((1, 2, 3), (1, 8, 64)):
        plan = planned(folder, ranks, zero_optimization={"stage": stage})
        held, count = plan.worst.states, plan.parameters
        assert held.optimizer == pytest.approx(12 * count / ranks, rel=1e-3)
        assert held.weights == pytest.approx(2 * count / (ranks if stage == 3 else 1), rel=1e-3)
        if stage != 2:
            parts = ranks if stage == 3 else 1
            assert held.gradients == pytest.approx(2 * count / parts, rel=1e-3)
        else:  # whole gradients of every parameter that reaches into the rank's part
            assert 2 * count / ranks <= held.gradients <= 2 * count / ranks + 2 * 2 * 50304 * 4096


def test_a_block_keeps_36_bytes_per_token_and_hidden_unit(folder: Path) -> None:
    """Korthikanti et al. 2022, equation 2, without attention matrices; see docs/planning.md."""
    one, two = (planned(folder, 1, num_layers=layers).worst.activations for layers in (1, 2))
    unit = 2 * 2048 * 4096
    assert (two.saved - one.saved) / unit == pytest.approx(36, rel=0.002)


@pytest.mark.option("model_parallel_size", "sequence_parallel")
@pytest.mark.parametrize(("sequence", "bytes_kept"), [(False, 8 + 28 / 4), (True, 36 / 4)])
def test_tensor_ranks_share_activations(folder: Path, sequence: bool, bytes_kept: float) -> None:
    changes = {"model_parallel_size": 4, "sequence_parallel": sequence}
    one, two = (
        planned(folder, 4, num_layers=layers, **changes).worst.activations for layers in (1, 2)
    )
    assert (two.saved - one.saved) / (2 * 2048 * 4096) == pytest.approx(bytes_kept, rel=0.003)


@pytest.mark.option("checkpoint_activations", "checkpoint_num_layers")
def test_recomputation_keeps_one_input_a_group(folder: Path) -> None:
    for together in (1, 4):
        changes = {"checkpoint_activations": True, "checkpoint_num_layers": together}
        few, many = (
            planned(folder, 1, num_layers=layers, **changes).worst.activations
            for layers in (16, 32)
        )
        assert many.saved - few.saved == 16 / together * 2 * 2048 * 4096 * 2


@pytest.mark.parametrize(("stages", "accumulation"), [(2, 8), (4, 8), (8, 8), (8, 4), (16, 64)])
def test_a_pipeline_has_its_bubble_and_its_micro_batches(
    folder: Path, stages: int, accumulation: int
) -> None:
    """Narayanan et al. 2021, section 2.2: at most p − s in flight, (p − 1) of (m + p − 1) idle."""
    plan = planned(folder, 16, pipe_parallel_size=stages, gradient_accumulation_steps=accumulation)
    assert plan.bubble == (stages - 1) / (accumulation + stages - 1)
    assert [stage.activations.in_flight for stage in plan.stages] == [
        min(stages - stage, accumulation) for stage in range(stages)
    ]
    assert plan.worst.stage == 0
    found = warnings(plan, Assumptions(device_memory=1e15))
    assert any("stands still" in text for text in found) == (plan.bubble > 0.2)


def test_what_is_sent(folder: Path) -> None:
    """Rings: an all-reduce over k ranks sends 2 (k − 1) / k of the bytes from each."""
    unit = 2 * 2048 * 4096 * 2  # a micro-batch's residual stream
    tensor = planned(folder, 4, model_parallel_size=4).worst.sent["tensor"]
    exchanged = 2 * 2048 * 3 * 4
    assert tensor == 8 * 1.5 * ((4 * 32 + 2) * unit + exchanged)
    plan = planned(folder, 8)
    count = plan.parameters
    assert plan.worst.sent["gradients"] == 2 * 7 / 8 * 2 * count
    assert plan.worst.sent["weights"] == 7 / 8 * 2 * count
    assert plan.worst.sent["ledger"] == 2 * 7 / 8 * 8 * (4 * 2 + 4)
    three = planned(folder, 8, zero_optimization={"stage": 3}).worst.sent
    assert three["weights"] == 8 * 2 * 7 / 8 * 2 * count
    assert three["gradients"] == 8 * 7 / 8 * 2 * count
    first, middle, last = planned(
        folder, 3, pipe_parallel_size=3, pipe_partition_method="uniform"
    ).stages
    assert (first.sent["pipeline"], middle.sent["pipeline"]) == (8 * unit, 16 * unit)
    assert last.sent["pipeline"] == first.sent["pipeline"]
    assert first.sent["tied embedding"] == last.sent["tied embedding"] == 50304 * 4096 * 2
    assert "tied embedding" not in middle.sent
    assert planned(folder, 1).worst.sent == {}


@pytest.mark.option("pipe_parallel_size")
def test_stages_hold_the_model_and_the_checkpoint_its_states(folder: Path) -> None:
    plan = planned(folder, 64, pipe_parallel_size=4, model_parallel_size=4)
    assert [stage.first for stage in plan.stages] == [0, 9, 17, 25]
    # Weights, master weights and moments; the embedding is at both ends of the pipeline.
    stored = sum(stage.parameters for stage in plan.stages) * 4 * 14
    assert plan.checkpoint_bytes == pytest.approx(stored * 1.02, rel=1e-4)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipe=st.sampled_from([1, 2, 4]),
    data=st.sampled_from([1, 2, 16]),
    half=st.booleans(),
    recomputed=st.booleans(),
)
def test_dividing_more_never_needs_more(
    tmp_path_factory: Any, tensor: int, pipe: int, data: int, half: bool, recomputed: bool
) -> None:
    folder = tmp_path_factory.mktemp("plans")
    base: dict[str, Any] = {
        "bf16": {"enabled": half},
        "model_parallel_size": tensor,
        "pipe_parallel_size": pipe,
        "checkpoint_activations": recomputed,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000},
    }
    ranks = tensor * pipe * data
    plan = planned(folder, ranks, **base)
    need = plan.worst.peak
    assert planned(folder, 2 * ranks, **base).worst.peak <= need
    assert (
        planned(folder, 2 * ranks, **{**base, "model_parallel_size": 2 * tensor}).worst.peak < need
    )
    fewer = [{"train_micro_batch_size_per_gpu": 1}]
    fewer += [] if recomputed else [{"checkpoint_activations": True}]
    fewer += [{"sequence_parallel": True}] if tensor > 1 else []
    for change in fewer:
        # The update may need most, and knows nothing of activations.
        other = planned(folder, ranks, **{**base, **change})
        assert other.worst.peak <= need
        assert other.worst.activations.total < plan.worst.activations.total, change
    offloaded = {**base["zero_optimization"], "offload_optimizer": {"device": "cpu"}}
    moved = planned(folder, ranks, **{**base, "zero_optimization": offloaded}).worst
    assert moved.states.optimizer == 0
    assert moved.states.host > 0
    assert moved.peak <= need + max(50304 * 4096, 16384 * 4096) * (2 if half else 4)


def test_what_does_not_fit_is_told_with_what_would(folder: Path) -> None:
    small = Assumptions(device_memory=40 * GIB)
    plan = planned(folder, 64)
    fit, remedies = warnings(plan, small)[:2]
    assert fit.startswith("does not fit: every rank needs ")
    assert "37.6 GiB of a device's 40.0 GiB can be used" in fit
    for label, changes in (
        ("checkpoint_activations: true", {"checkpoint_activations": True}),
        ("model_parallel_size: 2", {"model_parallel_size": 2}),
        ("zero_optimization: {stage: 2}", {"zero_optimization": {"stage": 2}}),
        ("sequence_parallel: true", {"sequence_parallel": True}),
    ):
        other = planned(folder, 64, **changes)
        fits = other.worst.peak <= small.usable_memory
        assert (label in remedies) == fits, (label, other.worst.peak / GIB, remedies)
    assert "would make it fit" in remedies


def test_changes_are_put_together_when_none_is_enough(folder: Path) -> None:
    found = warnings(planned(folder, 8), Assumptions(device_memory=12 * GIB))
    assert "together these would make it fit: " in found[1]
    assert "checkpoint_activations: true" in found[1]
    found = warnings(planned(folder, 2), Assumptions(device_memory=3 * GIB))
    assert found[1].startswith("the least that was found is ")
    assert "ranks that would fit" in found[1] or "larger devices" in found[1]


def test_the_stage_that_does_not_fit_is_named(folder: Path) -> None:
    plan = planned(folder, 8, pipe_parallel_size=8)
    assert warnings(plan, Assumptions(device_memory=8 * GIB))[0].startswith(
        "does not fit: stage 0 needs "
    )


def test_nodes_balance_and_bucket(folder: Path) -> None:
    roomy = Assumptions(device_memory=1e15)
    plan = planned(folder, 32, model_parallel_size=16)
    assert any("reaches across nodes of 8" in text for text in warnings(plan, roomy))
    wide = Assumptions(device_memory=1e15, ranks_per_node=16)
    assert not warnings(plan, wide)
    small = {"num_layers": 8, "hidden_size": 1024, "num_attention_heads": 8, "vocab_size": 250_000}
    plan = planned(folder, 4, pipe_parallel_size=4, gradient_accumulation_steps=64, **small)
    text = next(text for text in warnings(plan, roomy) if "unbalanced" in text)
    assert "stage 3 computes" in text
    assert "pipe_partition_method: parameters makes it" in text
    tight = Assumptions(device_memory=10 * GIB)
    text = next(text for text in warnings(plan, tight) if text.startswith("reduce_bucket_size"))
    assert f"{{reduce_bucket_size: {plan.worst.parameters}}}" in text


def test_time_to_a_budget(folder: Path) -> None:
    plan = planned(folder, 8)
    chosen = Assumptions(tokens=300e9, peak_flops=100e12, utilisation=0.5)
    days = 300e9 * plan.flops_per_token / (8 * 50e12) / 86_400
    lines = report(plan, chosen)
    assert any(line.startswith(f"time: {days:.3g} days") for line in lines), lines
    steps = -(-300_000_000_000 // (8 * 2 * 8 * 2048))
    assert any(f"= {steps:,} steps" in line for line in lines)
    slow = Assumptions(peak_flops=1e15, bandwidth=1e6)
    assert any("waits for the network" in text for text in warnings(plan, slow))


@pytest.mark.parametrize(
    "numbers",
    [{"utilisation": 40.0}, {"utilisation": 0.0}, {"device_memory": -1.0}, {"tokens": 0.0}],
)
def test_assumptions_that_cannot_be(numbers: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(numbers)).replace('_', '-')}"):
        Assumptions(**numbers)


def deepy(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv[0] = 'deepy.py'\n"
        "import deepy; deepy.missing_modules = lambda launching: []\n"
        "sys.exit(deepy.console_script())"
    )
    command = [sys.executable, "-c", code, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_needs_neither_torch_nor_data(folder: Path) -> None:
    done = deepy(
        str(write(folder)), "--plan", "--world-size", "4096", "--tokens", "1e12", "--set",
        "model_parallel_size=8", "pipe_parallel_size=16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("plan: 4,096 ranks = pipeline 16 × data 32 × tensor 8; bf16")
    assert any(line.startswith("most memory: stage 0") for line in lines)
    assert any(line.startswith("time: ") and "989 TFLOP/s" in line for line in lines)
    assert any("stands still for 65%" in line for line in lines)


def test_without_a_number_of_ranks_the_plan_is_of_this_machine(folder: Path) -> None:
    done = deepy(str(write(folder, num_layers=2, hidden_size=64, num_gpus=2)), "--plan")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan: 2 ranks = pipeline 1 × data 2 × tensor 1")


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (["--plan", "--world-size", "6", "--set", "model_parallel_size=4"], {}, "6 ranks cannot"),
        (["--plan", "--world-size", "3"], {"train_batch_size": 64}, "is not train_micro_batch"),
        (["--plan", "--world-size", "2", "--utilisation", "40"], {}, "--utilisation is 40.0"),
        (["--plan", "--world-size", "0"], {}, "world_size is 0"),
        (["--plan", "--world-size", "2"], {"vocab_size": None}, "nowhere/a"),
        (["--tokens", "3"], {}, "--tokens belongs to --plan"),
        (["--plan", "--check"], {}, "not allowed with"),
    ],
)
def test_what_cannot_be_planned(
    folder: Path, arguments: list[str], changes: dict[str, Any], message: str
) -> None:
    done = deepy(str(write(folder, **changes)), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


MIXTURE: dict[str, Any] = {"moe_num_experts": 8, "moe_top_k": 2, "moe_router_type": "topk"}


def test_experts_that_are_shared_out_are_held_once_in_so_many_ranks(folder: Path) -> None:
    whole = planned(folder, 8, **MIXTURE)
    shared = planned(folder, 8, **MIXTURE, moe_expert_parallel_size=4)
    expert = 2 * 4096 * 16384 + 16384 + 4096
    assert whole.parameters == shared.parameters == whole.worst.parameters
    assert shared.worst.parameters == whole.parameters - 32 * 6 * expert
    assert whole.active_parameters == whole.parameters - 32 * 6 * expert
    assert shared.worst.states.weights == pytest.approx(2 * shared.worst.parameters, rel=1e-6)
    # All of the optimizer's state is there once.
    for plan in (whole, shared):
        assert plan.worst.states.optimizer == pytest.approx(12 * whole.parameters / 8, rel=1e-6)
    assert "experts" not in whole.worst.sent
    tokens, passes = 2 * 2048, 4
    rows = 32 * 2 * tokens * 4096 * 2 * passes * 8  # blocks, choices, bytes, micro-batches
    assert shared.worst.sent["experts"] == rows * 3 / 4
    assert shared.worst.sent["gradients"] < whole.worst.sent["gradients"]
    # A token costs what the experts cost that it goes to.
    dense = planned(folder, 8, intermediate_size=2 * 16384)
    assert whole.flops_per_token == pytest.approx(dense.flops_per_token, rel=1e-4)
    text = "\n".join(report(shared, Assumptions()))
    assert "experts divided among 4 data ranks" in text
    assert f"{whole.active_parameters:,} of them active" in text
    assert "active" not in "\n".join(report(dense, Assumptions()))


def test_a_stage_without_shared_experts_is_refused(folder: Path) -> None:
    changes = {"pipe_parallel_size": 2, "moe_expert_interval": 32, "moe_expert_parallel_size": 2}
    with pytest.raises(ConfigError, match="stage 1 of the pipeline has no block with experts"):
        planned(folder, 4, **MIXTURE, **changes)
    with pytest.raises(ConfigError, match="does not divide the 3 data-parallel ranks"):
        planned(folder, 3, **MIXTURE, moe_expert_parallel_size=2)
