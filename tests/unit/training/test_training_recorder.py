"""What the recorder says of the data, beside what it records."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron.data.plan import Plan
from megatron.engine.observer import StepOutcome
from megatron.mixing.base import Decision
from megatron.mixing.exhaustion import ExhaustionWatch
from megatron.monitor.overhead import Overhead
from megatron.monitor.sink import SinkGroup
from megatron.monitor.throughput import Throughput
from megatron.signals.ledger import StepTotals
from megatron.training.planner import Planned
from megatron.training.recorder import RunRecorder
from megatron.training.token_costs import TokenCosts

STEPS, BATCH = 40, 4


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def step(self, record: Any) -> None:
        self.steps.append(record.step)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **more: None


def drive(sinks, probes=()):
    said: list[tuple[int, str]] = []
    now = 0
    recorder = RunRecorder(
        sinks,
        domains=("small", "large"),
        throughput=Throughput(),
        epochs=lambda: np.zeros(2),
        describe=dict,
        loss_scale=None,
        log_interval=1,
        total_steps=STEPS,
        bytes_per_token={},
        audit=False,
        overhead=Overhead(),
        token_costs=TokenCosts(seq_length=8, validation=0),
        exhaustion=ExhaustionWatch(
            domains=("small", "large"), unique=(20.0, 1e6), samples_per_step=BATCH,
            total_steps=STEPS,
        ),
        say=lambda text: said.append((now, text)),
    )  # fmt: skip
    seen, weights = np.zeros(2, dtype=np.int64), np.array([0.25, 0.75])
    for now in range(1, STEPS + 1):
        seen = seen + np.array([1, 3])
        planned = Planned(
            plan=plan_of(now, weights), samples_seen=seen,
            decision=Decision(sampling_weights=weights, probe=0 if now in probes else None),
        )  # fmt: skip
        count = np.array([8.0, 24.0])
        totals = StepTotals(
            loss_sum=2 * count, token_count=count, square_sum=count, sample_count=count / 8,
            skipped=False, stop=False,
        )  # fmt: skip
        recorder.step(
            planned, totals, StepOutcome(skipped=False, grad_norm=None), lr=0.1, skipped=False
        )
    return said


def plan_of(step, weights):
    return Plan(
        step=step,
        domain=np.array([0, 1, 1, 1], dtype=np.int32),
        epoch=np.zeros(BATCH, dtype=np.int64),
        sample=np.arange(BATCH),
        weights=weights,
    )


def test_a_run_says_when_its_data_will_end():
    kept = Kept()
    said = drive(SinkGroup([kept]))
    assert kept.steps == list(range(1, STEPS + 1))
    assert [step for step, _ in said] == [1, 16, 20]
    assert "small (20 samples) at step 20 of 40" in said[0][1]


def test_the_weights_of_a_probe_forecast_no_end():
    said = drive(SinkGroup([Kept()]), probes=range(1, 9))
    assert [step for step, _ in said] == [9, 16, 20]


def test_a_rank_without_sinks_says_nothing():
    assert drive(SinkGroup([])) == []
