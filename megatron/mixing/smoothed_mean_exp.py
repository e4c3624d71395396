"""Smoothed mean with exponential weights: the released ODM code's update of one domain."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.mixing.bandit import (
    SmoothingBandit,
    SmoothingOptions,
    exponential_weights,
    perplexity,
)
from megatron.mixing.observation import FloatArray
from megatron.mixing.window import Window


@dataclass(frozen=True, kw_only=True)
class SmoothedMeanExpOptions(SmoothingOptions):
    """Options of ``smoothed_mean_exp``."""


class SmoothedMeanExp(SmoothingBandit):
    """Exponential weights on a smoothed perplexity.

    R as in ``smoothed_mean``, for each domain seen; then
    p = (1 - K eps_t) softmax(eps_(t-1) R) + eps_t.

    Source: the single-domain update of ODM's released code.
    """

    method = "smoothed_mean_exp"

    def _learn(self, window: Window) -> FloatArray | None:
        return self._smooth(perplexity(window.mean_loss), window.present)

    def _rule(self, estimate: FloatArray, previous: float, epsilon: float) -> FloatArray | None:
        return exponential_weights(estimate, previous, epsilon) if estimate.any() else None
