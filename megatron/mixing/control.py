"""What stands around a controller and looks like one; by itself it changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.mixing.controller import Controller
from megatron.mixing.decision import Decision
from megatron.mixing.gradient_aim import GradientAim
from megatron.mixing.observation import FloatArray, Observation, Signal
from megatron.mixing.reported import Reported


class Control:
    """A controller that hands everything on; a control overrides what it is there for.

    Every method and property: see :class:`~megatron.mixing.controller.Controller`.

    Args:
        inner: decides.
    """

    def __init__(self, inner: Controller) -> None:
        self._inner = inner

    @property
    def method(self) -> str:
        """Name of the method."""
        return self._inner.method

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the K domains, in the order of every vector."""
        return self._inner.domains

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals that are read."""
        return self._inner.needs

    @property
    def step(self) -> int:
        """The last step that a counted observation followed."""
        return self._inner.step

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """Which domains are one to the method, [K]."""
        return self._inner.slots

    @property
    def gradient_aim(self) -> GradientAim | None:
        """What the gradients of the domains are compared with; None if they are not read."""
        return self._inner.gradient_aim

    def decide(self, step: int) -> Decision:
        """Return the decision for a step; pure."""
        return self._inner.decide(step)

    def foresee(self, observation: Observation) -> Decision:
        """Learn of a planned step before it trains; return its decision anew."""
        return self._inner.foresee(observation)

    def observe(self, observation: Observation) -> None:
        """Learn from a step."""
        self._inner.observe(observation)

    def review(self, reported: Reported) -> str | None:
        """Take a report validation; return what was done about it, None for nothing."""
        return self._inner.review(reported)

    def result(self) -> FloatArray | None:
        """Return the mixture to carry to the next run, [K]; None if the method makes none."""
        return self._inner.result()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later decisions depend on."""
        return self._inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state."""
        self._inner.load_state_dict(state)

    def migrate(self, state: Mapping[str, Any], parents: Mapping[str, str]) -> dict[str, Any]:
        """Return a state of other domains as one that can be taken up; changes nothing."""
        return self._inner.migrate(state, parents)

    def describe(self) -> dict[str, Any]:
        """Return what a log shows."""
        return self._inner.describe()

    def _named(self, values: FloatArray) -> dict[str, float]:
        """Key a vector [K] by domain."""
        return dict(zip(self.domains, values.tolist(), strict=True))
