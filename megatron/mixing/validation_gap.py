"""Validation gap: exponential weights on how much worse a domain is held out than trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import numpy as np

from megatron.mixing.bandit import (
    Bandit,
    Importance,
    ImportanceOptions,
    exponential_weights,
    importance_weighted,
)
from megatron.mixing.base import RunContext
from megatron.mixing.decision import Decision
from megatron.mixing.exp3 import REWARD_SCALE
from megatron.mixing.migrate import Follow, newcomer, reset
from megatron.mixing.observation import BoolArray, FloatArray, Observation, Signal
from megatron.mixing.simplex import saturate
from megatron.mixing.window import Window

_GAP_KEYS: Final = frozenset({"valid_sum", "valid_tokens", "last_valid", "held"})
_HELD_KEYS: Final = frozenset({"step", "valid"})


@dataclass(frozen=True, kw_only=True)
class ValidationGapOptions(ImportanceOptions):
    """Options of ``validation_gap``."""

    batch_normalized_reward: bool = field(
        default=False,
        metadata={
            "help": "scale the rewards of the domains seen to [0, 1] by their least and greatest "
            "(0 when all are equal)"
        },
    )
    scale_by_reward_loss_diff: bool = field(
        default=False,
        metadata={
            "help": "multiply a domain's reward by the fall of its held-out loss since it was "
            "last measured (0 the first time)"
        },
    )


class ValidationGap(Bandit):
    """A domain gains by the distance from its training loss L to its held-out loss V.

    Before a step trains, V of every domain in it is measured, over as many held-out
    samples as the step has of the domain.  At an update, for each domain seen:
    G <- G + ((V - L) / 10) / p, with p the probability that drew it; then
    p = (1 - K eps_t) softmax(eps_(t-1) G) + eps_t.  With ``update_every`` above 1, V and
    L are means over the tokens of all steps since the last update.

    Source: the reward of the online-data-mixing fork (``validation_based_reward`` with
    mixed micro-batches) in the rule of its Exp3 (Auer et al., 2002), for all domains of a
    step together.
    """

    method = "validation_gap"
    needs = frozenset({Signal.LOSS, Signal.BATCH_VALID_LOSS})
    follows: ClassVar[Mapping[str, Follow]] = {
        "valid_sum": newcomer(0.0),
        "valid_tokens": newcomer(0.0),
        "last_valid": newcomer(None),
        "held": reset(None),
    }

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: ValidationGapOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._gap = options
        self._chance = Importance(options.importance, method=self.method, context=context)
        count = len(self.domains)
        self._valid_sum, self._valid_tokens = np.zeros(count), np.zeros(count)
        self._last_valid = np.full(count, np.nan)
        self._held: tuple[int, FloatArray] | None = None
        """The step and the held-out losses that were foreseen, until the step counts."""

    def _decide(self, step: int) -> Decision:
        decision = super()._decide(step)
        feeds = self._options.pool or step % self._options.update_every == 0
        known = self._foreseen(step) or (self._held is not None and self._held[0] == step)
        if not feeds or known:
            return decision
        return replace(decision, measure=frozenset({Signal.BATCH_VALID_LOSS}))

    def _foresee(self, observation: Observation) -> None:
        valid = observation.vector("batch_valid_loss")
        if valid is not None:
            self._held = (observation.step, valid)

    def _follow(self, observation: Observation, sampling_weights: FloatArray) -> None:
        held, self._held = self._held, None
        valid = observation.vector("batch_valid_loss")  # of a loop that measures afterwards
        if held is not None and held[0] == observation.step:
            valid = held[1]
        tokens = observation.vector("token_count")
        due = observation.step % self._options.update_every == 0
        if valid is None or tokens is None or not (self._options.pool or due):
            return
        measured = np.isfinite(valid) & (tokens > 0)
        weight = np.where(measured, tokens, 0.0)
        with np.errstate(over="ignore"):
            added = np.where(measured, valid, 0.0) * weight
            self._valid_sum = saturate(self._valid_sum + added)
            self._valid_tokens = saturate(self._valid_tokens + weight)

    def _learn(self, window: Window) -> FloatArray | None:
        chance = self._chance(window)
        seen = window.present & (chance > 0) & (self._valid_tokens > 0)
        tokens = np.where(self._valid_tokens > 0, self._valid_tokens, 1.0)
        valid = np.where(seen, self._valid_sum / tokens, self._last_valid)
        # A domain that waits for more evidence keeps what was measured for it.
        self._valid_sum = np.where(window.present, 0.0, self._valid_sum)
        self._valid_tokens = np.where(window.present, 0.0, self._valid_tokens)
        before, self._last_valid = self._last_valid, valid
        if not seen.any():
            return None
        reward = self._reward(window.mean_loss, valid, before, seen)
        with np.errstate(over="ignore"):
            gain = importance_weighted(reward / REWARD_SCALE, chance)
            return np.where(seen, saturate(self._estimate + gain), self._estimate)

    def _reward(
        self, loss: FloatArray, valid: FloatArray, before: FloatArray, seen: BoolArray
    ) -> FloatArray:
        """Return the rewards, [K]; those of domains not seen mean nothing."""
        with np.errstate(over="ignore", invalid="ignore"):
            reward = saturate(np.where(seen, valid - loss, 0.0))
            if self._gap.batch_normalized_reward:
                reward = _min_max(reward, seen)
            if self._gap.scale_by_reward_loss_diff:
                known = seen & np.isfinite(before)
                reward = saturate(reward * np.where(known, saturate(before - valid), 0.0))
        return reward

    def _rule(self, estimate: FloatArray, previous: float, epsilon: float) -> FloatArray:
        return exponential_weights(estimate, previous, epsilon)

    def _save(self) -> dict[str, Any]:
        held = None
        if self._held is not None:
            held = {"step": self._held[0], "valid": self._by_name(self._held[1])}
        return {
            **super()._save(),
            "valid_sum": self._by_name(self._valid_sum),
            "valid_tokens": self._by_name(self._valid_tokens),
            "last_valid": self._by_name(self._last_valid),
            "held": held,
        }

    def _restore(self, rule: Mapping[str, Any]) -> None:
        own = {name: rule.get(name) for name in _GAP_KEYS if name in rule}
        rest = {name: value for name, value in rule.items() if name not in _GAP_KEYS}
        self._check_rule(own, _GAP_KEYS)
        totals = [self._vector(rule[name], name) for name in ("valid_sum", "valid_tokens")]
        if not all(np.isfinite(total).all() for total in totals):
            raise self._damaged("valid_sum", rule["valid_sum"])
        last_valid, held = self._vector(rule["last_valid"], "last_valid"), None
        if rule["held"] is not None:
            if not isinstance(rule["held"], Mapping):
                raise self._damaged("held", rule["held"])
            self._check_rule(rule["held"], _HELD_KEYS)
            step = self._whole(rule["held"]["step"], "step", least=1)
            held = (step, self._vector(rule["held"]["valid"], "held"))
        super()._restore(rest)
        self._valid_sum, self._valid_tokens = totals
        self._last_valid, self._held = last_valid, held

    def _estimates(self) -> dict[str, Any]:
        shown = super()._estimates()
        if not np.isnan(self._last_valid).all():
            shown["batch_valid_loss"] = self._by_name(self._last_valid)
        return shown


def _min_max(values: FloatArray, seen: BoolArray) -> FloatArray:
    """Return (v - min) / (max - min) over the domains seen, [K]; 0 when those are equal."""
    halves = values / 2.0  # so that no difference overflows
    least, greatest = halves[seen].min(), halves[seen].max()
    if greatest <= least:
        return np.zeros(len(values))
    return np.where(seen, (halves - least) / (greatest - least), 0.0)
