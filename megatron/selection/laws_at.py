"""Laws of gains at model sizes that were run, lie between them, or lie beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from megatron.errors import DataError
from megatron.selection.base import FloatArray
from megatron.selection.gains import Gain

_SAME: Final = 0.05
_LEAST_RATE: Final = 1e-12

MEASURED: Final = "measured"
BETWEEN: Final = "interpolated"
BEYOND: Final = "extrapolated"


@dataclass(frozen=True, kw_only=True, eq=False)
class LawAt:
    """A law of gains at a size.

    Attributes:
        law: (P0, λ, P̄).
        draws: laws that the runs allow, [R, 3].
        how: ``measured`` at this size; ``interpolated`` between two; or ``extrapolated``: the
            nearest size's, unchanged.
        seen: least and greatest compute of the runs, as a part of C_total.
    """

    law: FloatArray
    draws: FloatArray
    how: str
    seen: tuple[float, float]


def law_at(gains: Sequence[Gain], size: float) -> LawAt:
    """Return the law of one method at a size.

    Between two fitted sizes P0, P̄ and the logarithm of λ are linear in the size's logarithm.
    Beyond them the nearest is taken as it is: no law of sizes is fitted here, and P0 and P̄ are the
    same for all selectors there, so that selectors can be compared and sizes cannot.

    Args:
        gains: of one task and method.
        size: parameters.

    Raises:
        DataError: there is none.
    """
    order = sorted(gains, key=lambda gain: gain.size)
    near = [gain for gain in order if abs(gain.size / size - 1) < _SAME]
    if near:
        used, how = near[:1], MEASURED
        rows = np.concatenate((near[0].law[None], near[0].draws))
    else:
        rows = laws_along(gains, np.full(_rows(gains), size))
        after = sum(gain.size <= size for gain in order)
        used = order[max(0, after - 1) : after + 1]
        how = BETWEEN if len(used) == 2 else BEYOND
    seen = [(gain.flops.min() / gain.total, gain.flops.max() / gain.total) for gain in used]
    least, most = max(one[0] for one in seen), min(one[1] for one in seen)
    return LawAt(law=rows[0], draws=rows[1:], how=how, seen=(float(least), float(most)))


def laws_along(gains: Sequence[Gain], sizes: FloatArray) -> FloatArray:
    """Return n laws [n, 3], each at a size of its own: the fitted one, then n - 1 of the draws.

    Args:
        gains: of one task and method.
        sizes: parameters, [n]; at most one more than any of the gains has draws.
    """
    count = len(sizes)
    rows = [np.concatenate((gain.law[None], gain.draws))[:count] for gain in gains]
    return _along(gains, np.stack(rows), sizes)


def fitted_along(gains: Sequence[Gain], sizes: FloatArray) -> FloatArray:
    """Return the fitted law at each of some sizes, [sizes, 3]."""
    return _along(gains, np.stack([np.tile(gain.law, (len(sizes), 1)) for gain in gains]), sizes)


def _along(gains: Sequence[Gain], nodes: FloatArray, sizes: FloatArray) -> FloatArray:
    """Interpolate each of n laws of every gain, [gains, n, 3], at a size of its own, [n]."""
    order = sorted(range(len(gains)), key=lambda index: gains[index].size)
    nodes = nodes[order]
    nodes[..., 1] = np.log(np.maximum(nodes[..., 1], _LEAST_RATE))
    places = np.log([gains[index].size for index in order])
    position = np.interp(np.log(sizes), places, np.arange(len(order)))
    before = np.minimum(position.astype(np.int64), max(0, len(order) - 2))
    after = np.minimum(before + 1, len(order) - 1)
    way = (position - before)[:, None]
    row = np.arange(len(sizes))
    mixed = (1.0 - way) * nodes[before, row] + way * nodes[after, row]
    mixed[:, 1] = np.exp(mixed[:, 1])
    return np.asarray(mixed)


def _rows(gains: Sequence[Gain]) -> int:
    if not gains:
        raise DataError("a selector without a fitted law cannot be planned with")
    return 1 + min(len(gain.draws) for gain in gains)
