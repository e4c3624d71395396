"""Arithmetic on the probability simplex, in float64 and safe against overflow."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from megatron.mixing.observation import FloatArray

TOLERANCE: Final = 1e-12
"""How far a distribution's sum may be from 1."""
LARGEST: Final = float(np.finfo(np.float64).max)
LOSS_CLIP: Final = 50.0
"""Nats at which a loss is cut before it is exponentiated."""


def saturate(values: FloatArray) -> FloatArray:
    """Replace infinities by the largest finite number of the same sign."""
    return np.clip(values, -LARGEST, LARGEST)


def is_distribution(p: FloatArray) -> bool:
    """Whether ``p`` is finite, at least 0 and sums to 1 within :data:`TOLERANCE`."""
    return bool(np.isfinite(p).all() and (p >= 0).all() and abs(p.sum() - 1.0) <= TOLERANCE)


def normalise(weights: FloatArray) -> FloatArray:
    """Scale weights that are finite, at least 0 and not all 0 to sum 1.

    Weights whose sum overflows, or is too small to divide by exactly, are scaled by
    their maximum first; every other vector is divided by its sum and nothing else.
    """
    with np.errstate(over="ignore"):
        total = weights.sum()
    if not np.isfinite(total) or total < np.finfo(np.float64).tiny:
        weights = weights / weights.max()
        total = weights.sum()
    return np.asarray(weights / total, dtype=np.float64)


def softmax(scores: FloatArray) -> FloatArray:
    """Return exp(scores) / sum exp(scores), shifted by the maximum, for any finite scores."""
    with np.errstate(over="ignore", under="ignore"):
        exponentials = np.exp(scores - scores.max())
    return normalise(exponentials)


def exploration_rate(step: int, domains: int) -> float:
    """Return the bandits' exploration rate: min(1/K, sqrt(ln K / (K t))), and 1/K for t = 0.

    Source: ODM (arXiv 2312.02406), section 3, after Exp3.
    """
    if step < 1:
        return 1.0 / domains
    return min(1.0 / domains, math.sqrt(math.log(domains) / (domains * step)))


def explore(p: FloatArray, epsilon: float) -> FloatArray:
    """Return (1 - K eps) p + eps, normalised: every domain keeps at least eps."""
    share = max(0.0, 1.0 - len(p) * epsilon)  # K * (1/K) may round to more than 1
    return normalise(share * p + epsilon)


def project(p: FloatArray, floor: FloatArray, ceiling: FloatArray) -> FloatArray:
    """Return the point nearest to ``p`` with floor <= x <= ceiling and sum 1 (Euclidean).

    The solution is clip(p - tau, floor, ceiling) for the tau at which it sums to 1;
    that sum falls piecewise linearly in tau, so tau is found exactly: bisect over the
    breakpoints, then solve the linear piece.  A ``p`` that already satisfies all of it
    comes back bit for bit.

    Args:
        p: finite values, [K].
        floor: lower bounds, [K], sum at most 1.
        ceiling: upper bounds, [K], sum at least 1.
    """
    if (p >= floor).all() and (p <= ceiling).all() and abs(p.sum() - 1.0) <= TOLERANCE:
        return p
    breakpoints = np.sort(np.concatenate((p - ceiling, p - floor)))
    low, high = 0, len(breakpoints) - 1  # the sum is >= 1 at low and <= 1 at high
    while high - low > 1:
        middle = (low + high) // 2
        if np.clip(p - breakpoints[middle], floor, ceiling).sum() >= 1.0:
            low = middle
        else:
            high = middle
    centre = 0.5 * (breakpoints[low] + breakpoints[high])
    shifted = p - centre
    free = (shifted > floor) & (shifted < ceiling)
    nearest = np.clip(shifted, floor, ceiling)
    if free.any():
        rest = 1.0 - nearest[~free].sum()
        tau = (p[free].sum() - rest) / free.sum()
        nearest[free] = np.clip(p[free] - tau, floor[free], ceiling[free])
    return _settle(nearest, floor, ceiling)


def _settle(p: FloatArray, floor: FloatArray, ceiling: FloatArray) -> FloatArray:
    """Spread the last rounding error of a projection over the domains that have room for it."""
    for _ in range(3):
        missing = 1.0 - p.sum()
        if abs(missing) <= TOLERANCE / 10:
            break
        room = ceiling - p if missing > 0 else p - floor
        total = room.sum()
        if total <= 0:
            break
        p = np.clip(p + room * (missing / total), floor, ceiling)
    return p
