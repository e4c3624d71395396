"""What may be measured while a step runs, from inside the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class StepObserver(Protocol):
    """Measures steps; every rank has the same observers and calls them alike."""

    def begin(self, step: int, *, loss_scale: float) -> None:
        """Get ready for step ``step``, whose loss is multiplied by ``loss_scale``."""
        ...

    def end(
        self,
        step: int,
        *,
        grad_norm: float | torch.Tensor | None,
        skipped: bool | torch.Tensor,
    ) -> Mapping[str, float]:
        """Return what the step is recorded with beside its losses; collective."""
        ...
