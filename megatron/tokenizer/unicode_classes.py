"""Character classes as the regex engine inside ``tokenizers`` sees them.

Unicode grows: a letter of Unicode 16 is unassigned to a Python built with Unicode 14.
Asking the engine itself, instead of ``unicodedata``, makes the question of versions vanish.
"""

from __future__ import annotations

from functools import cache

from megatron.errors import MissingExtraError

Ranges = tuple[tuple[int, int], ...]

ASCII_END = 0x80
BMP_END = 0x10000
ALL_END = 0x110000
TIERS = (ASCII_END, BMP_END, ALL_END)
# What each tier adds to the one before.  Planes 0 to 3 hold every assigned character but the
# tags and variation selectors of plane 14.
_BLOCKS = {
    ASCII_END: ((0x0, 0x80),),
    BMP_END: ((0x80, 0xD800), (0xE000, 0x10000)),
    ALL_END: ((0x10000, 0x40000), (0xE0000, 0xE0200)),
}


class UnknownClassError(ValueError):
    """The engine does not know a class."""


def tier_of(text: str) -> int:
    """Return the smallest of :data:`TIERS` above all of a text's code points."""
    if text.isascii():
        return ASCII_END
    if len(text.encode("utf-16-le", "surrogatepass")) == 2 * len(text):
        return BMP_END
    return ALL_END


def class_ranges(escape: str, end: int) -> Ranges:
    r"""Return the code points of a class below ``end`` as half-open ranges.

    Args:
        escape: the class as a pattern writes it: ``\p{L}``, ``\s``, ``\d`` …
        end: one of :data:`TIERS`.

    Raises:
        UnknownClassError: the engine refuses it.
    """
    return tuple(found for tier in TIERS if tier <= end for found in _ranges_of_tier(escape, tier))


def clip(ranges: Ranges, end: int) -> Ranges:
    """Return the part of ``ranges`` below the code point ``end``."""
    return tuple((low, min(high, end)) for low, high in ranges if low < end)


@cache
def _ranges_of_tier(escape: str, tier: int) -> Ranges:
    try:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import Split
    except ImportError:
        raise MissingExtraError("tokenizers", "train", "a byte-level BPE") from None
    text = "".join("".join(map(chr, range(low, high))) for low, high in _BLOCKS[tier])
    try:
        # Removing the class leaves the runs of its complement, so the gaps are the class.
        kept = Split(Regex(f"{escape}+"), "removed").pre_tokenize_str(text)
    except Exception as error:  # the binding raises Exception itself
        raise UnknownClassError(f"{escape}: {error}") from error
    found: list[tuple[int, int]] = []
    position = 0
    for _, (start, stop) in [*kept, ("", (len(text), len(text)))]:
        if start > position:
            found.extend(_code_points(position, start, tier))
        position = stop
    return tuple(found)


def _code_points(start: int, stop: int, tier: int) -> list[tuple[int, int]]:
    """Map a run of positions in the probe text to ranges of code points."""
    found = []
    offset = 0
    for low, high in _BLOCKS[tier]:
        length = high - low
        first, last = max(start, offset), min(stop, offset + length)
        if first < last:
            found.append((low + first - offset, low + last - offset))
        offset += length
    return found
