"""The contract of every mixing method, and everything they have in common.

The loop knows one thing: ``decide(step)`` before a step, ``observe(observation)``
after it.  :class:`Mixer` carries what METHODS have in common (warm-up, cadence,
pooling, floors and ceilings, checks, state); a method adds its rule.  All of it is
float64 NumPy, free of clocks and random numbers, and identical on every rank.

How methods of every kind fit, without a change here or in the loop:

* A *loss-driven sampler* (the bandits, ADO) implements :meth:`Mixer._update`, which
  gets the pooled window of an update and returns the new distribution.  What must
  follow every step rather than every update (a running share of the batch, a loss
  history) goes into :meth:`Mixer._follow`.
* A *loss re-weighter* (DoReMi) keeps its sampling distribution: ``_update`` moves its
  own state and returns None, and :meth:`Mixer._decide` returns a decision with
  ``loss_weights``.  ``needs`` names ``Signal.EXCESS_LOSS``.
* What must be known of a step *before* it trains (DoGE's gradients, losses at the weights
  that the batch meets) is asked for with ``measure`` in the decision: the loop measures it
  on the planned batch and calls :meth:`Mixer.foresee`; the rule moves in ``_foresee``, and
  the decision is made anew, of which the loss weights count.  ``_decide`` asks until
  :meth:`Mixer._foreseen` says that it is in.
* A *validation-driven* one (Skill-It, dynamic batch loading) returns
  ``validate=True`` from ``_decide(step)`` until :meth:`Mixer._measured_before` says
  that the measurement is in.  The loop measures, observes it as step ``step - 1``
  with counts of 0, and asks again; the base hands such an observation to
  :meth:`Mixer._measure` and keeps its order apart from that of training steps, so
  step t - 1 may have both, in either order or in one observation, and step 0 may
  have one.
* A *prober* (Aioli) is a pure function of step and state in ``_decide``: it finds the
  step's place in its round, returns the probe mixture with ``probe`` set on every
  step of the probe and ``fresh_quota`` on its first, asks for ``validate`` before the
  next, and moves its estimates in ``_measure``, where it may set the distribution of
  the rest of the round with :meth:`Mixer._set_weights`.

What a method remembers goes through :meth:`Mixer._save` and :meth:`Mixer._restore`,
in vectors keyed by domain name (matrices: rows of them; histories: lists by name, or lists
of vectors).  Then it can follow an edit of the domains between two launches:
:meth:`Mixer.migrate` keeps what is known of domains that stay or return, and lets a newcomer
start from the mean of the others.  Where that is wrong for an entry, :attr:`Mixer.follows`
says what is right (see :mod:`megatron.mixing.migrate`), and :meth:`Mixer._edited` puts right
what hangs on several entries.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from megatron.errors import CheckpointError, ConfigError
from megatron.mixing.decision import Decision, RunContext
from megatron.mixing.gradient_aim import GradientAim
from megatron.mixing.migrate import VERSION, Edit, Follow, current_state, migrated
from megatron.mixing.named import Named
from megatron.mixing.objective import Objective, ObjectiveOptions
from megatron.mixing.observation import (
    FloatArray,
    Observation,
    ObservationError,
    Signal,
    check_fit,
    check_step,
)
from megatron.mixing.options import CommonOptions, bounds, require
from megatron.mixing.reported import Reported
from megatron.mixing.simplex import TOLERANCE, is_distribution, normalise, project
from megatron.mixing.window import Window
from megatron.registry import mixing_methods

__all__ = ["Decision", "Mixer", "Observation", "ObservationError", "RunContext", "Signal"]


class Mixer(Named):
    """A mixing method at work on one run.

    Args:
        domains: names, in the order of every vector.
        weights: the given weights as they are (at least 0, not all 0), float64 [K].
        options: the method's options.
        context: what is known of the run.

    Raises:
        ConfigError: floors and ceilings that no distribution satisfies.
    """

    needs: frozenset[Signal] = frozenset({Signal.LOSS})
    """Signals that the method reads."""
    has_objective: ClassVar[bool] = False
    """Whether the rule has a notion of an objective; it reads ``self._objective`` then."""
    follows: ClassVar[Mapping[str, Follow]] = {}
    """How entries of :meth:`_save` follow an edit of the domains, where ``mean`` is not right."""

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: CommonOptions,
        context: RunContext,
    ) -> None:
        require(
            "min_tokens",
            options.min_tokens,
            options.min_tokens == 0 or Signal.LOSS in self.needs,
            f"0 for '{self.method}', which learns nothing from training losses",
        )
        self.domains: tuple[str, ...] = tuple(domains)
        self._options = options
        self._context = context
        self._check_objective()
        self._objective = Objective(options.objective, self.domains, context.targets)
        self._floor, self._ceiling = bounds(options, self.domains, self.method)
        self._given = normalise(weights)
        self._initial = self._bounded(self._given)
        self._weights = self._initial
        self._step = 0
        self._measured_step = -1
        self._foreseen_step = 0
        self._window: Window | None = None
        self._shifted = False  # whether the rule has set the weights
        self._retired: Mapping[str, Any] = {}

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of what validation measures: the domains, then those never trained on."""
        return self.domains + self._context.targets

    @property
    def slots(self) -> npt.NDArray[np.int64]:
        """Which domains are one to the method, [K]: every domain is by itself."""
        return np.arange(len(self.domains))

    @property
    def gradient_aim(self) -> GradientAim | None:
        """What the gradients of the domains are compared with; None if they are not read."""
        return None

    @property
    def step(self) -> int:
        """The last step that a counted observation followed; 0 before the first."""
        return self._step

    def decide(self, step: int) -> Decision:
        """Return the decision for ``step``; it changes nothing and may be repeated.

        Any step after the last observed one may be asked for: what is not observed yet
        is not known yet, so it is what the present state says of that step.

        Raises:
            ObservationError: ``step`` is no step number, or lies in the past.
        """
        step = check_step(step, least=1)
        if step <= self._step:
            raise ObservationError(
                f"asked for the weights of step {step}, but step {self._step} has been observed "
                f"already; the earliest that can be decided is step {self._step + 1}"
            )
        if step <= self._options.warmup_steps:
            return Decision(sampling_weights=self._initial.copy())
        decision = self._decide(step)
        return self._shadowed(decision) if self._options.shadow else decision

    def observe(self, observation: Observation) -> None:
        """Learn from the step that ``observation.step`` names.

        An observation with a non-finite loss, and one without any token or validation,
        leaves the mixer exactly as it was.

        Raises:
            ObservationError: it is not of these domains, lacks a signal that the method
                reads, or its step is not after the last one observed.
        """
        check_fit(observation, self.domains, self._context.targets)
        if observation.only_validation:
            self._take_measurement(observation)
            return
        step = observation.step
        if step <= self._step:
            raise ObservationError(
                f"observation of step {step} after that of step {self._step}; steps are observed "
                f"once each, in rising order"
            )
        self._check_signals(observation)
        measured = Signal.VALID_LOSS in self.needs and observation.valid_loss is not None
        if measured:
            self._check_measurement(step)
        if not observation.finite(self.needs):
            return
        due = step % self._options.update_every == 0
        present = observation.present
        if present is not None and present.any():
            if step > self._options.warmup_steps:
                drawn_by = self._drawn_by(observation)
                self._follow(observation, drawn_by)
                self._pool(observation, drawn_by, due=due)
        elif not (due and self._window is not None):
            return
        if due and self._window is not None:
            window, self._window = self._window.release(self._options.min_tokens)
            updated = None if window is None else self._update(step, window)
            if updated is not None:
                self._set_weights(updated)
        self._step = step
        if measured:  # a loop may tell of a step and of the validation after it in one
            self._take_measurement(observation)

    def foresee(self, observation: Observation) -> Decision:
        """Learn what was measured on a planned step's batch before it trains.

        An observation that is not finite moves nothing.

        Args:
            observation: of the step that ``observation.step`` names, with the signals
                that its decision asked for.

        Returns:
            The step's decision, made anew; it asks for no further measurement.

        Raises:
            ObservationError: it is not of these domains, or its step lies in the past.
        """
        check_fit(observation, self.domains, self._context.targets)
        asked = self.decide(observation.step).measure  # refuses a step of the past
        if asked and observation.finite(asked):
            self._foresee(observation)
        self._foreseen_step = max(self._foreseen_step, observation.step)
        return replace(self.decide(observation.step), measure=frozenset())

    def review(self, reported: Reported) -> str | None:
        """Take a report validation; a method by itself does nothing about it."""
        return None

    def result(self) -> FloatArray | None:
        """Return the mixture to carry to the next run, [K]; None if the method makes none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next decisions depend on, JSON-able and rank-free."""
        window = self._window
        return {
            "version": VERSION,
            "method": self.method,
            "domains": list(self.domains),
            "targets": list(self._context.targets),
            "step": self._step,
            "measured_step": self._measured_step,
            "given": self._by_name(self._given),
            "weights": self._by_name(self._weights),
            "moved": self._shifted,
            "window": None if window is None else window.state_dict(self._by_name),
            "rule": self._save(),
            "retired": {name: dict(kept) for name, kept in self._retired.items()},
        }

    def migrate(self, state: Mapping[str, Any], parents: Mapping[str, str]) -> dict[str, Any]:
        """Return a state that was taken with other domains as one that this mixer can take up.

        Domains that stay keep what is known of them and share as they did, but for what the
        given weights assign to new ones.  The mixer itself, newly built, is not changed.

        Args:
            state: what :meth:`state_dict` gave.
            parents: for each domain that is a part of an earlier one, that one's name.

        Raises:
            CheckpointError: the state is of another version.
        """
        state = current_state(state, f"mixing method '{self.method}'")
        before = tuple(state["domains"])
        given: dict[str, Any] = self._by_name(self._given)
        edit = Edit(
            before=before,
            after=self.domains,
            measured_before=(*before, *state["targets"]),
            measured_after=self.measured,
            parents=parents,
            given_before=state["given"],
            given=given,
            retired=state["retired"],
        )
        if not edit.needed or state["method"] != self.method:
            return state
        start = None if state["moved"] or self._shifted else self._by_name(self._weights)
        return self._edited(migrated(state, self.follows, edit, start), edit)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``: every later decision has the bits it would have had.

        Raises:
            CheckpointError: the state is of another version, method or set of domains,
                or damaged.
        """
        owner = f"mixing method '{self.method}'"
        state = current_state(state, owner)
        if state["method"] != self.method:
            raise CheckpointError(
                f"the checkpoint's mixing method is '{state['method']}' and the configuration's "
                f"'{self.method}'; set mixing.method to '{state['method']}', or start a new run"
            )
        if sorted(state["domains"]) != sorted(self.domains):
            raise CheckpointError(
                f"the checkpoint mixes the domains {sorted(state['domains'])} and the "
                f"configuration {sorted(self.domains)}; give the run the same domains, or set "
                f"allow_domain_edits: true"
            )
        weights = self._vector(state["weights"], "weights")
        if not is_distribution(weights):
            raise CheckpointError(f"the state of {owner} is damaged: weights {weights.tolist()}")
        for key, least in (("step", 0), ("measured_step", -1)):
            if not isinstance(state[key], int) or state[key] < least:
                raise CheckpointError(f"the state of {owner} is damaged: {key} is {state[key]!r}")
        given = None if state["given"] is None else self._vector(state["given"], "given")
        window = state["window"]
        restored = None if window is None else Window.from_state(window, self._vector)
        self._restore(state["rule"])
        same = given is None or np.allclose(given, self._given, rtol=0.0, atol=TOLERANCE)
        if same or state["moved"] or self._shifted:
            self._weights = self._bounded(weights)
        self._window, self._shifted, self._retired = (
            restored,
            state["moved"],
            state["retired"],
        )
        self._step, self._measured_step = state["step"], state["measured_step"]
        if given is not None and not same:
            self._reweighted(given)

    def describe(self) -> dict[str, Any]:
        """Return what a log shows of the method: weights and estimates by name, JSON-able."""
        decision = self.decide(self._step + 1)
        shown: dict[str, Any] = {
            "method": self.method,
            "step": self._step,
            "weights": self._by_name(decision.sampling_weights),
        }
        if decision.controller_weights is not None:
            shown["controller_weights"] = self._by_name(decision.controller_weights)
        return shown | self._estimates()

    # What a method adds.

    @abstractmethod
    def _update(self, step: int, window: Window) -> FloatArray | None:
        """Apply the rule to the window that ends with ``step``.

        Returns:
            The new distribution before floors and ceilings, [K]; None to keep the old
            one.  A rule that returns None because its input decides nothing must not
            have moved its estimates either.
        """

    def _decide(self, step: int) -> Decision:
        """Return the decision for a step after the warm-up; pure."""
        return Decision(sampling_weights=self._weights.copy())

    def _follow(self, observation: Observation, sampling_weights: FloatArray) -> None:
        """See one counted step after the warm-up, before pooling."""

    def _measure(self, step: int, valid_loss: FloatArray) -> None:
        """See a validation measured after ``step``: [K + M], as ``measured`` (NaN = not)."""

    def _foresee(self, observation: Observation) -> None:
        """See what a decision asked for with ``measure``, before the step trains."""

    def _save(self) -> dict[str, Any]:
        """Return what the rule remembers, JSON-able."""
        return {}

    def _restore(self, rule: Mapping[str, Any]) -> None:
        """Take up what :meth:`_save` returned; check it before changing anything."""
        if rule:
            raise CheckpointError(
                f"the state of mixing method '{self.method}' holds {sorted(rule)}, unknown here"
            )

    def _edited(self, state: dict[str, Any], edit: Edit) -> dict[str, Any]:
        """Return the state after an edit, put right where :attr:`follows` is not enough; pure."""
        return state

    def _reweighted(self, before: FloatArray) -> None:
        """Follow given weights that are no longer those of the restored state, [K], sum 1."""

    def _estimates(self) -> dict[str, Any]:
        """Return what :meth:`describe` shows beside the weights."""
        return {}

    # What a method may use.

    def _set_weights(self, weights: FloatArray) -> None:
        """Take ``weights`` as the distribution from now on; what is not finite is refused."""
        if np.isfinite(weights).all() and (weights >= 0).all() and weights.any():
            self._weights, self._shifted = self._bounded(weights), True

    def _bounded(self, weights: FloatArray) -> FloatArray:
        """Project onto floors and ceilings; a distribution within them keeps its bits."""
        if len(weights) == 1:
            return np.ones(1)
        p = weights if is_distribution(weights) else normalise(weights)
        return project(p, self._floor, self._ceiling)

    def _measured_before(self, step: int) -> bool:
        """Whether a validation was measured between step ``step - 1`` and step ``step``."""
        return self._measured_step >= step - 1

    def _foreseen(self, step: int) -> bool:
        """Whether what ``step`` asked for with ``measure`` has been measured."""
        return self._foreseen_step >= step

    # How it hangs together.

    def _check_objective(self) -> None:
        """Refuse an objective that nothing would look at."""
        options = self._options
        watched = options.guardrail is not None
        if self.has_objective or watched or options.objective == ObjectiveOptions():
            return
        able = [n for n in mixing_methods if getattr(mixing_methods[n].build, "has_objective", 0)]
        raise ConfigError(
            f"mixing method '{self.method}': objective is {options.objective.kind!r}, but the "
            f"method has no notion of one; leave it out, or use one of {', '.join(sorted(able))}"
        )

    def _shadowed(self, decision: Decision) -> Decision:
        """Return the decision of a shadow: the given mixture trains, measurements are made."""
        return Decision(
            sampling_weights=self._initial.copy(),
            validate=decision.validate,
            measure=decision.measure,
            controller_weights=decision.sampling_weights,
            control="shadow",
        )

    def _drawn_by(self, observation: Observation) -> FloatArray:
        """Return the distribution that drew the observed step."""
        given = observation.vector("sampling_weights")
        return self.decide(observation.step).sampling_weights if given is None else given

    def _pool(self, observation: Observation, drawn_by: FloatArray, *, due: bool) -> None:
        """Add a step to the window of the next update."""
        if self._options.pool or due:
            window = self._window or Window.empty(len(self.domains))
            self._window = window.add(observation, drawn_by)

    def _take_measurement(self, observation: Observation) -> None:
        """Hand over a validation; measurements have an order of their own."""
        step, valid_loss = observation.step, observation.vector("valid_loss")
        self._check_measurement(step)
        if valid_loss is None or not observation.finite(self.needs):
            return
        self._measured_step = step
        if Signal.VALID_LOSS in self.needs and step >= self._options.warmup_steps:
            targets = observation.vector("target_loss")
            missing = np.full(len(self._context.targets), np.nan)
            self._measure(step, np.append(valid_loss, missing if targets is None else targets))

    def _check_measurement(self, step: int) -> None:
        if step <= self._measured_step:
            raise ObservationError(
                f"validation of step {step} after that of step {self._measured_step}; each step "
                f"is validated once, in rising order"
            )

    def _check_signals(self, observation: Observation) -> None:
        if Signal.LOSS in self.needs and observation.loss_sum is None:
            raise ObservationError(
                f"observation of step {observation.step} has no loss_sum and token_count, which "
                f"the mixing method '{self.method}' reads"
            )
