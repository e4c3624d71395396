"""What a training loop calls: a mixing method, or a method with controls around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron.mixing.decision import Decision
from megatron.mixing.gradient_aim import GradientAim
from megatron.mixing.observation import FloatArray, Observation, Signal
from megatron.mixing.reported import Reported


class Controller(Protocol):
    """See :class:`megatron.mixing.base.Mixer`, the plain one."""

    @property
    def method(self) -> str:
        """Name of the method."""
        ...

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the K domains, in the order of every vector."""
        ...

    @property
    def needs(self) -> frozenset[Signal]:
        """Signals that are read."""
        ...

    @property
    def step(self) -> int:
        """The last step that a counted observation followed."""
        ...

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """Which domains are one to the method, [K]: equal numbers (from 0) go together."""
        ...

    @property
    def gradient_aim(self) -> GradientAim | None:
        """What the gradients of the domains are compared with; None if they are not read."""
        ...

    def decide(self, step: int) -> Decision:
        """Return the decision for a step; pure."""
        ...

    def foresee(self, observation: Observation) -> Decision:
        """Learn of a planned step before it trains; return its decision anew."""
        ...

    def observe(self, observation: Observation) -> None:
        """Learn from a step."""
        ...

    def review(self, reported: Reported) -> str | None:
        """Take a report validation; return what was done about it, None for nothing."""
        ...

    def result(self) -> FloatArray | None:
        """Return the mixture to carry to the next run, [K]; None if the method makes none."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later decisions depend on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state."""
        ...

    def migrate(self, state: Mapping[str, Any], parents: Mapping[str, str]) -> dict[str, Any]:
        """Return a state of other domains as one that can be taken up; changes nothing."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what a log shows."""
        ...
