"""The training loop, whole.

decide → plan → load → engine step → reduce the ledger → observe → record →
maybe validate → maybe save.  Nothing here knows the name of a mixing method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron.data.batch import MicroBatch
from megatron.engine.engine import TrainEngine
from megatron.engine.observer import StepOutcome
from megatron.engine.transfer import all_to_device
from megatron.mixing.base import Observation
from megatron.monitor.overhead import Overhead
from megatron.signals.ledger import Ledger, StepTotals
from megatron.training.guard import RunGuard
from megatron.training.planner import Planned, Planner
from megatron.training.stall import MEASURING, PLANNING, RECORDING, REDUCING, Heartbeat


class Ending(Enum):
    """Why the loop ended."""

    COMPLETE = "all steps are done"
    EXHAUSTED = "the data has ended"
    STOPPED = "a signal asked to stop"
    INTERVAL = "exit_interval was reached"


class Recorder(Protocol):
    """Takes note of what happened; does nothing on ranks other than the first."""

    def step(
        self,
        planned: Planned,
        totals: StepTotals,
        outcome: StepOutcome,
        *,
        lr: float,
        skipped: bool,
    ) -> None:
        """Record one step."""
        ...


class Reader(Protocol):
    """Reads plans; see :class:`megatron.training.reading.PlanReader`."""

    def read(self, planned: Planned) -> Iterator[MicroBatch]:
        """Return this rank's micro-batches of a plan."""
        ...

    def read_ahead(self, planned: Planned) -> None:
        """Start reading a plan that :meth:`read` will be asked for next."""
        ...


class Foresight(Protocol):
    """Measures what a decision wants to know of its own batch before that trains."""

    def measure(self, planned: Planned) -> Mapping[str, npt.NDArray[np.float64]]:
        """Return the fields of an observation that ``planned.decision.measure`` asks for."""
        ...


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The parts of a run, ready to go.

    Attributes:
        engine: runs the steps.
        planner: decides what each trains on.
        reader: reads it.
        foresight: measures what methods ask for before a step.
        ledger: the training losses by domain.
        guard: policies for steps that are not finite, or whose loss has spiked.
        recorder: log of the run.
        learning_rate: rate of a step, by its number.
        stop_requested: whether this rank was asked to stop.
        exits_at: whether the run ends after a step by ``exit_interval``.
        after_step: validates and saves where that is due; gets the step and whether it is
            the last one of this process.
        device: where the model is.
        heartbeat: is told where the loop is.
        overhead: is told what measuring before a step costs.
    """

    engine: TrainEngine
    planner: Planner
    reader: Reader
    foresight: Foresight
    ledger: Ledger
    guard: RunGuard
    recorder: Recorder
    learning_rate: Callable[[int], float]
    stop_requested: Callable[[], bool]
    exits_at: Callable[[int], bool]
    after_step: Callable[[int, Ending | None], None]
    device: torch.device
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    overhead: Overhead = field(default_factory=Overhead)

    def run(self, *, start: int, last: int) -> tuple[int, Ending]:
        """Train from the step after ``start`` up to ``last``.

        Returns:
            The last step done, and why it was the last.

        Raises:
            NonFiniteError: a step was not finite and the policy is to stop.
            SpikeError: the loss has spiked, likewise.
        """
        for step in range(start + 1, last + 1):
            self.heartbeat.at(PLANNING, step)
            planned = self.planner.take(step)
            if planned is None:
                if step - 1 > start:
                    self.after_step(step - 1, Ending.EXHAUSTED)
                return step - 1, Ending.EXHAUSTED
            if planned.decision.measure:
                planned = self._foresee(planned)
            batches = self.reader.read(planned)
            ahead = self.planner.prepare(step + 1)
            # What waits for a measurement is not known whole: its loss weights may change.
            if ahead is not None and step < last and not ahead.decision.measure:
                self.reader.read_ahead(ahead)
            stop = self._step(planned, batches)
            ending = self._ending(step, last, stop=stop)
            self.after_step(step, ending)
            if ending is not None:
                return step, ending
        return start, Ending.COMPLETE

    def _foresee(self, planned: Planned) -> Planned:
        """Measure what the decision asks for on its own batch, and let it be made anew."""
        self.heartbeat.at(MEASURING, planned.step)
        with self.overhead.time("foresight"):  # it ends with a copy to the host
            measured = self.foresight.measure(planned)
        return self.planner.foresee(planned, measured, lr=self.learning_rate(planned.step))

    def _step(self, planned: Planned, batches: Iterator[MicroBatch]) -> bool:
        """Do one step; return whether some rank was asked to stop."""
        lr = self.learning_rate(planned.step)
        batches = self.heartbeat.reading(batches, planned.step)
        outcome = self.engine.train_step(planned.step, all_to_device(batches, self.device), lr=lr)
        self.heartbeat.at(REDUCING, planned.step)
        totals = self.ledger.reduce(skipped=outcome.skipped, stop=self.stop_requested())
        self.engine.settle(skipped=totals.skipped)
        self.heartbeat.at(RECORDING, planned.step)
        skipped = self.guard.check(planned.plan, totals)
        if not skipped:
            self.planner.observe(_observation(planned, totals, lr))
        self.recorder.step(planned, totals, outcome, lr=lr, skipped=skipped)
        return totals.stop

    def _ending(self, step: int, last: int, *, stop: bool) -> Ending | None:
        if step == last:
            return Ending.COMPLETE
        if stop:
            return Ending.STOPPED
        return Ending.INTERVAL if self.exits_at(step) else None


def _observation(planned: Planned, totals: StepTotals, lr: float) -> Observation:
    compared = {
        name: totals.mean(total)
        for name, total in (
            ("excess_loss", totals.excess_sum),
            ("reference_loss", totals.reference_sum),
        )
        if total is not None
    }
    return Observation(
        step=planned.step,
        loss_sum=totals.loss_sum,
        token_count=totals.token_count,
        loss_square_sum=totals.square_sum,
        sample_count=totals.sample_count,
        samples_seen=planned.samples_seen,
        sampling_weights=planned.plan.weights,
        learning_rate=lr,
        **compared,
    )
