"""The largest size that fits, found by trying: doubled until it fails, then halved between."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], *, first: int = 1, most: int = 4096) -> int:
    """Return the largest size that fits; 0 if the first does not.

    Args:
        fits: whether a size does; true of all that are smaller than one that does.  Never asked
            twice about the same size.
        first: tried first, at least 1.
        most: no larger one is tried.
    """
    good, bad, size = 0, most + 1, min(first, most)
    while good < size < bad:
        if fits(size):
            good = size
        else:
            bad = size
        # Below the first that failed the middle, else twice the last.
        size = (good + bad) // 2 if bad <= most else min(2 * good, most)
    return good
