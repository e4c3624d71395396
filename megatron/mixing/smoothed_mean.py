"""Smoothed mean: what the released ODM code trains with."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.mixing.bandit import SmoothingBandit, SmoothingOptions, perplexity
from megatron.mixing.observation import FloatArray
from megatron.mixing.simplex import explore, normalise
from megatron.mixing.window import Window


@dataclass(frozen=True, kw_only=True)
class SmoothedMeanOptions(SmoothingOptions):
    """Options of ``smoothed_mean``."""


class SmoothedMean(SmoothingBandit):
    """Sampling in proportion to a smoothed perplexity, above a floor that falls.

    For each domain seen: R <- alpha R + (1 - alpha) exp(L), not divided by p; then
    p = (1 - K eps_t) R / sum R + eps_t.  (The released code multiplies R by eps_(t-1),
    which cancels.)

    Source: the group update of ODM's released code, not the paper's rule.
    """

    method = "smoothed_mean"

    def _learn(self, window: Window) -> FloatArray | None:
        return self._smooth(perplexity(window.mean_loss), window.present)

    def _rule(self, estimate: FloatArray, previous: float, epsilon: float) -> FloatArray | None:
        return explore(normalise(estimate), epsilon) if estimate.any() else None
