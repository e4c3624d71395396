"""What the bandits over domains share: an estimate per domain and a decaying exploration."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from megatron.errors import CheckpointError, ConfigError
from megatron.mixing.base import Mixer, RunContext
from megatron.mixing.migrate import Edit
from megatron.mixing.observation import BoolArray, FloatArray
from megatron.mixing.options import CommonOptions, require
from megatron.mixing.simplex import (
    LOSS_CLIP,
    exploration_rate,
    explore,
    saturate,
    softmax,
)
from megatron.mixing.window import Window

_STATE_KEYS: Final = frozenset({"estimate", "epsilon"})


@dataclass(frozen=True, kw_only=True)
class SmoothingOptions(CommonOptions):
    """Options of the methods that smooth a reward.

    Raises:
        ConfigError: a number out of its range.
    """

    smoothing_factor: float = field(
        default=0.9,
        metadata={
            "help": "share of the old estimate in the new one (alpha); the released scripts use 0.5"
        },
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        value = self.smoothing_factor
        require("smoothing_factor", value, 0 <= value < 1, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ImportanceOptions(CommonOptions):
    """Options of the methods that divide a reward by the chance of having seen it."""

    importance: Literal["probability", "inclusion"] = field(
        default="probability",
        metadata={
            "help": "what a seen domain's reward is divided by: its probability p, as in the "
            "papers, which is right for one draw a step; or its chance 1 - (1 - p)^n to be among "
            "the n draws of the step (of all the steps since the last update), which keeps the "
            "estimate unbiased for any n"
        },
    )


class Bandit(Mixer):
    """A mixer with one estimate per domain and an exploration rate that falls with the step.

    The order of an update at step t: the estimate first, then the weights from it,
    the rate of the *previous update* (1/K before the first) and the rate of t.
    """

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: CommonOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._estimate: FloatArray = np.zeros(len(self.domains))
        self._epsilon = exploration_rate(0, len(self.domains))

    @abstractmethod
    def _learn(self, window: Window) -> FloatArray | None:
        """Return the new estimate, [K]; None if the window teaches nothing."""

    @abstractmethod
    def _rule(self, estimate: FloatArray, previous: float, epsilon: float) -> FloatArray | None:
        """Return the weights for an estimate, the previous and the present exploration rate."""

    def _update(self, step: int, window: Window) -> FloatArray | None:
        estimate = self._learn(window)
        if estimate is None:
            return None
        epsilon = exploration_rate(step, len(self.domains))
        weights = self._rule(estimate, self._epsilon, epsilon)
        if weights is not None:
            self._estimate, self._epsilon = estimate, epsilon
        return weights

    def _edited(self, state: dict[str, Any], edit: Edit) -> dict[str, Any]:
        rule = state["rule"]
        epsilon = min(rule["epsilon"], exploration_rate(0, len(edit.after)))
        return {**state, "rule": {**rule, "epsilon": epsilon}}

    def _save(self) -> dict[str, Any]:
        return {"estimate": self._by_name(self._estimate), "epsilon": self._epsilon}

    def _restore(self, rule: Mapping[str, Any]) -> None:
        if rule.keys() != _STATE_KEYS:
            raise CheckpointError(
                f"the state of mixing method '{self.method}' holds {sorted(rule)} where "
                f"{sorted(_STATE_KEYS)} belong"
            )
        estimate = self._vector(rule["estimate"], "estimate")
        if not np.isfinite(estimate).all():
            raise CheckpointError(
                f"the state of mixing method '{self.method}' is damaged: estimate "
                f"{estimate.tolist()}"
            )
        self._estimate, self._epsilon = estimate, float(rule["epsilon"])

    def _estimates(self) -> dict[str, Any]:
        return {"estimate": self._by_name(self._estimate), "exploration_rate": self._epsilon}


class SmoothingBandit(Bandit):
    """A bandit whose estimate is a smoothed reward."""

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: SmoothingOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._alpha = options.smoothing_factor

    def _smooth(self, reward: FloatArray, seen: BoolArray) -> FloatArray:
        """Return alpha * estimate + (1 - alpha) * reward where ``seen``, else the estimate, [K]."""
        moved = saturate(self._alpha * self._estimate + (1.0 - self._alpha) * reward)
        return np.where(seen, moved, self._estimate)


def importance_weighted(loss: FloatArray, drawn_by: FloatArray) -> FloatArray:
    """Return loss / p per domain, [K], saturated; 0 where p = 0 (no such draw can be weighted)."""
    possible = drawn_by > 0
    with np.errstate(over="ignore"):
        weighted = loss / np.where(possible, drawn_by, 1.0)
    return np.where(possible, saturate(weighted), 0.0)


class Importance:
    """What a bandit divides rewards by, as its options say.

    Args:
        kind: ``probability`` or ``inclusion``.
        method: the bandit's name, for the error.
        context: names the draws of a step, which ``inclusion`` needs.

    Raises:
        ConfigError: ``inclusion`` without the number of draws.
    """

    def __init__(self, kind: str, *, method: str, context: RunContext) -> None:
        self._draws: int | None = None
        if kind == "inclusion":
            self._draws = context.draws_per_step
            if self._draws is None:
                raise ConfigError(
                    f"mixing method '{method}': importance is 'inclusion', but the draws of a "
                    f"step are not known; give context=RunContext(draws_per_step=…)"
                )

    def __call__(self, window: Window) -> FloatArray:
        """Return the chance of each domain to be in the window, [K]; 0 where p = 0."""
        p = window.sampling_weights
        if self._draws is None:
            return p
        return inclusion_probability(p, self._draws * window.step_count)


def inclusion_probability(p: FloatArray, draws: FloatArray | int) -> FloatArray:
    """Return 1 - (1 - p)^n, [K]: the chance of a domain to be among n independent draws.

    Computed so that tiny probabilities keep their digits.
    """
    with np.errstate(divide="ignore"):
        return -np.expm1(draws * np.log1p(-np.minimum(p, 1.0)))


def perplexity(loss: FloatArray) -> FloatArray:
    """Return exp(loss) per domain, [K], with the loss cut at 50 nats."""
    return np.exp(np.minimum(loss, LOSS_CLIP))


def exponential_weights(estimate: FloatArray, previous: float, epsilon: float) -> FloatArray:
    """Return (1 - K eps_t) softmax(eps_(t-1) R) + eps_t, normalised."""
    return explore(softmax(previous * estimate), epsilon)
