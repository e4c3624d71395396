"""Naive validation: exponential weights on how bad each domain's held-out loss is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from megatron.mixing.bandit import exponential_weights
from megatron.mixing.base import RunContext
from megatron.mixing.held_out import HeldOutMixer
from megatron.mixing.migrate import Edit
from megatron.mixing.observation import FloatArray
from megatron.mixing.options import CommonOptions
from megatron.mixing.simplex import exploration_rate

_STATE_KEYS: Final = ("gain", "epsilon")


@dataclass(frozen=True, kw_only=True)
class NaiveValidationOptions(CommonOptions):
    """Options of ``naive_validation``: cadence, floors and ceilings."""


class NaiveValidation(HeldOutMixer):
    """The domain with the worst held-out loss gains most.

    At each update G_i <- G_i + (V_i - min V) / (max V - min V) (0 when all are equal);
    then p = (1 - K eps_t) softmax(eps_(t-1) G) + eps_t.  A domain without held-out data
    gains nothing.

    Source: the baseline of the online-data-mixing fork; the weights as in Exp3 (Auer et
    al., 2002), without its division by p, because every domain is measured.
    """

    method = "naive_validation"

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: NaiveValidationOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._gain: FloatArray = np.zeros(len(self.domains))
        self._epsilon = exploration_rate(0, len(self.domains))

    def _learn(self, step: int, valid_loss: FloatArray) -> FloatArray | None:
        valid_loss = valid_loss[: len(self.domains)]
        measured = ~np.isnan(valid_loss)
        if not measured.any():
            return None
        self._gain = self._gain + _min_max(np.where(measured, valid_loss, np.nanmin(valid_loss)))
        epsilon = exploration_rate(step, len(self.domains))
        weights = exponential_weights(self._gain, self._epsilon, epsilon)
        self._epsilon = epsilon
        return weights

    def _edited(self, state: dict[str, Any], edit: Edit) -> dict[str, Any]:
        rule = state["rule"]
        epsilon = min(rule["epsilon"], exploration_rate(0, len(edit.after)))
        return {**state, "rule": {**rule, "epsilon": epsilon}}

    def _save(self) -> dict[str, Any]:
        return {"gain": self._by_name(self._gain), "epsilon": self._epsilon}

    def _restore(self, rule: Mapping[str, Any]) -> None:
        self._check_rule(rule, _STATE_KEYS)
        gain = self._vector(rule["gain"], "gain")
        if not (np.isfinite(gain).all() and (gain >= 0).all()):
            raise self._damaged("gain", rule["gain"])
        self._gain, self._epsilon = gain, float(rule["epsilon"])

    def _estimates(self) -> dict[str, Any]:
        return {"gain": self._by_name(self._gain), "exploration_rate": self._epsilon}


def _min_max(values: FloatArray) -> FloatArray:
    """Return (v - min) / (max - min), [K]; 0 when all are equal."""
    halves = values / 2.0  # so that no difference overflows
    spread = halves.max() - halves.min()
    return (halves - halves.min()) / spread if spread > 0 else np.zeros(len(values))
