"""How fast each domain's loss falls with its own data: a line through its recent losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron.mixing.observation import FloatArray

_SUMS = ("count", "place", "square", "loss", "product")
_LEAST_SPREAD = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Trend:
    """Weighted sums of a regression of losses on x = ln(own tokens), domain by domain.

    What was seen fades in proportion to the data that came since: with memory m, a share of
    new data of 1 % lets the old count for m % less.  So the line looks at the same part of the
    data's logarithm early and late, and needs no history.

    Attributes:
        tokens: of each domain so far, [K].
        count: of tokens that count, [K].
        place: sum of x, [K].
        square: sum of x², [K].
        loss: sum of losses, [K].
        product: sum of x times losses, [K].
    """

    tokens: FloatArray
    count: FloatArray
    place: FloatArray
    square: FloatArray
    loss: FloatArray
    product: FloatArray

    @classmethod
    def empty(cls, domains: int) -> Trend:
        """Return the trend of nothing."""
        return cls(tokens=np.zeros(domains), **{name: np.zeros(domains) for name in _SUMS})

    def add(self, mean_loss: FloatArray, tokens: FloatArray, memory: float) -> Trend:
        """Return the trend with some more losses.

        Args:
            mean_loss: nats per token, [K]; it does not count where there are no tokens.
            tokens: that each mean is of, [K].
            memory: how fast the old fades; see the class.
        """
        here = tokens > 0
        total = self.tokens + tokens
        x = np.log(np.where(here, total, 1.0))
        y = np.where(here, mean_loss, 0.0)
        fading = np.maximum(0.0, 1.0 - memory * tokens / np.where(here, total, 1.0))
        terms = (np.ones_like(x), x, x * x, y, x * y)
        sums = {
            name: fading * getattr(self, name) + tokens * term
            for name, term in zip(_SUMS, terms, strict=True)
        }
        return replace(self, tokens=total, **sums)

    @property
    def known(self) -> Any:
        """Where anything has been seen, bool [K]."""
        return self.count > 0

    @property
    def slope(self) -> FloatArray:
        """How far the loss falls per e-fold of the domain's data, nats per token, [K].

        0 where nothing, or one place alone, has been seen.
        """
        count = np.where(self.known, self.count, 1.0)
        x, y = self.place / count, self.loss / count
        spread = self.square / count - x * x
        fall = x * y - self.product / count
        return np.where(spread > _LEAST_SPREAD, fall / np.maximum(spread, _LEAST_SPREAD), 0.0)

    @property
    def level(self) -> FloatArray:
        """Where the line stands now, nats per token, [K]; NaN where nothing has been seen."""
        count = np.where(self.known, self.count, 1.0)
        ahead = np.log(np.maximum(self.tokens, 1.0)) - self.place / count
        return np.where(self.known, self.loss / count - self.slope * ahead, np.nan)

    def state_dict(self, by_name: Callable[[FloatArray], dict[str, Any]]) -> dict[str, Any]:
        """Return it, JSON-able."""
        return {name: by_name(getattr(self, name)) for name in ("tokens", *_SUMS)}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], vector: Callable[[Mapping[str, Any]], FloatArray]
    ) -> Trend:
        """Return what :meth:`state_dict` gave."""
        return cls(**{name: vector(state[name]) for name in ("tokens", *_SUMS)})
