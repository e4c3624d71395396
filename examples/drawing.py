"""From a distribution over domains to the samples of a step, in a loop that is not neomix's own.

The controllers say how likely each domain is; a loop has to turn that into whole samples.
:class:`Draw` does, from a seed and a few numbers of state, so that a resumed run draws what the
interrupted one would have drawn.  It needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class Draw:
    """Draws samples: (domain, index within the domain), every domain in shuffled passes.

    Args:
        sizes: samples of each domain, in the order of the controller's domains.
        seed: of the shuffles and of random draws.
        multinomial: draw counts at random, as importance-weighted methods assume (``odm``,
            ``exp3``); otherwise counts follow the distribution as closely as whole numbers
            can, what a step owes going to the next.
    """

    def __init__(self, sizes: Sequence[int], *, seed: int, multinomial: bool) -> None:
        """Start at the beginning of every domain."""
        self._sizes, self._seed, self._multinomial = list(sizes), seed, multinomial
        self.seen = np.zeros(len(sizes), dtype=np.int64)
        """Samples drawn from each domain so far, [K]."""
        self._owed = np.zeros(len(sizes))

    def step(
        self, step: int, weights: FloatArray, size: int, *, fresh_quota: bool = False
    ) -> list[tuple[int, int]]:
        """Return the samples of a step, in a random order.

        Args:
            step: its number.
            weights: the decision's ``sampling_weights``, [K].
            size: samples to draw.
            fresh_quota: whether the decision opens a block of its own (``fresh_quota``): what
                is owed from before is forgotten, so that the block realises its mixture.
        """
        random = np.random.default_rng([self._seed, step])
        if self._multinomial:
            counts = random.multinomial(size, weights / weights.sum())
        else:
            counts = self._apportioned(weights, size, fresh=fresh_quota)
        domains = random.permutation(np.repeat(np.arange(len(counts)), counts))
        return [(int(domain), self._next(int(domain))) for domain in domains]

    def _apportioned(self, weights: FloatArray, size: int, *, fresh: bool) -> IntArray:
        owed = size * weights + (0.0 if fresh else self._owed)
        counts = np.maximum(np.floor(owed), 0).astype(np.int64)
        while counts.sum() < size:
            counts[np.argmax(owed - counts)] += 1
        while counts.sum() > size:
            counts[np.argmin(np.where(counts > 0, owed - counts, np.inf))] -= 1
        self._owed = owed - counts
        return counts

    def _next(self, domain: int) -> int:
        """Return the next index of a domain; each pass over it has an order of its own."""
        epoch, place = divmod(int(self.seen[domain]), self._sizes[domain])
        self.seen[domain] += 1
        order = np.random.default_rng([self._seed, domain, epoch]).permutation(self._sizes[domain])
        return int(order[place])

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able."""
        return {"seen": self.seen.tolist(), "owed": self._owed.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.seen = np.array(state["seen"], dtype=np.int64)
        self._owed = np.array(state["owed"], dtype=np.float64)
