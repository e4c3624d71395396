"""The outermost control: forecasts passes over each domain, and keeps them below a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np

from megatron.errors import CheckpointError, ConfigError
from megatron.mixing.control import Control
from megatron.mixing.controller import Controller
from megatron.mixing.decision import Decision, RunContext
from megatron.mixing.epoch_limit import EpochLimit
from megatron.mixing.group_epoch_limit import GroupEpochLimit
from megatron.mixing.grouping import Levels
from megatron.mixing.observation import FloatArray, Observation
from megatron.mixing.options import CommonOptions, bounds
from megatron.mixing.simplex import normalise

_KEY: Final = "epochs"
_WEIGHED: Final = "weighed"


def with_epochs(
    controller: Controller,
    options: CommonOptions,
    context: RunContext,
    *,
    levels: Levels | None = None,
) -> Controller:
    """Put forecasts of passes, and the limit that the options set, around a controller.

    Where neither a limit is set nor the sizes of the domains are known, there is nothing to do.

    Args:
        controller: decides.
        options: of the method.
        context: what is known of the run.
        levels: the groups that the domains are in, if any.

    Raises:
        ConfigError: a limit that cannot be kept, or that lacks the sizes.
    """
    if options.max_epochs is None and context.samples_per_epoch is None:
        return controller
    limit: EpochLimit
    try:
        if levels is not None:
            limit = GroupEpochLimit(options.max_epochs, levels=levels, context=context)
        else:
            names = controller.domains
            _, ceiling = bounds(options, names, controller.method)
            limit = EpochLimit(options.max_epochs, domains=names, ceiling=ceiling, context=context)
    except ConfigError as error:
        if str(error).startswith("mixing method"):
            raise
        raise ConfigError(f"mixing method '{controller.method}': {error}") from error
    return Epochs(controller, limit)


class Epochs(Control):
    """A controller whose decisions tell the passes to come, and keep to a limit on them.

    It stands around everything else, so that whatever draws (a method, its probes, a shadow,
    a fallback, a group's members) keeps to the limit.  What is observed says what really
    drew.

    Args:
        inner: decides.
        limit: counts, forecasts and limits.
    """

    def __init__(self, inner: Controller, limit: EpochLimit) -> None:
        super().__init__(inner)
        self._limit = limit
        self._weighed = 0
        """The step whose loss weights were made of its own batch, as it was drawn."""

    def decide(self, step: int) -> Decision:
        """See :class:`~megatron.mixing.controller.Controller`."""
        return self._within(self._inner.decide(step), step)

    def foresee(self, observation: Observation) -> Decision:
        """See :class:`~megatron.mixing.controller.Controller`."""
        if not isinstance(observation, Observation):
            return self._inner.foresee(observation)
        step = observation.step
        before = self._inner.decide(step)
        if observation.vector("sampling_weights") is None:
            drawn_by = self._within(before, step).sampling_weights
            observation = replace(observation, sampling_weights=drawn_by)
        anew = self._inner.foresee(observation)
        if not _same(before.loss_weights, anew.loss_weights):
            self._weighed = step
        return self._within(anew, step)

    def observe(self, observation: Observation) -> None:
        """See :class:`~megatron.mixing.controller.Controller`."""
        if not isinstance(observation, Observation) or observation.only_validation:
            self._inner.observe(observation)
            return
        before, drawn_by = self._inner.step, observation.vector("sampling_weights")
        if drawn_by is None and observation.step > before:
            drawn_by = self.decide(observation.step).sampling_weights
            observation = replace(observation, sampling_weights=drawn_by)
        self._inner.observe(observation)
        if drawn_by is not None and self._inner.step > before:  # it counted
            self._limit.observe(observation, drawn_by)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner controller's state with the counts beside it."""
        counts = self._limit.state_dict()
        if self._weighed > self._inner.step:
            counts[_WEIGHED] = self._weighed
        return {**self._inner.state_dict(), _KEY: counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; one without counts starts them anew.

        Raises:
            CheckpointError: it is damaged, or does not fit the controller.
        """
        if not isinstance(state, Mapping):
            raise CheckpointError(f"the state of the mixing method is damaged: {state!r}")
        self._inner.load_state_dict({k: value for k, value in state.items() if k != _KEY})
        self._weighed = 0
        if _KEY in state:
            self._limit.load_state_dict(_counts(state))
            weighed = state[_KEY].get(_WEIGHED, 0)
            if not isinstance(weighed, int):
                raise CheckpointError(f"the count of drawn samples is damaged: {state[_KEY]!r}")
            self._weighed = weighed

    def migrate(self, state: Mapping[str, Any], parents: Mapping[str, str]) -> dict[str, Any]:
        """See :class:`~megatron.mixing.controller.Controller`; counts are kept by name."""
        moved = self._inner.migrate({k: v for k, v in state.items() if k != _KEY}, parents)
        return {**moved, _KEY: _counts(state)} if _KEY in state else moved

    def describe(self) -> dict[str, Any]:
        """Return what the inner controller shows, with what draws and the passes forecast."""
        shown = dict(self._inner.describe())
        decision = self.decide(self.step + 1)
        shown["weights"] = self._named(decision.sampling_weights)
        if decision.epochs is not None:
            shown["epochs_forecast"] = self._named(decision.epochs)
        return shown

    def _within(self, decision: Decision, step: int) -> Decision:
        weights = self._limit.apply(decision.sampling_weights)
        within = replace(decision, sampling_weights=weights, epochs=self._limit.forecast(weights))
        if step == self._weighed:
            return within
        return replace(within, loss_weights=_kept_in_the_loss(decision, within))


def _counts(state: Mapping[str, Any]) -> Any:
    """Return what the limit wrote into a state."""
    given = state[_KEY]
    if not isinstance(given, Mapping):
        return given
    return {key: value for key, value in given.items() if key != _WEIGHED}


def _same(one: FloatArray | None, other: FloatArray | None) -> bool:
    """Whether two decisions weigh the losses alike."""
    return np.array_equal(one, other) if one is not None and other is not None else one is other


def _kept_in_the_loss(asked: Decision, within: Decision) -> FloatArray | None:
    """Return loss weights with which a domain counts what it was meant to, drawn as it is, [K].

    What is known of a step's own batch (``foresee``) needs no such thing: it says what drew.
    """
    weights, drawn = asked.loss_weights, within.sampling_weights
    if weights is None or np.array_equal(asked.sampling_weights, drawn):
        return weights
    share = np.where(drawn > 0, asked.sampling_weights / np.where(drawn > 0, drawn, 1.0), 0.0)
    meant = weights * share
    return normalise(meant) if meant.any() else weights
