"""ODM: the importance-weighted bandit of the paper."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.mixing.bandit import (
    SmoothingBandit,
    SmoothingOptions,
    exponential_weights,
    importance_weighted,
)
from megatron.mixing.observation import FloatArray
from megatron.mixing.window import Window


@dataclass(frozen=True, kw_only=True)
class OdmOptions(SmoothingOptions):
    """Options of ``odm``."""


class Odm(SmoothingBandit):
    """Exponential weights on smoothed, importance-weighted losses.

    For each domain seen: R <- alpha R + (1 - alpha) L / p, with p the probability that
    drew it; then p = (1 - K eps_t) softmax(eps_(t-1) R) + eps_t.

    Source: ODM (arXiv 2312.02406), algorithm 1.
    """

    method = "odm"

    def _learn(self, window: Window) -> FloatArray | None:
        seen = window.present & (window.sampling_weights > 0)
        if not seen.any():
            return None
        reward = importance_weighted(window.mean_loss, window.sampling_weights)
        return self._smooth(reward, seen)

    def _rule(self, estimate: FloatArray, previous: float, epsilon: float) -> FloatArray:
        return exponential_weights(estimate, previous, epsilon)
