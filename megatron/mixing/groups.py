"""Groups around a method: it sees and steers groups of domains, the loop sees domains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatron.errors import CheckpointError
from megatron.mixing.control import Control
from megatron.mixing.controller import Controller
from megatron.mixing.decision import Decision
from megatron.mixing.gradient_aim import GradientAim
from megatron.mixing.grouping import Grouping, Levels
from megatron.mixing.migrate import unguarded
from megatron.mixing.observation import FloatArray, Observation, ObservationError
from megatron.mixing.reported import Reported
from megatron.mixing.simplex import saturate
from megatron.state import check_state

_SUMS: Final = (
    "token_count",
    "loss_square_sum",
    "sample_count",
    "samples_seen",
    "sampling_weights",
)
_TOKEN_MEANS: Final = ("batch_valid_loss", "excess_loss", "reference_loss")
_KEYS: Final = ("method", "domains", "groups", "controller")


class Groups(Control):
    """A controller of groups as a controller of domains.

    What is observed is added up, or averaged, over the domains of a group before the method
    sees it; what it decides is spread over them by fixed shares.

    Args:
        inner: acts on the groups.
        levels: the groups, and the bounds of both levels.
        inside: each domain's part of its group's held-out loss, summing to 1 in every
            group, [K].
    """

    def __init__(self, inner: Controller, levels: Levels, inside: FloatArray) -> None:
        super().__init__(inner)
        self._levels = levels
        self._inside = inside
        self._grouping: Grouping = levels.grouping

    @property
    def domains(self) -> tuple[str, ...]:
        """See :class:`~megatron.mixing.controller.Controller`."""
        return self._grouping.domains

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """See :class:`~megatron.mixing.controller.Controller`; the domains of a group are one."""
        return self._inner.slots[self._grouping.slots]

    @property
    def gradient_aim(self) -> GradientAim | None:
        """See :class:`~megatron.mixing.controller.Controller`; groups' weights by domain."""
        aim, groups = self._inner.gradient_aim, len(self._inner.domains)
        if aim is None:
            return None
        spread = self._grouping.repeat(aim.weights[:groups]) * self._inside
        return replace(aim, weights=np.append(spread, aim.weights[groups:]))

    def decide(self, step: int) -> Decision:
        """See :class:`~megatron.mixing.controller.Controller`."""
        return self._spread(self._inner.decide(step))

    def foresee(self, observation: Observation) -> Decision:
        """See :class:`~megatron.mixing.controller.Controller`."""
        return self._spread(self._inner.foresee(self._gathered(observation)))

    def observe(self, observation: Observation) -> None:
        """See :class:`~megatron.mixing.controller.Controller`."""
        self._inner.observe(self._gathered(observation))

    def review(self, reported: Reported) -> str | None:
        """See :class:`~megatron.mixing.controller.Controller`."""
        count = len(self.domains)
        loss = self._grouping.mean(reported.loss[:count], self._inside)
        groups, targets = len(self._grouping.groups), len(reported.loss) - count
        places = np.append(self._grouping.slots, groups + np.arange(targets))
        return self._inner.review(
            replace(
                reported,
                loss=np.append(loss, reported.loss[count:]),
                window_domain=places[reported.window_domain],
            )
        )

    def result(self) -> FloatArray | None:
        """See :class:`~megatron.mixing.controller.Controller`."""
        found = self._inner.result()
        return None if found is None else self._levels.spread(found)

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state, which is by group, and the groups that it is of."""
        return {
            "version": 1,
            "method": self.method,
            "domains": list(self.domains),
            "groups": self._grouping.names(),
            "controller": self._inner.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state.

        Raises:
            CheckpointError: it is damaged, or of other groups.
        """
        state = _checked(state)
        try:
            found = {name: sorted(members) for name, members in state["groups"].items()}
        except (AttributeError, TypeError) as error:
            raise CheckpointError("the state of the mixing groups is damaged") from error
        own = {name: sorted(members) for name, members in self._grouping.names().items()}
        if found != own:
            raise CheckpointError(
                f"the checkpoint mixes the groups {found} and the configuration {own}; give the "
                f"run the same groups"
            )
        self._inner.load_state_dict(state["controller"])

    def migrate(self, state: Mapping[str, Any], parents: Mapping[str, str]) -> dict[str, Any]:
        """See :class:`~megatron.mixing.controller.Controller`.

        The method's state follows the groups: a domain that joins or leaves a group changes
        its shares and nothing that the method knows.
        """
        state = _checked(state)
        earlier = {name: group for group, names in state["groups"].items() for name in names}
        origins = {}
        for group, names in self._grouping.names().items():
            of = [earlier[parents[name]] for name in names if parents.get(name) in earlier]
            if group not in state["groups"] and of:
                origins[group] = of[0]
        return {
            **state,
            "domains": list(self.domains),
            "groups": self._grouping.names(),
            "controller": self._inner.migrate(state["controller"], origins),
        }

    def describe(self) -> dict[str, Any]:
        """Return the domains' weights, the groups' under ``groups``, and the estimates by group."""
        shown = dict(self._inner.describe())
        decision = self.decide(self.step + 1)
        groups = {"weights": shown["weights"]}
        shown["weights"] = self._named(decision.sampling_weights)
        if decision.controller_weights is not None:
            groups["controller_weights"] = shown["controller_weights"]
            shown["controller_weights"] = self._named(decision.controller_weights)
        return shown | {"groups": groups}

    def _spread(self, decision: Decision) -> Decision:
        """Return a decision over groups as one over domains."""
        wanted, losses = decision.controller_weights, decision.loss_weights
        return replace(
            decision,
            sampling_weights=self._levels.spread(decision.sampling_weights),
            loss_weights=None if losses is None else self._grouping.repeat(losses),
            controller_weights=None if wanted is None else self._levels.spread(wanted),
        )

    def _gathered(self, observation: Observation) -> Observation:
        """Return an observation of domains as one of groups.

        Counts, sums and probabilities are added; held-out losses are averaged by fixed parts
        (the shares, or what the objective says), so that they do not move with the draw, and
        what is measured on the batch by tokens, or samples where only those are known.
        A gradient signal is measured per group (see ``slots``).
        """
        if not isinstance(observation, Observation):
            raise ObservationError(f"observe takes an Observation, not {observation!r}")
        length, grouping = observation.length, self._grouping
        if length is not None and length != len(self.domains):
            raise ObservationError(
                f"observation of step {observation.step} has {length} values per vector and the "
                f"mixer {len(self.domains)} domains ({', '.join(self.domains)})"
            )
        changes: dict[str, Any] = {}
        for name in _SUMS:
            if (vector := observation.vector(name)) is not None:
                changes[name] = saturate(grouping.total(vector))
        tokens, losses = observation.vector("token_count"), observation.vector("loss_sum")
        if tokens is not None and losses is not None:
            changes["loss_sum"] = self._loss_sum(losses, tokens)
        samples = observation.vector("sample_count")  # what is told of a step before it trains
        by_samples = grouping.shares if samples is None else samples
        by_tokens = by_samples if tokens is None else tokens
        for name in _TOKEN_MEANS:
            if (vector := observation.vector(name)) is not None:
                changes[name] = grouping.mean(vector, by_tokens)
        if (vector := observation.vector("valid_loss")) is not None:
            changes["valid_loss"] = grouping.mean(vector, self._inside)
        if (vector := observation.vector("gradient_alignment")) is not None:
            first = [members[0] for members in grouping.members]
            changes["gradient_alignment"] = vector[first]
        return replace(observation, **changes)

    def _loss_sum(self, losses: FloatArray, tokens: FloatArray) -> FloatArray:
        """Add up the losses of each group, [G]; what is not finite stays so, even if absent."""
        counted = np.where((tokens > 0) | ~np.isfinite(losses), losses, 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            total = self._grouping.total(counted)
        broken = self._grouping.total((~np.isfinite(losses)).astype(np.float64)) > 0
        return np.where(broken, np.nan, saturate(total))


def _checked(state: Mapping[str, Any]) -> Mapping[str, Any]:
    state = unguarded(state)
    if "groups" not in state:
        raise CheckpointError(
            "the checkpoint's mixing method acted on domains and the configuration's acts on "
            "groups; leave groups out, or start a new run"
        )
    check_state("the groups of the mixing method", state, version=1, keys=_KEYS)
    return state
