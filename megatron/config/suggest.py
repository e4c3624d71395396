"""The known name that a misspelt one was meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def edit_distance(first: str, second: str, limit: int) -> int:
    """Count the insertions, deletions, substitutions and swaps between two texts.

    Returns:
        The optimal-string-alignment distance, or ``limit + 1`` if it is larger than ``limit``.
    """
    if abs(len(first) - len(second)) > limit:
        return limit + 1
    before: list[int] = []
    previous = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        current = [i]
        for j, b in enumerate(second, 1):
            best = min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and first[i - 2] == b:
                best = min(best, before[j - 2] + 1)
            current.append(best)
        if min(current) > limit:
            return limit + 1
        before, previous = previous, current
    return min(previous[-1], limit + 1)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name nearest to ``name``, or ``None`` if none is near.

    Near is one edit for every three letters (at least one), whatever the case; of names equally
    far the one that shares the longest stretches wins, then the one listed first.
    """
    name = name.lower()
    candidates = list(known)
    longest = max(1, len(name) // 3)
    for limit in range(1, longest + 1):
        near = [c for c in candidates if edit_distance(name, c.lower(), limit) <= limit]
        if near:
            return max(near, key=lambda c: SequenceMatcher(None, name, c.lower()).ratio())
    return None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known name, or an empty text."""
    found = nearest(name, known)
    return f"; did you mean '{found}'?" if found else ""
