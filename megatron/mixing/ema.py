"""EMA: sampling in proportion to a running mean of each domain's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megatron.errors import CheckpointError
from megatron.mixing.base import Mixer, RunContext
from megatron.mixing.observation import FloatArray
from megatron.mixing.options import CommonOptions
from megatron.mixing.simplex import normalise, saturate, softmax
from megatron.mixing.window import Window


@dataclass(frozen=True, kw_only=True)
class EmaOptions(CommonOptions):
    """Options of ``ema``."""

    normalisation: Literal["sum", "softmax"] = field(
        default="sum",
        metadata={
            "help": "how the running means become probabilities: divided by their sum, or by "
            "their softmax"
        },
    )


class Ema(Mixer):
    """A running mean of the losses whose memory grows with the step.

    For each domain seen at step t: w <- s L + (1 - s) w with s = 2 / (1 + t);
    p = w / sum w, or softmax(w).  w starts from the given weights as they are, not
    normalised.

    Source: ODM's released code.
    """

    method = "ema"

    def __init__(
        self,
        *,
        domains: Sequence[str],
        weights: FloatArray,
        options: EmaOptions,
        context: RunContext,
    ) -> None:
        super().__init__(domains=domains, weights=weights, options=options, context=context)
        self._normalisation = options.normalisation
        self._start: FloatArray = weights.copy()
        self._mean = self._start

    def _update(self, step: int, window: Window) -> FloatArray | None:
        share = 2.0 / (1.0 + step)
        moved = saturate(share * window.mean_loss + (1.0 - share) * self._mean)
        mean = np.where(window.present, moved, self._mean)
        weights = self._distribution(mean)
        if weights is not None:
            self._mean = mean
        return weights

    def _distribution(self, mean: FloatArray) -> FloatArray | None:
        if self._normalisation == "softmax":
            return softmax(mean)
        positive = np.maximum(mean, 0.0)  # a loss below 0 (none is a cross-entropy) earns nothing
        return normalise(positive) if positive.any() else None

    def _save(self) -> dict[str, Any]:
        return {"mean": self._by_name(self._mean)}

    def _restore(self, rule: Mapping[str, Any]) -> None:
        if rule.keys() != {"mean"}:
            raise CheckpointError(
                f"the state of mixing method 'ema' holds {sorted(rule)} where ['mean'] belongs"
            )
        mean = self._vector(rule["mean"], "mean")
        if not np.isfinite(mean).all():
            raise CheckpointError(
                f"the state of mixing method 'ema' is damaged: mean {mean.tolist()}"
            )
        self._mean = mean

    def _reweighted(self, before: FloatArray) -> None:
        if not self._shifted:  # it holds the given weights still
            self._mean = self._start

    def _estimates(self) -> dict[str, Any]:
        return {"mean_loss": self._by_name(self._mean)}
