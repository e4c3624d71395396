"""DeepSpeed's schedules as pure functions of the step.

DeepSpeed moves its schedulers on after a step, so that step n has the rate of the state that
n - 1 calls have left; a scheduler that has not been called counts -1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_SECOND_BETA = 0.99  # OneCycle sets it, too


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSchedule:
    """The rate, and under OneCycle the momentum, of each step.

    Attributes:
        kind: DeepSpeed's name of the scheduler.
        params: all of its parameters by name.
        lr: the optimizer's learning rate, which some schedules start from or scale.
    """

    kind: str
    params: Mapping[str, Any]
    lr: float

    def rate(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step``, counted from 1."""
        last = step - 2
        if self.kind == "OneCycle":
            return self._cycle_rate(last)
        if self.kind == "LRRangeTest":
            return self._range_rate(last)
        if self.kind == "WarmupCosineLR":
            return self._cosine_rate(last)
        return self._warmup_rate(last)

    def betas(self, step: int) -> tuple[float, float] | None:
        """Return Adam's decay rates of a step where the schedule sets them, else None."""
        p = self.params
        if self.kind != "OneCycle" or not p["cycle_momentum"]:
            return None
        low, high, last = p["cycle_min_mom"], p["cycle_max_mom"], step - 2
        if last < 0:
            return low, _SECOND_BETA
        if last < self._cycle:
            return high - (high - low) * self._scale(last), _SECOND_BETA
        return high * (1.0 + self._decayed(last, p["decay_mom_rate"])), _SECOND_BETA

    def _gamma(self, last: int) -> float | None:
        """Return how far the warm-up has come, from 0 to 1; None after it."""
        steps = max(2, int(self.params["warmup_num_steps"]))
        if last >= steps:
            return None
        if self.params["warmup_type"] == "log":
            return (1.0 / math.log(steps)) * math.log(last + 1)
        return last / steps

    def _warmup_rate(self, last: int) -> float:
        """Follow WarmupLR and WarmupDecayLR."""
        p = self.params
        low, high = p["warmup_min_lr"], p["warmup_max_lr"]
        high = self.lr if high is None else high
        if last < 0:
            return float(low)
        gamma = self._gamma(last)
        if gamma is None:
            gamma = 1.0
            if self.kind == "WarmupDecayLR":
                total, steps = p["total_num_steps"], max(2, int(p["warmup_num_steps"]))
                gamma = max(0.0, float(total - last) / float(max(1.0, total - steps)))
        return float(low + (high - low) * gamma)

    def _cosine_rate(self, last: int) -> float:
        """Follow WarmupCosineLR, which scales the optimizer's rate."""
        p = self.params
        if last < 0:
            return 0.0
        if (gamma := self._gamma(last)) is not None:
            return self.lr * float(p["warmup_min_ratio"] + gamma * (1.0 - p["warmup_min_ratio"]))
        steps = max(2, int(p["warmup_num_steps"]))
        x = min(1.0, (last - steps + 1) / max(1, p["total_num_steps"] - steps))
        floor = p["cos_min_ratio"]
        return self.lr * float(max(0.0, floor + (1.0 - floor) * (1 + math.cos(math.pi * x)) / 2))

    def _range_rate(self, last: int) -> float:
        """Follow LRRangeTest, which only grows."""
        p = self.params
        if last < 0:
            return float(p["lr_range_test_min_lr"])
        grown = (last + 1) / p["lr_range_test_step_size"]
        grown = math.floor(grown) if p["lr_range_test_staircase"] else grown
        return float(p["lr_range_test_min_lr"] * (1 + p["lr_range_test_step_rate"] * grown))

    @property
    def _halves(self) -> tuple[float, float]:
        first, second = self.params["cycle_first_step_size"], self.params["cycle_second_step_size"]
        return float(first), float(first if second is None else second)

    @property
    def _cycle(self) -> float:
        return sum(self._halves)

    def _cycle_rate(self, last: int) -> float:
        """Follow OneCycle: up, down, and a decay."""
        low, high = self.params["cycle_min_lr"], self.params["cycle_max_lr"]
        if last < 0:
            return float(low)
        if last < self._cycle:
            return float(low + (high - low) * self._scale(last))
        return float(low / (1.0 + self._decayed(last, self.params["decay_lr_rate"])))

    def _scale(self, last: int) -> float:
        """Return how high a step stands in its cycle, from 0 to 1."""
        first, second = self._halves
        place = (last + 1) % self._cycle
        rising = place <= first
        height = place / first if rising else (self._cycle - place) / second
        stairs = self.params["cycle_first_stair_count"]
        if not rising and self.params["cycle_second_stair_count"] is not None:
            stairs = self.params["cycle_second_stair_count"]
        return math.floor(height * stairs) / stairs if stairs > 0 else height

    def _decayed(self, last: int, rate: float) -> float:
        """Return rate × steps after the cycle, in units of ``decay_step_size``; 0 without one."""
        unit = self.params["decay_step_size"]
        if math.isclose(unit, 0) or math.isclose(rate, 0):
            return 0.0
        return float(rate * (last - self._cycle + 1) / unit)
