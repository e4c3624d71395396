"""What steps cost in tokens beside those they train on, from their plans alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from megatron.mixing.base import Decision, Signal
from megatron.mixing.controller import Controller
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
        row_length: tokens of a sample by the step, where they are not always as many.
    """

    seq_length: int
    validation: int
    reference: bool = False
    foresight: Mapping[Signal, int] = field(default_factory=dict)
    row_length: Callable[[int], int] | None = None

    def of(self, planned: Planned) -> dict[str, int]:
        """Return the tokens that a step costs, by kind; kinds that cost nothing are left out."""
        rows = planned.plan.domain.size
        length = self.seq_length if self.row_length is None else self.row_length(planned.step)
        return self.price(
            planned.decision,
            trained=rows * length,
            validated=planned.valid_loss is not None,
            foreseen=planned.foreseen,
        )

    def price(
        self, decision: Decision, *, trained: int, validated: bool, foreseen: Collection[Signal]
    ) -> dict[str, int]:
        """Return the tokens that a step costs, by kind; kinds that cost nothing are left out.

        Args:
            decision: for the step.
            trained: tokens of the step itself.
            validated: whether there was a validation for the decision.
            foreseen: signals that were measured before the step.
        """
        known = {
            "validation": self.validation if validated else 0,
            "probes": 0 if decision.probe is None else trained,
            "reference": trained if self.reference else 0,
            "foresight": sum(self.foresight.get(signal, 0) for signal in foreseen),
        }
        return {kind: tokens for kind, tokens in known.items() if tokens}


def foresight_tokens(mixer: Controller, tokens: int) -> dict[Signal, int]:
    """Return what measuring a signal before a step runs through the model.

    Args:
        mixer: asks for it.
        tokens: of a global batch.

    Returns:
        Tokens by signal.  A gradient takes a batch forward and backward; with all other
        domains' as its aim it is taken twice, with held-out data there are as many tokens
        of that.
    """
    costs = {Signal.BATCH_VALID_LOSS: tokens, Signal.GRADIENT_ALIGNMENT: 2 * tokens}
    # One pass over the batch answers both.
    losses = Signal.EXCESS_LOSS if Signal.EXCESS_LOSS in mixer.needs else Signal.LOSS
    return {**costs, losses: tokens}
