"""DeepSpeed's schedules beside its own classes, step for step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.runtime import lr_schedules

from megatron.config.scheduler import SCHEDULERS, SchedulerConfig
from megatron.engine.deepspeed_schedule import DeepSpeedSchedule

LR, STEPS = 3e-3, 60
CASES: list[tuple[str, dict[str, Any]]] = [
    ("WarmupLR", {"warmup_num_steps": 9}),
    ("WarmupLR", {"warmup_min_lr": 1e-4, "warmup_max_lr": 2e-3, "warmup_type": "linear"}),
    ("WarmupLR", {"warmup_num_steps": 1, "warmup_max_lr": 2e-3}),
    ("WarmupDecayLR", {"total_num_steps": 40, "warmup_num_steps": 10}),
    (
        "WarmupDecayLR",
        {"total_num_steps": 40, "warmup_num_steps": 7, "warmup_type": "linear"},
    ),
    ("WarmupDecayLR", {"total_num_steps": 5, "warmup_num_steps": 9, "warmup_min_lr": 1e-5}),
    ("WarmupCosineLR", {"total_num_steps": 40, "warmup_num_steps": 10, "cos_min_ratio": 0.1}),
    (
        "WarmupCosineLR",
        {
            "total_num_steps": 30,
            "warmup_num_steps": 5,
            "warmup_min_ratio": 0.2,
            "warmup_type": "linear",
        },
    ),
    ("OneCycle", {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2, "cycle_first_step_size": 8}),
    (
        "OneCycle",
        {
            "cycle_min_lr": 1e-4,
            "cycle_max_lr": 1e-2,
            "cycle_first_step_size": 8,
            "cycle_second_step_size": 13,
            "cycle_first_stair_count": 4,
            "cycle_second_stair_count": 3,
            "decay_step_size": 5,
            "decay_lr_rate": 0.5,
            "decay_mom_rate": 0.01,
            "cycle_min_mom": 0.7,
        },
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 1e-4,
            "cycle_max_lr": 1e-2,
            "cycle_first_step_size": 5,
            "cycle_momentum": False,
            "decay_lr_rate": 0.5,
        },
    ),
    ("LRRangeTest", {"lr_range_test_step_size": 7}),
    (
        "LRRangeTest",
        {
            "lr_range_test_min_lr": 1e-5,
            "lr_range_test_step_size": 7,
            "lr_range_test_step_rate": 3.0,
            "lr_range_test_staircase": True,
        },
    ),
]


@pytest.mark.option("scheduler")
@pytest.mark.parametrize(("kind", "params"), CASES)
def test_every_step_has_the_rate_that_deepspeed_sets(kind: str, params: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], lr=LR, betas=(0.9, 0.95))
    theirs = getattr(lr_schedules, kind)(optimizer, **params)
    complete = SchedulerConfig(type=kind, params=params).complete
    ours = DeepSpeedSchedule(kind=kind, params=complete, lr=LR)
    rates = set()
    for step in range(1, STEPS + 1):
        group = optimizer.param_groups[0]
        assert ours.rate(step) == pytest.approx(group["lr"], rel=1e-12, abs=1e-18), step
        betas = ours.betas(step) or (0.9, 0.95)
        assert betas == pytest.approx(group["betas"], rel=1e-12), step
        rates.add(ours.rate(step))
        theirs.step()
    assert len(rates) > 1
    assert (ours.betas(1) is not None) is (kind == "OneCycle" and complete["cycle_momentum"])


def test_every_scheduler_of_deepspeed_and_each_of_its_parameters_is_known() -> None:
    assert sorted(SCHEDULERS) == sorted(lr_schedules.VALID_LR_SCHEDULES)
    for kind, params in SCHEDULERS.items():
        code = getattr(lr_schedules, kind).__init__.__code__
        names = code.co_varnames[1 : code.co_argcount]
        assert sorted(params) == sorted(set(names) - {"optimizer", "last_batch_iteration"})
