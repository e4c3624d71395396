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


# No character is in two of these.
_DISJOINT = (r"\p{L}", r"\p{N}", r"\s")


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
    text = "".join("".join(map(chr, range(low, high))) for low, high in _BLOCKS[tier])
    if escape not in _DISJOINT:
        return tuple(r for run in _runs(escape, text) for r in _code_points(*run, tier))
    # The usual three are asked for at once: the engine's time goes by the length of the text.
    runs = _all_runs(tier)
    own = _runs(escape, "".join(text[start] for start, _ in runs))
    chosen = [runs[i] for start, stop in own for i in range(start, stop)]
    return tuple(r for run in chosen for r in _code_points(*run, tier))


@cache
def _all_runs(tier: int) -> tuple[tuple[int, int], ...]:
    """Cut a tier's text wherever one of the disjoint classes starts or ends."""
    text = "".join("".join(map(chr, range(low, high))) for low, high in _BLOCKS[tier])
    pieces = _split("|".join(f"{escape}+" for escape in _DISJOINT), "isolated", text)
    return tuple(place for _, place in pieces)


def _runs(escape: str, text: str) -> list[tuple[int, int]]:
    """Return the runs of a class in a text: the gaps that removing it leaves."""
    found = []
    position = 0
    for _, (start, stop) in [*_split(f"{escape}+", "removed", text), ("", (len(text), len(text)))]:
        if start > position:
            found.append((position, start))
        position = stop
    return found


def _split(pattern: str, behavior: str, text: str) -> list[tuple[str, tuple[int, int]]]:
    try:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import Split
    except ImportError:
        raise MissingExtraError("tokenizers", "train", "a byte-level BPE") from None
    try:
        return list(Split(Regex(pattern), behavior).pre_tokenize_str(text))
    except Exception as error:  # the binding raises Exception itself
        raise UnknownClassError(f"{pattern}: {error}") from error


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
