"""ODM: the importance-weighted bandit of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.mixing.bandit import (
    Importance,
    ImportanceOptions,
    SmoothingBandit,
    SmoothingOptions,
    exponential_weights,
    importance_weighted,
)
from megatron.mixing.base import RunContext
from megatron.mixing.observation import FloatArray
from megatron.mixing.window import Window


@dataclass(frozen=True, kw_only=True)
class OdmOptions(SmoothingOptions, ImportanceOptions):
    """Options of ``odm``."""


class Odm(SmoothingBandit):
    """Exponential weights on smoothed, importance-weighted losses.

    For each domain seen: R <- alpha R + (1 - alpha) L / p, with p the probability that
    drew it; then p = (1 - K eps_t) softmax(eps_(t-1) R) + eps_t.

    Source: ODM (arXiv 2312.02406), algorithm 1.
    """

    method = "odm"

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: OdmOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._chance = Importance(options.importance, method=self.method, context=context)

    def _learn(self, window: Window) -> FloatArray | None:
        chance = self._chance(window)
        seen = window.present & (chance > 0)
        if not seen.any():
            return None
        reward = importance_weighted(window.mean_loss, chance)
        return self._smooth(reward, seen)

    def _rule(self, estimate: FloatArray, previous: float, epsilon: float) -> FloatArray:
        return exponential_weights(estimate, previous, epsilon)
