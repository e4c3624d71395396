"""Whole samples out of fractional shares, with the smallest lasting error.

In every step K domains are asked for ``weights × units`` units (G samples, or G/B
micro-batches, or one step) and get whole numbers of them.  A domain's *carry* is what it has
been asked for so far minus what it has been given.  The rule: one unit after the other goes to
the domain with the largest carry, which may thereby become negative.

**Bound.**  After every step, whatever the weights were, −1 < carry ≤ H_K − 1 < ln K, where
H_K = 1 + 1/2 + … + 1/K; so a domain's realised count stays within 1 + ln K of the asked one.

*From below.*  The carries sum to what is still to be given in this step.  While that is 1 or
more the largest carry is positive, and nothing else is lowered: a carry ends above 0 − 1.

*From above.*  Let a(k) be the mean of the k largest carries after a step; a(K) = 0.  Claim:
a(k) ≤ f(k) := 1/(k+1) + … + 1/K, so that the largest carry a(1) ≤ f(1) = H_K − 1.  It holds
before the first step.  Suppose it held one step ago; let A be the k largest carries now, and M
the m domains outside A that were given something in this step.  If m = 0, all units of the step
went into A, while at most all of what was asked was asked there: the mean over A has not risen.
Otherwise, when a domain of M got its last unit it had the largest carry of all; carries in A only
fell since; so it ends at most 1 below each of A, hence at most 1 below their mean a(k).  All
units went into A ∪ M, so the mean over these k+m is at most what the k+m largest were before,
f(k+m).  Together k·a(k) + m·(a(k) − 1) ≤ (k+m)·f(k+m), that is
a(k) ≤ f(k+m) + m/(k+m) ≤ f(k+m) + 1/(k+1) + … + 1/(k+m) = f(k).  ∎

The weights may be chosen by an adversary who sees every count: no step of the argument looks
at them.  Nor can any rule that does not see the future beat order ln K: an adversary asks 1/K
of each, then shares later units among those that have got nothing yet, whose carries grow by
1/K + 1/(K−1) + … .
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron.data.permutation import mix_array

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

#: A domain of weight zero whose carry is below this is owed nothing but rounding errors.
_NOTHING = 1e-6
_ABOVE_MINUS_ONE = 1.0 - 1e-9


def largest_carry(carry: Floats, units: int, ties: NDArray[np.uint64]) -> Counts:
    """Give ``units`` units one after the other, each to the domain with the largest carry.

    Computed at once: domain i offers the values carry_i, carry_i − 1, carry_i − 2, …, and the
    ``units`` largest values of all are taken.

    Args:
        carry: [K] what each domain is owed, this step included.
        units: how many to give.
        ties: [K] random numbers; between equal values the smaller one goes first.

    Returns:
        [K] counts that sum to ``units``.
    """
    whole = np.floor(carry).astype(np.int64)
    level = _level(whole, units)
    counts = np.maximum(whole - (level - 1), 0)
    rest = units - int(counts.sum())
    if rest:
        # Every domain offers at most one value in [level - 1, level), and enough of them do.
        counts[np.lexsort((ties, counts - carry))[:rest]] += 1
    return counts


def apportion(
    carry: Floats,
    weights: Floats,
    units: int,
    capacity: Counts | None,
    ties: NDArray[np.uint64],
) -> tuple[Counts, Floats]:
    """Give ``units`` units by :func:`largest_carry`, no domain more than it has left.

    What a domain is owed beyond its capacity passes to the others in proportion to their
    weights, so the carries still sum to zero.

    Args:
        carry: [K] what each domain is owed, this step included.
        weights: [K] sampling weights, sum 1.
        units: how many to give.
        capacity: [K] the most each may get; ``None`` for no limit.
        ties: see :func:`largest_carry`.

    Returns:
        [K] counts and [K] carries afterwards.

    Raises:
        ExhaustedError: the domains with a positive weight have not enough left together.
    """
    owed = carry.copy()
    counts = np.zeros(owed.size, dtype=np.int64)
    open_to = (weights > 0) | (owed > _NOTHING)
    while True:
        places = np.flatnonzero(open_to)
        if not places.size:
            raise ExhaustedError
        counts[places] = largest_carry(owed[places], units - _given(counts, open_to), ties[places])
        if capacity is None:
            break
        full = open_to & (counts > capacity)
        if not full.any():
            break
        counts[full] = capacity[full]
        open_to &= ~full
        shares = np.where(open_to, weights, 0.0)
        if not shares.any():
            raise ExhaustedError
        excess = float((owed[full] - counts[full]).sum())
        owed[full] = counts[full]
        owed += excess * shares / shares.sum()
    return counts, owed - counts


def sound_carry(carry: Floats) -> Floats:
    """Return carries to start from, near to ``carry``, for which the bounds above hold.

    They sum to zero, are above −1, and the mean of the k largest is at most f(k) for every k.
    All of this is linear, and nothing owed to anybody satisfies it: so shifting the carries to
    sum zero and shrinking them as much as needed does too.

    Args:
        carry: [K] of any sum.
    """
    owed = carry - carry.mean()
    count = owed.size
    means = np.cumsum(np.sort(owed)[::-1])[:-1] / np.arange(1, count)  # a(1) … a(K − 1)
    limits = np.cumsum(1.0 / np.arange(count, 1, -1))[::-1]  # f(1) … f(K − 1)
    excess = max(float((means / limits).max(initial=0.0)), -float(owed.min()) / _ABOVE_MINUS_ONE)
    sound: Floats = owed / max(excess, 1.0)
    return sound


class ExhaustedError(Exception):
    """No domain that may be drawn has samples left."""


def draw_multinomial(
    weights: Floats, uniforms: Floats, capacity: Counts | None, again: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Draw a domain for every unit independently.

    Args:
        weights: [K] sampling weights, sum 1.
        uniforms: [units] numbers in [0, 1).
        capacity: [K] the most units each domain may get; ``None`` for no limit.  Units drawn
            beyond it are drawn again among the domains with something left.
        again: [units] random words, independent of ``uniforms``, for drawing again.

    Returns:
        [units] domain per unit.

    Raises:
        ExhaustedError: the domains with a positive weight have not enough left together.
    """
    drawn = _pick(weights, uniforms)
    if capacity is None:
        return drawn
    weights = weights.copy()
    while True:
        order = np.argsort(drawn, kind="stable")
        counts = np.bincount(drawn, minlength=weights.size)
        rank = np.arange(drawn.size) - np.repeat(np.cumsum(counts) - counts, counts)
        beyond = order[rank >= capacity[drawn[order]]]
        if not beyond.size:
            return drawn
        weights[counts >= capacity] = 0.0
        if not weights.any():
            raise ExhaustedError
        again = mix_array(again)
        drawn[beyond] = _pick(weights, to_uniform(again[beyond]))


def to_uniform(raw: NDArray[np.uint64]) -> Floats:
    """Turn random 64-bit words into floats in [0, 1) with 53 random bits."""
    uniform: Floats = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def _pick(weights: Floats, uniforms: Floats) -> NDArray[np.int64]:
    cumulative = np.cumsum(weights)
    # "right" skips domains of weight zero; the division makes the last bound exactly 1.
    return np.searchsorted(cumulative / cumulative[-1], uniforms, side="right")


def _given(counts: Counts, open_to: NDArray[np.bool_]) -> int:
    return int(counts[~open_to].sum())


def _level(whole: Counts, units: int) -> int:
    """Return the smallest level at or above which at most ``units`` values are offered."""

    def offered(level: int) -> int:
        return int(np.maximum(whole - (level - 1), 0).sum())

    # When carries sum to the units to give, the level is nearly always 1.
    if offered(1) <= units < offered(0):
        return 1
    low, high = int(whole.min()) - units, int(whole.max()) + 1
    while low < high:
        middle = (low + high) // 2
        if offered(middle) <= units:
            high = middle
        else:
            low = middle + 1
    return low
