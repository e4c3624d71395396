"""Which token comes next, by its logits.  NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: what logits are divided by; 0 = the most probable token, always.
        top_k: draw among this many most probable tokens only; 0 = all.
        top_p: draw among the most probable tokens that together hold this much probability
            (Holtzman et al. 2020); 0 or 1 = all.
        seed: of the draws; token n of row r depends on (seed, r, n) and the logits alone.

    Raises:
        ConfigError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 1234

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value, fits, wanted in (
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("top_p", self.top_p, 0 <= self.top_p <= 1, "between 0 and 1"),
        ):
            if not fits:
                raise ConfigError(f"{name} is {value}; it must be {wanted}")

    def draw(self, logits: npt.NDArray[np.float32], *, row: int, position: int) -> int:
        """Return the next token.

        Args:
            logits: of every token, ``[V]``.
            row: number of the sequence.
            position: number of the token in it.
        """
        if self.temperature == 0.0:
            return int(np.argmax(logits))
        probability = self._probability(logits.astype(np.float64) / self.temperature)
        generator = np.random.Generator(
            np.random.Philox(key=self.seed, counter=[0, 0, row, position])
        )
        # The place of one uniform number among the cumulated probabilities.
        cumulated = np.cumsum(probability)
        place = np.searchsorted(cumulated, generator.random() * cumulated[-1], side="right")
        return int(min(place, np.flatnonzero(probability)[-1]))

    def _probability(self, logits: FloatArray) -> FloatArray:
        order = np.argsort(-logits, kind="stable")
        kept = order[: self.top_k] if self.top_k else order
        weight = np.exp(logits[kept] - logits[kept[0]])
        if 0.0 < self.top_p < 1.0:
            # The token that crosses the bound still belongs.
            before = np.cumsum(weight) - weight
            kept = kept[before < self.top_p * weight.sum()]
            weight = weight[: kept.size]
        probability = np.zeros_like(logits)
        probability[kept] = weight / weight.sum()
        return probability
