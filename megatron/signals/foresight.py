"""What a method may ask to know of a step's own batch before the step trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron.data.batch import MicroBatch
from megatron.data.plan import Plan
from megatron.engine.transfer import all_to_device
from megatron.errors import ConfigError
from megatron.mixing.decision import Decision
from megatron.mixing.observation import Signal
from megatron.signals.ledger import Ledger
from megatron.signals.validation import Evaluator, LossObserver

FloatArray = npt.NDArray[np.float64]

_KNOWN: Final = frozenset({Signal.LEARNING_RATE})
"""Signals of a planned step that need no measurement."""


class PlannedStep(Protocol):
    """A step that has its samples and has not trained."""

    @property
    def plan(self) -> Plan:
        """The samples."""
        ...

    @property
    def decision(self) -> Decision:
        """What the method decided, and asks for."""
        ...

    @property
    def samples_seen(self) -> npt.NDArray[np.int64]:
        """Samples drawn from each domain since the run began, the step's own included, [K]."""
        ...


class Measurer(Protocol):
    """Measures one or several signals on a planned step; collective."""

    def measure(self, planned: Any) -> Mapping[str, FloatArray]:
        """Return fields of an observation."""
        ...


class Foresight:
    """Answers the ``measure`` of decisions.

    Args:
        measurers: who measures a signal; one may be in charge of several.
    """

    def __init__(self, measurers: Mapping[Signal, Measurer]) -> None:
        """Keep the measurers."""
        self._measurers = dict(measurers)

    def measure(self, planned: PlannedStep) -> dict[str, npt.NDArray[Any]]:
        """Return the fields of an observation that the step's decision asks for.

        The samples of each domain in the step (``sample_count``) come with whatever is
        asked for.  Collective: every rank calls it at the same step.

        Raises:
            ConfigError: nobody measures a signal ahead of a step here.
        """
        fields: dict[str, npt.NDArray[Any]] = {"sample_count": planned.plan.counts()}
        asked: list[Measurer] = []
        for signal in sorted(planned.decision.measure - _KNOWN):
            if signal not in self._measurers:
                raise ConfigError(
                    f"the mixing method asks for the signal '{signal}' before a step trains, "
                    f"which this run does not measure"
                )
            if self._measurers[signal] not in asked:
                asked.append(self._measurers[signal])
        for measurer in asked:
            fields |= measurer.measure(planned)
        return fields


class BatchLosses:
    """Measures the losses of a step's own batch, and those of the reference on it.

    One more forward pass over the whole global batch, without dropout.

    Args:
        evaluator: runs the model without gradients.
        observer: where the model's loss function reports; lent out meanwhile.
        ledger: a ledger of its own, of K domains, with the reference's columns if the
            micro-batches carry its losses.
        read: returns this rank's micro-batches of a planned step.
        accumulation: micro-batches per step.
        device: the model's device.
    """

    def __init__(
        self,
        *,
        evaluator: Evaluator,
        observer: LossObserver,
        ledger: Ledger,
        read: Callable[[Any], Iterable[MicroBatch]],
        accumulation: int,
        device: torch.device,
    ) -> None:
        """Keep the parts."""
        self._evaluator, self._observer, self._ledger = evaluator, observer, ledger
        self._read, self._accumulation, self._device = read, accumulation, device

    def measure(self, planned: Any) -> dict[str, FloatArray]:
        """Return sums and counts [K], and with a reference the excess and its loss [K]."""
        self._ledger.reset()
        batches = all_to_device(self._read(planned), self._device)
        with self._observer.lent_to(self._ledger):
            self._evaluator.evaluate(batches, self._accumulation)
        totals = self._ledger.reduce()
        fields = {
            "loss_sum": totals.loss_sum,
            "token_count": totals.token_count,
            "loss_square_sum": totals.square_sum,
            "sample_count": totals.sample_count,
        }
        if totals.excess_sum is not None and totals.reference_sum is not None:
            fields["excess_loss"] = totals.mean(totals.excess_sum)
            fields["reference_loss"] = totals.mean(totals.reference_sum)
        return fields
