"""The guardrail around a method: when the run gets worse, a fixed mixture draws instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from megatron.errors import CheckpointError
from megatron.mixing.control import Control
from megatron.mixing.controller import Controller
from megatron.mixing.decision import Decision
from megatron.mixing.forecast import FittedForecast, interpolated
from megatron.mixing.guardrail_options import GuardrailOptions
from megatron.mixing.held_out_difference import Measurement, Yardstick
from megatron.mixing.observation import FloatArray, Observation
from megatron.mixing.reported import Reported
from megatron.state import check_state

_KEYS: Final = ("method", "domains", "controller", "guardrail")
_COUNTS: Final = ("reviewed", "reverts", "streak", "rivals", "looks")
_OWN_KEYS: Final = frozenset({*_COUNTS, "since", "best", "base", "history"})
LEAST_POINTS: Final = 4
"""Reports of the fallback that a power law needs."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fallback:
    """What draws when the method does not, and what it is known to reach.

    Attributes:
        weights: the mixture within floors and ceilings, [K].
        name: what to call it.
        steps: validations of an earlier run of it, rising, [P]; empty without one.
        losses: their losses, [P, N]; NaN where not measured.
        draws_first: whether it is what draws in the warm-up and in shadow, too.
    """

    weights: FloatArray
    name: str
    steps: tuple[int, ...] = ()
    losses: npt.NDArray[np.float64] | None = None
    draws_first: bool = False


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """A regression: how far above what, and what it had to exceed."""

    excess: float
    needed: float
    over: str


class Guardrail(Control):
    """A method under watch.

    Every report validation is compared, as the objective's held-out loss, with the best
    since the method took control (starting from the one before), and with what the fallback
    would have reached.  A regression exceeds the tolerance *and* ``standard_errors`` standard
    errors of the difference:

    * over the best: of the paired differences over the same windows.  The least of many noisy
      numbers lies too low, so reports that noise alone tells apart are one best, their mean;
      and with m of them, so that chances of a false alarm do not add up over a plateau,
      z standard errors become z sqrt(1 + ln m).
    * over this run's own fallback: of the paired differences with its last report, and of the
      law; over an earlier run, whose windows are not recorded: of the loss itself.  That is
      more than the difference scatters if both runs validated on the same windows, so it errs
      towards leaving the method alone.  Here m counts the reports since the method took over.

    What moves all windows alike from one report to the next (a wobble of the training) is in
    no standard error: the tolerance must lie above it.

    After a regression the fallback draws.  The method goes on observing, told what really
    drew, so its estimates stay unbiased and control can return.  While the method is not in
    control (warm-up, shadow, fallback) nothing is held against it.

    Args:
        inner: the method, or the method with groups around it.
        options: the block ``guardrail``.
        fallback: draws instead.
        yardstick: the objective over ``measured``.
        measured: names of what a report validation measures, [N].
        waits: steps at the start that the method does not draw; None = all (shadow).
    """

    def __init__(
        self,
        inner: Controller,
        *,
        options: GuardrailOptions,
        fallback: Fallback,
        yardstick: Yardstick,
        measured: tuple[str, ...],
        waits: int | None,
    ) -> None:
        super().__init__(inner)
        self._options, self._fallback = options, fallback
        self._yardstick, self._measured, self._waits = yardstick, measured, waits
        self._reviewed = -1
        self._since: int | None = None
        self._reverts = self._streak = 0
        self._rivals, self._looks = 1, 0
        self._best: Measurement | None = None
        self._base: Measurement | None = None  # the last that the fallback drew
        self._history: list[tuple[int, float]] = []
        self._forecast: FittedForecast | None = None  # of the history as it is

    def decide(self, step: int) -> Decision:
        """See :class:`~megatron.mixing.controller.Controller`."""
        return self._guarded(step, self._inner.decide(step))

    def foresee(self, observation: Observation) -> Decision:
        """See :class:`~megatron.mixing.controller.Controller`."""
        return self._guarded(observation.step, self._inner.foresee(observation))

    def observe(self, observation: Observation) -> None:
        """See :class:`~megatron.mixing.controller.Controller`."""
        if (
            isinstance(observation, Observation)
            and observation.sampling_weights is None
            and not observation.only_validation
            and self._falls_back(observation.step)
        ):
            observation = replace(observation, sampling_weights=self._fallback.weights)
        self._inner.observe(observation)

    def review(self, reported: Reported) -> str | None:
        """Compare a report validation; return what was done about it, None for nothing.

        A step that was reviewed already (a resumed run measures again) changes nothing.
        """
        inner = self._inner.review(reported)
        step = int(reported.step)
        if step <= self._reviewed:
            return inner
        before, self._reviewed = self._reviewed, step
        now = Measurement.of(reported)
        value = self._yardstick.value(now.loss)
        broken = self._yardstick.broken(now.loss)
        if not math.isfinite(value) and not broken:
            return inner
        if self._waits is None or step <= self._waits or self._falls_back(step):
            self._take_base(now, value)
            return inner
        self._looks += self._best is not None
        finding = self._finding(now, broken=broken)
        self._streak = 0 if finding is None else self._streak + 1
        if finding is not None and self._streak >= self._options.patience:
            return self._revert(step, now, value, finding)
        self._keep_best(now, value)
        back = self._returned_at()
        if back is not None and before < back <= step:
            return f"guardrail: {self.method} draws again since step {back}"
        return inner

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state and the guardrail's own, JSON-able."""

        def kept(measurement: Measurement | None) -> dict[str, Any] | None:
            return None if measurement is None else measurement.state_dict(self._measured)

        return {
            "version": 1,
            "method": self.method,
            "domains": list(self.domains),
            "controller": self._inner.state_dict(),
            "guardrail": {
                "reviewed": self._reviewed,
                "since": self._since,
                "reverts": self._reverts,
                "streak": self._streak,
                "rivals": self._rivals,
                "looks": self._looks,
                "best": kept(self._best),
                "base": kept(self._base),
                "history": [[step, value] for step, value in self._history],
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; one of a run without a guardrail starts it anew.

        Raises:
            CheckpointError: it is damaged, or does not fit the method.
        """
        if "guardrail" not in state:
            self._inner.load_state_dict(state)
            return
        check_state("the guardrail", state, version=1, keys=_KEYS)
        own = state["guardrail"]
        try:
            if set(own) != _OWN_KEYS:
                raise KeyError(sorted(own))
            best, base = (
                None if own[key] is None else Measurement.from_state(own[key], self._measured)
                for key in ("best", "base")
            )
            since = None if own["since"] is None else int(own["since"])
            counts = [int(own[key]) for key in _COUNTS]
            history = [(int(step), float(value)) for step, value in own["history"]]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the state of the guardrail is damaged: {error}") from error
        self._inner.load_state_dict(state["controller"])
        for key, count in zip(_COUNTS, counts, strict=True):
            setattr(self, f"_{key}", count)
        self._since, self._best, self._base, self._history = since, best, base, history
        self._forecast = None
        self._forget_other_objective()

    def migrate(self, state: Mapping[str, Any], parents: Mapping[str, str]) -> dict[str, Any]:
        """See :class:`~megatron.mixing.controller.Controller`.

        What was measured of the domains that stay is still compared; a law through the losses
        of other domains than now is forgotten.
        """
        if "guardrail" not in state:
            return self._inner.migrate(state, parents)
        controller = self._inner.migrate(state["controller"], parents)
        own = dict(state["guardrail"])
        if set(state["domains"]) != set(self.domains):
            own |= {"base": None, "history": []}
        domains = list(self.domains)
        return {**state, "domains": domains, "controller": controller, "guardrail": own}

    def describe(self) -> dict[str, Any]:
        """Return what the method shows, with what really draws and the guardrail's view."""
        shown = dict(self._inner.describe())
        step = self.step + 1
        decision = self.decide(step)
        shown["weights"] = self._named(decision.sampling_weights)
        if decision.controller_weights is not None:
            shown["controller_weights"] = self._named(decision.controller_weights)
        best = self._best
        shown["guardrail"] = {
            "control": "fallback" if self._falls_back(step) else "method",
            "reverts": self._reverts,
            "best": None if best is None else self._yardstick.value(best.loss),
            "best_step": None if best is None else best.step,
        }
        return shown

    # Who draws.

    def _returned_at(self) -> int | None:
        """The step from which the method draws again; None if it never lost or never gets it."""
        after = self._options.retry_after
        if self._since is None or after is None or self._reverts > self._options.retries:
            return None
        return self._since + after + 1

    def _falls_back(self, step: int) -> bool:
        """Whether the fallback draws ``step``."""
        if self._since is None or step <= self._since:
            return False
        back = self._returned_at()
        return back is None or step < back

    def _guarded(self, step: int, decision: Decision) -> Decision:
        """Return the method's decision, or the fallback's, which still measures for it."""
        if not self._falls_back(step):
            return decision
        wanted = decision.controller_weights
        return Decision(
            sampling_weights=self._fallback.weights.copy(),
            validate=decision.validate,
            measure=decision.measure,
            controller_weights=decision.sampling_weights if wanted is None else wanted,
            control="fallback",
        )

    # What is made of a report.

    def _forget_other_objective(self) -> None:
        """Drop what says nothing of the objective, which a run may change when it goes on."""
        best, base, history = self._best, self._base, self._history
        if best is not None and not math.isfinite(self._yardstick.value(best.loss)):
            self._best, self._rivals, self._looks, self._streak = None, 1, 0, 0
        if base is None or not history or history[-1][0] != base.step:
            return
        if not math.isclose(self._yardstick.value(base.loss), history[-1][1], rel_tol=1e-9):
            self._base, self._history = None, []

    def _take_base(self, now: Measurement, value: float) -> None:
        """Remember a report that the method is not to answer for."""
        if not math.isfinite(value):
            return
        self._best, self._rivals, self._looks, self._streak = now, 1, 0, 0
        if self._since is None and not self._fallback.draws_first:
            return
        self._base = now
        if self._since is None or self._returned_at() is not None:
            self._history.append((now.step, value))
            self._forecast = None

    def _finding(self, now: Measurement, *, broken: bool) -> _Finding | None:
        """Return a regression, or None."""
        if broken:
            return _Finding(excess=math.inf, needed=self._options.tolerance, over="any number")
        for finding in (self._over_best(now), self._over_fallback(now)):
            if finding is not None and finding.excess > finding.needed:
                return finding
        return None

    def _over_best(self, now: Measurement) -> _Finding | None:
        best = self._best
        if best is None:
            return None
        error = self._yardstick.paired_error(now, best) or 0.0
        return self._weighed(
            self._yardstick.difference(now.loss, best.loss),
            error * self._sure(self._looks),
            f"the best, of step {best.step}",
        )

    def _over_fallback(self, now: Measurement) -> _Finding | None:
        """Compare with the fallback's forecast, if there is one."""
        sure = self._sure(self._looks)
        if self._fallback.losses is not None:
            losses = interpolated(self._fallback.steps, self._fallback.losses, now.step)
            if losses is None:
                return None
            excess = self._yardstick.difference(now.loss, losses)
            over = f"what an earlier run of {self._fallback.name} reached"
            return self._weighed(excess, sure * (self._yardstick.own_error(now) or 0.0), over)
        base = self._base
        if base is None or len(self._history) < LEAST_POINTS:
            return None
        if self._forecast is None:
            self._forecast = FittedForecast(*zip(*self._history, strict=True))
        forecast = self._forecast
        if not forecast.known:
            return None
        paired = self._yardstick.paired_error(now, base) or 0.0
        return self._weighed(
            self._yardstick.value(now.loss) - forecast.value(now.step),
            math.hypot(
                sure * math.hypot(paired, forecast.scatter(now.step)),
                self._options.standard_errors * forecast.model_error(now.step),
            ),
            f"what {self._fallback.name} would have reached by its power law",
        )

    def _weighed(self, excess: float, noise: float, over: str) -> _Finding:
        return _Finding(excess=excess, needed=max(self._options.tolerance, noise), over=over)

    def _sure(self, chances: int) -> float:
        """Return how many standard errors count, with so many chances of a false alarm."""
        return self._options.standard_errors * math.sqrt(1.0 + math.log(max(chances, 1)))

    def _keep_best(self, now: Measurement, value: float) -> None:
        """Let the report be the best, or one of those that noise alone tells from it."""
        if not math.isfinite(value):
            return
        if self._best is None:
            self._best, self._rivals = now, 1
            return
        change = self._yardstick.difference(now.loss, self._best.loss)
        error = self._yardstick.paired_error(now, self._best) or 0.0
        if change < -error * self._sure(self._looks + 1):
            self._best, self._rivals = now, 1
        elif change <= error * self._options.standard_errors:
            self._best = self._best.averaged(now, count=self._rivals)
            self._rivals += 1

    def _revert(self, step: int, now: Measurement, value: float, finding: _Finding) -> str:
        """Give control to the fallback; return what is said of it."""
        self._since, self._streak = step, 0
        self._reverts += 1
        if math.isfinite(value):  # what the method is compared with when it comes back
            self._best, self._rivals, self._looks = now, 1, 0
        back = self._returned_at()
        until = "" if back is None else f" up to step {back - 1}"
        return (
            f"guardrail: at step {step} the objective's held-out loss is {value:.4f} nats per "
            f"token, {finding.excess:.4f} above {finding.over} (allowed: {finding.needed:.4f}); "
            f"{self._fallback.name} draw from step {step + 1} on{until}, and {self.method} goes "
            f"on observing"
        )
