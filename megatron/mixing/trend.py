"""How fast each domain's loss falls with its own data: a line through its recent losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.mixing.observation import BoolArray, FloatArray

_MOMENTS = ("count", "place", "loss", "spread", "shared")
_LARGEST = 1e100
"""A loss beyond this counts as this much, so that no product of two overflows."""
_LEAST_SPREAD = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Trend:
    """Weighted moments of a regression of losses on x = ln(own tokens), domain by domain.

    What was seen fades in proportion to the data that came since: with memory m, a share of
    new data of 1 % lets the old count for m % less.  So the line looks at the same part of the
    data's logarithm early and late, and needs no history.

    The moments are central ones: sums of squares of x would lose the small differences between
    its places, ln(10^12) being 28.

    Attributes:
        tokens: of each domain so far, [K].
        count: of tokens that count, [K].
        place: mean of x, [K].
        loss: mean of the losses, [K].
        spread: variance of x, [K].
        shared: covariance of x and the losses, [K].
    """

    tokens: FloatArray
    count: FloatArray
    place: FloatArray
    loss: FloatArray
    spread: FloatArray
    shared: FloatArray

    @classmethod
    def empty(cls, domains: int) -> Trend:
        """Return the trend of nothing."""
        return cls(tokens=np.zeros(domains), **{name: np.zeros(domains) for name in _MOMENTS})

    def add(self, mean_loss: FloatArray, tokens: FloatArray, memory: float) -> Trend:
        """Return the trend with some more losses.

        Args:
            mean_loss: nats per token, [K]; it does not count where there are no tokens.
            tokens: that each mean is of, [K].
            memory: how fast the old fades; see the class.
        """
        here = tokens > 0
        total = self.tokens + tokens
        safe = np.where(here, total, 1.0)
        count = np.maximum(0.0, 1.0 - memory * (tokens / safe)) * self.count + tokens
        # The share of the new ones: 0 where there are none, 1 where nothing else counts.
        new = np.where(here, tokens / np.where(here, count, 1.0), 0.0)
        ahead = np.where(here, np.log(safe) - self.place, 0.0)
        higher = np.where(here, np.clip(mean_loss, -_LARGEST, _LARGEST) - self.loss, 0.0)
        return Trend(
            tokens=total,
            count=count,
            place=self.place + new * ahead,
            loss=self.loss + new * higher,
            spread=(1.0 - new) * (self.spread + new * ahead * ahead),
            shared=(1.0 - new) * (self.shared + new * ahead * higher),
        )

    @property
    def known(self) -> BoolArray:
        """Where anything has been seen, [K]."""
        return self.count > 0

    @property
    def slope(self) -> FloatArray:
        """How far the loss falls per e-fold of the domain's data, nats per token, [K].

        0 where nothing, or one place alone, has been seen.
        """
        told = self.spread > _LEAST_SPREAD
        return np.where(told, -self.shared / np.where(told, self.spread, 1.0), 0.0)

    @property
    def level(self) -> FloatArray:
        """Where the line stands now, nats per token, [K]; NaN where nothing has been seen."""
        ahead = np.log(np.maximum(self.tokens, 1.0)) - self.place
        return np.where(self.known, self.loss - self.slope * ahead, np.nan)

    def state_dict(self, by_name: Callable[[FloatArray], dict[str, Any]]) -> dict[str, Any]:
        """Return it, JSON-able."""
        return {name: by_name(getattr(self, name)) for name in ("tokens", *_MOMENTS)}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], vector: Callable[[Mapping[str, Any]], FloatArray]
    ) -> Trend:
        """Return what :meth:`state_dict` gave."""
        return cls(**{name: vector(state[name]) for name in ("tokens", *_MOMENTS)})
