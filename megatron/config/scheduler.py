"""DeepSpeed's block ``scheduler``, which decides the learning rate in GPT-NeoX's place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megatron.config.base import Group, invalid

REQUIRED = object()
"""Stands for a parameter that has no default."""

_WARMUP: dict[str, Any] = {
    "warmup_min_lr": 0.0,
    "warmup_max_lr": 0.001,
    "warmup_num_steps": 1000,
    "warmup_type": "log",
}
SCHEDULERS: dict[str, Mapping[str, Any]] = {
    "WarmupLR": {**_WARMUP, "warmup_max_lr": None},
    "WarmupDecayLR": {**_WARMUP, "total_num_steps": REQUIRED},
    "WarmupCosineLR": {
        "total_num_steps": REQUIRED,
        "warmup_min_ratio": 0.0,
        "warmup_num_steps": 1000,
        "cos_min_ratio": 0.0001,
        "warmup_type": "log",
    },
    "OneCycle": {
        "cycle_min_lr": REQUIRED,
        "cycle_max_lr": REQUIRED,
        "decay_lr_rate": 0.0,
        "cycle_first_step_size": 2000,
        "cycle_second_step_size": None,
        "cycle_first_stair_count": 0,
        "cycle_second_stair_count": None,
        "decay_step_size": 0,
        "cycle_momentum": True,
        "cycle_min_mom": 0.8,
        "cycle_max_mom": 0.9,
        "decay_mom_rate": 0.0,
    },
    "LRRangeTest": {
        "lr_range_test_min_lr": 0.001,
        "lr_range_test_step_size": 2000,
        "lr_range_test_step_rate": 1.0,
        "lr_range_test_staircase": False,
    },
}
"""The kinds of schedulers of DeepSpeed 0.19, and what each has where it is not given."""

_COUNTS = ("warmup_num_steps", "total_num_steps", "lr_range_test_step_size")
_POSITIVE = (*_COUNTS, "cycle_first_step_size")
_FLAGS = ("cycle_momentum", "lr_range_test_staircase")
_Kind = Literal["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"]


class SchedulerConfig(Group):
    """A schedule of DeepSpeed's; it decides alone, whatever `lr_decay_style` and the like say."""

    type: _Kind
    """`WarmupLR`, `WarmupDecayLR`, `WarmupCosineLR`, `OneCycle` or `LRRangeTest`."""
    params: dict[str, float | int | bool | str | None] = Field(default_factory=dict)
    """Its parameters under DeepSpeed's names; those not given have DeepSpeed's defaults."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        known = SCHEDULERS[self.type]
        for name, value in self.params.items():
            if name not in known:
                raise invalid("params", f"{self.type} has no {name}; it has {', '.join(known)}")
            if (problem := _problem(name, value, known[name])) is not None:
                raise invalid("params", f"{name} should be {problem}")
        for name, default in known.items():
            if default is REQUIRED and self.params.get(name) is None:
                raise invalid("params", f"{self.type} needs {name}")
        return self

    @property
    def complete(self) -> dict[str, Any]:
        """All parameters, those with defaults among them."""
        given = {name: value for name, value in self.params.items() if value is not None}
        return {**SCHEDULERS[self.type], **given}


def _problem(name: str, value: object, default: object) -> str | None:
    """Say what a parameter should be; None if it is that."""
    if value is None:
        return "a value" if default is REQUIRED else None
    if name == "warmup_type":
        return None if value in ("log", "linear") else "log or linear"
    if name in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "a number, the same for all parameters of the model"
    if name in _COUNTS and value != int(value):
        return "a whole number"
    if name in _POSITIVE and value <= 0:
        return "above 0"
    return None if value >= 0 else "at least 0"
