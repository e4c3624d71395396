"""What may be measured while a step runs, from inside the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What one optimizer step did.

    Attributes:
        skipped: the update was dropped because a gradient was not finite; still on the device
            (a scalar, 0 or 1) where it was decided there.
        grad_norm: global gradient norm before clipping, still on the device where
            DeepSpeed left it, or None if it computed none.
        statistics: what observers measured, by name.
    """

    skipped: bool | torch.Tensor
    grad_norm: float | torch.Tensor | None
    statistics: Mapping[str, float] = field(default_factory=dict)


class StepObserver(Protocol):
    """Measures steps; every rank has the same observers and calls them alike."""

    def begin(self, step: int, *, loss_scale: float) -> None:
        """Get ready for step ``step``, whose loss is multiplied by ``loss_scale``."""
        ...

    def end(self, step: int, outcome: StepOutcome) -> Mapping[str, float]:
        """Return what the step is recorded with beside its losses; collective."""
        ...
