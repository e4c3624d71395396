"""Schedules in checkpoints, optimizers of another kind, traces, and the noise of a toy."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from support import runs

import megatron.mixing  # noqa: F401
from megatron.config import Config, deepspeed_config, load_config
from megatron.engine.noise_scale import GradientNoiseScale, noise_and_signal
from megatron.engine.observer import StepOutcome
from megatron.errors import CheckpointError, ConfigError
from megatron.model.gpt import GPT, param_groups
from megatron.parallel.layout import Layout
from megatron.training.compatible import how_to_load, layout_facts, saved_state
from megatron.training.plan.compute import checkpoint_bytes, state_bytes
from megatron.training.profiling import StepProfiler, attach_profiler
from megatron.training.schedule import (
    FACT,
    run_schedule,
    schedule_facts,
    schedule_note,
    with_checkpoint_schedule,
)


def configured(folder: Path, **changes: Any) -> Config:
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(runs.config(folder, folder / "run", **changes)))
    return load_config([str(path)])


def manifest(config: Config, **extra: Any) -> Any:
    layout = layout_facts(config, Layout(world_size=2))
    extra = {FACT: json.loads(json.dumps(schedule_facts(config))), **extra}
    return SimpleNamespace(step=5, layout=json.loads(json.dumps(layout)), extra=extra)


@pytest.mark.option("use_checkpoint_lr_scheduler")
@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_decay_style": "cosine", "warmup": 0.25, "min_lr": 1e-5},
        {"lr_decay_style": "wsd", "warmup_iters": 3, "wsd_decay_fraction": 0.5},
        {"lr_decay_style": "linear", "lr_formula": "fork", "lr_decay_fraction": 0.5},
    ],
)
def test_a_run_may_follow_its_checkpoints_schedule(tmp_path: Path, schedule: Any) -> None:
    adam = {"type": "Adam", "params": {"lr": 1e-3}}
    before = configured(tmp_path, train_iters=40, optimizer=adam, **schedule)
    other = {"type": "Adam", "params": {"lr": 5e-3}}
    now = configured(
        tmp_path,
        train_iters=80,
        optimizer=other,
        use_checkpoint_lr_scheduler=True,
        warmup=0.5,
        lr_decay_style="exponential",
    )
    followed = run_schedule(with_checkpoint_schedule(now, manifest(before)))
    rates = [run_schedule(before).rate(step) for step in range(1, 60)]
    assert [followed.rate(step) for step in range(1, 60)] == rates
    assert [run_schedule(now).rate(step) for step in range(1, 60)] != rates
    with pytest.raises(CheckpointError, match="does not say what its schedule was"):
        with_checkpoint_schedule(now, SimpleNamespace(step=5, extra={}))


@pytest.mark.option("override_lr_scheduler")
def test_another_schedule_is_told_of_unless_it_is_meant(tmp_path: Path) -> None:
    saved = manifest(configured(tmp_path, warmup=0.1))
    assert schedule_note(configured(tmp_path, warmup=0.1), saved) is None
    note = schedule_note(configured(tmp_path, warmup=0.3), saved)
    assert note is not None
    assert "warmup (checkpoint 0.1, configuration 0.3)" in note
    meant = configured(tmp_path, warmup=0.3, override_lr_scheduler=True)
    assert schedule_note(meant, saved) is None


@pytest.mark.option("no_load_optim")
def test_the_state_of_another_optimizer_is_refused_or_left(tmp_path: Path) -> None:
    def kind(name: str, **params: Any) -> Config:
        return configured(tmp_path, optimizer={"type": name, "params": {"lr": 0.1, **params}})

    two = Layout(world_size=2)
    adam, lion, sm3 = kind("Adam"), kind("Lion"), kind("SM3")
    assert "optimizer" not in layout_facts(adam, two)
    for saved, run in ((adam, lion), (lion, adam), (sm3, lion), (kind("SGD", momentum=0.9), lion)):
        facts = layout_facts(run, two)
        with pytest.raises(CheckpointError, match="no_load_optim: true"):
            how_to_load(manifest(saved), facts, weights_only=False)
        assert how_to_load(manifest(saved), facts, weights_only=True) == "directly"
    with pytest.raises(CheckpointError, match="sgd with other parameters"):
        how_to_load(
            manifest(kind("SGD", momentum=0.9)), layout_facts(kind("SGD"), two), weights_only=False
        )
    four = Layout(world_size=4)
    assert how_to_load(manifest(lion), layout_facts(lion, four), weights_only=False) == "convert"
    with pytest.raises(CheckpointError, match="cannot be laid out anew"):
        how_to_load(manifest(sm3), layout_facts(sm3, four), weights_only=False)
    assert saved_state(manifest(sm3).layout, "x", weights_only=True) == ()
    assert saved_state(manifest(lion).layout, "x", weights_only=False) == ("exp_avg",)
    assert kind("Lion").checkpoint.takes_optimizer(weights_only=False)
    without = configured(tmp_path, no_load_optim=True)
    assert not without.checkpoint.takes_optimizer(weights_only=False)


def test_the_plan_counts_each_optimizers_state(tmp_path: Path) -> None:
    sizes = {}
    for name, params in (
        ("Adam", {}),
        ("Adam8bit", {}),
        ("Lion", {}),
        ("SGD", {}),
        ("SGD", {"momentum": 0.9}),
        ("SM3", {}),
        ("madgrad_wd", {}),
        ("madgrad_wd", {"momentum": 0.0}),
    ):
        config = configured(tmp_path, optimizer={"type": name, "params": {"lr": 0.1, **params}})
        sizes[name, *params.values()] = state_bytes(config), checkpoint_bytes(config)
    assert [size for size, _ in sizes.values()] == [8, 2, 4, 0, 4, 0, 12, 8]
    assert sizes["SGD",][1] < sizes["Lion",][1] < sizes["Adam",][1] < sizes["madgrad_wd",][1]


@pytest.mark.option("weight_decay")
def test_norms_and_biases_never_decay_and_embeddings_as_asked(tmp_path: Path) -> None:
    config = configured(tmp_path, no_weight_tying=True)
    model = GPT(config.model, seed=1)
    names = {id(value): name for name, value in model.named_parameters()}
    decays = {}
    for asked in (True, False):
        groups = param_groups(model, 0.3, decay_embeddings=asked)
        decays[asked] = {
            names[id(value)]: group["weight_decay"] for group in groups for value in group["params"]
        }
        assert decays[asked].keys() == set(names.values())
    for name, value in model.named_parameters():
        spared = value.dim() == 1
        assert decays[True][name] == (0.0 if spared else 0.3), name
        outside = "embedding" in name or "final_linear" in name
        assert decays[False][name] == (0.0 if spared or outside else 0.3), name
    assert sum(decays[True].values()) - sum(decays[False].values()) == pytest.approx(0.6)


@pytest.mark.option("loss_scale", "fp16")
def test_every_key_of_loss_scaling_reaches_deepspeed(tmp_path: Path) -> None:
    given = {
        "loss_scale": 0.0,
        "initial_scale_power": 11,
        "loss_scale_window": 77,
        "hysteresis": 5,
        "min_loss_scale": 3,
        "consecutive_hysteresis": True,
    }
    config = configured(tmp_path, fp16={"enabled": True, **given})
    asked = deepspeed_config(config, micro=2, accumulation=2, data_size=2)["fp16"]
    assert asked == {"enabled": True, **given}
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
    from deepspeed.runtime.precision_config import get_float16_config

    read = get_float16_config({"fp16": asked})
    scaler = CreateLossScaler(
        dtype=torch.float16,
        static_loss_scale=read.loss_scale,
        dynamic_scaling=read.loss_scale == 0,
        dynamic_loss_args=read.dynamic_loss_scale_args(),
    )
    assert (scaler.cur_scale, scaler.scale_window, scaler.delayed_shift) == (2.0**11, 77, 5)
    assert (scaler.min_scale, scaler.consecutive_hysteresis) == (3, True)


def test_the_noise_scale_of_a_toy_is_found() -> None:
    """Gradients G + noise with a known covariance, in micro-batches of 4 of a batch of 32."""
    random = np.random.default_rng(0)
    mean, deviation = np.array([1.0, -2.0, 0.5]), np.array([3.0, 1.0, 2.0])
    micro, total, signals, traces = 4, 32, [], []
    for _ in range(4000):
        each = mean + deviation * random.standard_normal((total, 3))
        small = each.reshape(total // micro, micro, 3).mean(axis=1)
        signal, trace = noise_and_signal(
            float((small**2).sum(axis=1).mean()),
            float((each.mean(axis=0) ** 2).sum()),
            micro,
            total,
        )
        signals.append(signal)
        traces.append(trace)
    assert np.mean(signals) == pytest.approx((mean**2).sum(), rel=0.03)
    assert np.mean(traces) == pytest.approx((deviation**2).sum(), rel=0.03)


@pytest.mark.option("log_gradient_noise_scale", "gradient_noise_scale_n_batches")
def test_the_noise_scale_is_averaged_over_the_steps_before_a_logged_one() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    observer = GradientNoiseScale(
        [weight],
        micro=1,
        total=2,
        accumulation=2,
        steps=2,
        log_interval=4,
        logged=lambda step: step % 4 == 0,
        device=torch.device("cpu"),
    )
    gradients = {3: ([3.0, 0.0], [1.0, 0.0]), 4: ([2.0, 1.0], [2.0, -1.0])}
    told: dict[int, Any] = {}
    for step in range(1, 5):
        pair = gradients.get(step, ([100.0, 0.0], [0.0, 100.0]))
        observer.begin(step, loss_scale=8.0)
        for one in pair:
            (weight * torch.tensor(one)).sum().mul(8.0 / 2).backward()
        norm = float(np.linalg.norm(np.mean(pair, axis=0)))
        told[step] = observer.end(step, StepOutcome(grad_norm=norm, skipped=False))
    # Step 3: |g|² are 9 and 1, |mean|² is 4; step 4: 5, 5 and 4.
    trace = (5 - 4) / (1 - 1 / 2) + (5 - 4) / (1 - 1 / 2)
    signal = (2 * 4 - 5) + (2 * 4 - 5)
    assert told == {1: {}, 2: {}, 3: {}, 4: {"noise_scale": pytest.approx(trace / signal)}}


@pytest.mark.option("profile", "profile_step_start", "profile_step_stop", "memory_profiling")
def test_the_asked_steps_are_traced(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path / "profile", first=2, end=4, trace=True, memory=False)
    for step in range(1, 6):
        profiler.begin(step, loss_scale=1.0)
        with torch.profiler.record_function(f"the step {step}"):
            torch.ones(3).sum()
        assert profiler.end(step, StepOutcome(grad_norm=1.0, skipped=False)) == {}
        assert (tmp_path / "profile" / "trace.json").exists() == (step >= 3)
    trace = (tmp_path / "profile" / "trace.json").read_text()
    assert [f"the step {step}" in trace for step in range(1, 6)] == [
        False,
        True,
        True,
        False,
        False,
    ]
    config = configured(tmp_path, memory_profiling=True)
    runtime: Any = SimpleNamespace(device=torch.device("cpu"), rank=0)
    with pytest.raises(ConfigError, match="memory_profiling follows allocations in CUDA memory"):
        attach_profiler(config, None, runtime)  # type: ignore[arg-type]
    observed: list[Any] = []
    engine: Any = SimpleNamespace(observe=observed.append)
    attach_profiler(configured(tmp_path, profile=True), engine, runtime)
    assert len(observed) == 1
    with pytest.raises(ConfigError, match="should be above profile_step_start"):
        configured(tmp_path, profile=True, profile_step_start=5, profile_step_stop=5)


@pytest.mark.option("save_iters", "extra_save_iters", "checkpoint_scale", "checkpoint_factor")
def test_checkpoints_are_written_when_they_are_due(tmp_path: Path) -> None:
    def saves(**keys: Any) -> list[int]:
        path = tmp_path / "saves.yml"
        content = runs.config(tmp_path, tmp_path / "run", **keys)
        del content["save_interval"]
        path.write_text(yaml.safe_dump(content))
        checkpoint = load_config([str(path)]).checkpoint
        return [step for step in range(41) if checkpoint.saves_at(step, 40)]

    assert saves(save_iters=[0, 3, 17]) == [0, 3, 17, 40]
    assert saves(extra_save_iters=[3], checkpoint_factor=10) == [3, 10, 20, 30, 40]
    assert saves(checkpoint_scale="log", checkpoint_factor=3) == [1, 3, 9, 27, 40]
