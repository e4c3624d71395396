"""What steps cost in tokens beside those they train on, from their plans alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron.mixing.base import Signal
from megatron.training.planner import Planned


@dataclass(frozen=True, kw_only=True)
class TokenCosts:
    """Prices of what a controller may ask for.

    A step's costs follow from what was decided for it, not from when it was measured, so
    that an interrupted run records the same as one that was not.

    Attributes:
        seq_length: tokens of a sample.
        validation: tokens of one validation for the controller, of all domains together.
        reference: whether a reference model runs over the batch of every step.
        foresight: tokens that run through the model to measure a signal before a step.
    """

    seq_length: int
    validation: int
    reference: bool = False
    foresight: Mapping[Signal, int] = field(default_factory=dict)

    def of(self, planned: Planned) -> dict[str, int]:
        """Return the tokens that a step costs, by kind; kinds that cost nothing are left out."""
        trained = planned.plan.domain.size * self.seq_length
        known = {
            "validation": 0 if planned.valid_loss is None else self.validation,
            "probes": 0 if planned.decision.probe is None else trained,
            "reference": trained if self.reference else 0,
            "foresight": sum(self.foresight.get(signal, 0) for signal in planned.foreseen),
        }
        return {kind: tokens for kind, tokens in known.items() if tokens}
