"""Exp3: exponential weights on the sum of all importance-weighted rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron.mixing.bandit import (
    Bandit,
    Importance,
    ImportanceOptions,
    exponential_weights,
    importance_weighted,
)
from megatron.mixing.base import RunContext
from megatron.mixing.observation import FloatArray
from megatron.mixing.simplex import saturate
from megatron.mixing.window import Window

REWARD_SCALE: Final = 10.0
"""Nats that count as a reward of 1."""


@dataclass(frozen=True, kw_only=True)
class Exp3Options(ImportanceOptions):
    """Options of ``exp3``."""


class Exp3(Bandit):
    """The adversarial bandit with the loss as its reward.

    For each domain seen: G <- G + (L / 10) / p, with p the probability that drew it;
    then p = (1 - K eps_t) softmax(eps_(t-1) G) + eps_t.

    Source: Exp3 (Auer et al., 2002) as ODM's released code scales it.
    """

    method = "exp3"

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: Exp3Options,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._chance = Importance(options.importance, method=self.method, context=context)

    def _learn(self, window: Window) -> FloatArray | None:
        chance = self._chance(window)
        seen = window.present & (chance > 0)
        if not seen.any():
            return None
        reward = importance_weighted(window.mean_loss / REWARD_SCALE, chance)
        with np.errstate(over="ignore"):
            return np.where(seen, saturate(self._estimate + reward), self._estimate)

    def _rule(self, estimate: FloatArray, previous: float, epsilon: float) -> FloatArray:
        return exponential_weights(estimate, previous, epsilon)
