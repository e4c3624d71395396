"""What each step trains on: decisions of the mixer turned into plans of the sampler.

The planner owns the lag.  With ``lag: 0`` step t is decided from everything up to step
t - 1.  With ``lag: 1`` it is decided from everything up to t - 2, while step t - 1 is
still to run, so that its batch can be read meanwhile.  Mixers know nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.data.plan import EndOfData, Plan
from megatron.data.sampler import Sampler
from megatron.mixing.base import Decision, Observation, Signal
from megatron.mixing.controller import Controller
from megatron.mixing.reported import Reported
from megatron.monitor.overhead import Overhead
from megatron.state import check_state

FloatArray = npt.NDArray[np.float64]

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One step's decision and the samples it drew.

    Attributes:
        plan: the ordered global samples.
        decision: what the mixer decided for the step.
        samples_seen: samples drawn from each domain since the run began, these included [K].
        valid_loss: validation losses measured for this decision, of the domains and then of
            those that are never trained on [K + M], or None.
        foreseen: signals that were measured on these samples before they train.
        measured: what was measured, by field of the observation.
    """

    plan: Plan
    decision: Decision
    samples_seen: npt.NDArray[np.int64]
    valid_loss: FloatArray | None = None
    foreseen: frozenset[Signal] = frozenset()
    measured: Mapping[str, FloatArray] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """The step this is for."""
        return self.plan.step


class Planner:
    """Decides, plans and observes, one step after the other.

    Args:
        mixer: the controller.
        sampler: draws the samples; the planner is the only one to call it.
        lag: 0 or 1.
        measure: measures the validation loss of every domain, and of those that are never
            trained on, with the model as it stands [K + M].
        overhead: is told what deciding, learning and measuring cost.
    """

    def __init__(
        self,
        *,
        mixer: Controller,
        sampler: Sampler,
        lag: int,
        measure: Callable[[], FloatArray],
        overhead: Overhead | None = None,
    ) -> None:
        """Start before step 1."""
        self._mixer = mixer
        self._sampler = sampler
        self._lag = lag
        self._measure = measure
        self._overhead = overhead or Overhead()
        self._pending: tuple[Decision, FloatArray | None] | None = None
        self._ahead: Planned | None = None
        self._before_ahead: dict[str, Any] | None = None
        self.end_of_data: EndOfData | None = None
        """Why :meth:`take` returned None."""

    def take(self, step: int) -> Planned | None:
        """Return what ``step`` trains on; None when the data has ended.

        Call it once for each step, in order.
        """
        if self._ahead is not None and self._ahead.step == step:
            planned: Planned | None = self._ahead
            self._ahead = self._before_ahead = None
            return planned
        try:
            return self._plan(step)
        except EndOfData as end:
            self.end_of_data = end
            return None

    def prepare(self, step: int) -> Planned | None:
        """With a lag, plan ``step`` now, before the step in front of it runs.

        Returns:
            The plan, to be read ahead; None without a lag or at the end of the data.
        """
        if self._lag == 0:
            return None
        self._before_ahead = self._sampler.state_dict()
        try:
            self._ahead = self._plan(step)
        except EndOfData:
            # The sampler is as it was; take() meets the end again and says so.
            self._ahead = self._before_ahead = None
        return self._ahead

    def foresee(
        self, planned: Planned, measured: Mapping[str, FloatArray], *, lr: float
    ) -> Planned:
        """Tell the mixer what was measured on a plan before it trains.

        Args:
            planned: whose decision asked for measurements.
            measured: fields of an observation.
            lr: the step's learning rate.

        Returns:
            The same samples, with the loss weights of the decision made anew.
        """
        observation = Observation(
            planned.step,
            sampling_weights=planned.plan.weights,
            learning_rate=lr,
            **measured,
        )
        with self._overhead.time("update"):
            anew = self._mixer.foresee(observation)
        asked = planned.decision.measure
        kept = replace(planned.decision, loss_weights=anew.loss_weights, measure=frozenset())
        return replace(planned, decision=kept, foreseen=asked, measured=dict(measured))

    def observe(self, observation: Observation) -> None:
        """Tell the mixer what a step showed."""
        with self._overhead.time("update"):
            self._mixer.observe(observation)

    def review(self, reported: Reported) -> str | None:
        """Tell the mixer of a report validation; return what it did about it, if anything."""
        return self._mixer.review(reported)

    def result(self) -> FloatArray | None:
        """Return the mixture for the next run [K], if the method makes one."""
        return self._mixer.result()

    def describe(self) -> dict[str, Any]:
        """Return the mixer's estimates, for the log."""
        return self._mixer.describe()

    def _plan(self, step: int) -> Planned:
        decision, valid_loss = self._pending or self._decide(step)
        # Kept until the plan stands, so that a draw which meets the end of the data does
        # not measure twice.
        self._pending = (decision, valid_loss)
        plan = self._sampler.plan(step, decision.sampling_weights, decision.fresh_quota)
        self._pending = None
        seen = self._sampler.samples_seen
        return Planned(plan=plan, decision=decision, samples_seen=seen, valid_loss=valid_loss)

    def _decide(self, step: int) -> tuple[Decision, FloatArray | None]:
        with self._overhead.time("update"):
            decision = self._mixer.decide(step=step)
        valid_loss = None
        if decision.validate:
            with self._overhead.time("validation"):
                valid_loss = self._measure()
            domains = len(self._mixer.domains)
            nothing = np.zeros(domains)
            self.observe(
                Observation(
                    step=step - 1,
                    loss_sum=nothing,
                    token_count=nothing,
                    valid_loss=valid_loss[:domains],
                    target_loss=valid_loss[domains:] if len(valid_loss) > domains else None,
                )
            )
            decision = replace(self._mixer.decide(step=step), validate=False)
        return decision, valid_loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state between two steps; a step planned ahead is kept as its decision.

        Its draw is not: the sampler's state is the one before it, and drawing again gives
        the same samples.
        """
        ahead = self._ahead
        return {
            "version": _VERSION,
            "mixer": self._mixer.state_dict(),
            "sampler": self._before_ahead if ahead else self._sampler.state_dict(),
            "ahead": _encode(ahead.decision, ahead.valid_loss) if ahead else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that :meth:`state_dict` gave.

        Raises:
            CheckpointError: the state is of another version or of other domains.
        """
        check_state("the planner", state, version=_VERSION, keys=("mixer", "sampler", "ahead"))
        self._mixer.load_state_dict(state["mixer"])
        self._sampler.load_state_dict(state["sampler"])
        self._pending = _decode(state["ahead"]) if state["ahead"] is not None else None


_ARRAYS = ("sampling_weights", "loss_weights", "controller_weights", "epochs")


def _encode(decision: Decision, valid_loss: FloatArray | None) -> dict[str, Any]:
    """Make a decision JSON-able; floats keep their bits."""
    fields = {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in asdict(decision).items()
    }
    fields["measure"] = sorted(decision.measure)
    measured = None
    if valid_loss is not None:
        measured = [None if np.isnan(value) else float(value) for value in valid_loss]
    return {"decision": fields, "valid_loss": measured}


def _decode(state: Mapping[str, Any]) -> tuple[Decision, FloatArray | None]:
    fields = dict(state["decision"])
    for name in _ARRAYS:
        if fields.get(name) is not None:
            fields[name] = np.array(fields[name], dtype=np.float64)
    fields["measure"] = frozenset(Signal(name) for name in fields.get("measure", ()))
    valid_loss = state["valid_loss"]
    return Decision(**fields), None if valid_loss is None else np.array(valid_loss, dtype=float)
