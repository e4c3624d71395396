"""Where the samples of a domain lie: windows of S+1 tokens, S apart, cut anew in every epoch."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, kw_only=True)
class EpochWindows:
    """The windows of one epoch, numbered through all segments.

    Attributes:
        count: number of windows.
        ends: per segment, the number of windows in it and all before it.
        firsts: per segment, the token within it at which its first window starts.
        seq_length: S.
    """

    count: int
    ends: tuple[int, ...]
    firsts: tuple[int, ...]
    seq_length: int

    def locate(self, window: int) -> tuple[int, int]:
        """Return ``(segment, token within the segment)`` at which ``window`` starts."""
        if not 0 <= window < self.count:
            raise IndexError(f"window {window} of {self.count}")
        segment = bisect_right(self.ends, window)
        before = self.ends[segment - 1] if segment else 0
        return segment, self.firsts[segment] + (window - before) * self.seq_length


@dataclass(frozen=True, kw_only=True)
class WindowGrid:
    """The arithmetic of windows over segments of tokens that no window may cross.

    Window i of a segment covers tokens ``[o + i·S, o + i·S + S + 1)`` of it: neighbours share
    one token, which is the last target of the one and the first input of the other.  The
    offset o in [0, S) moves the cuts between epochs.  A segment that holds one window only
    keeps it: its offset stays within the tokens it has to spare.

    Attributes:
        lengths: tokens per segment (a prefix, or a split of one).
        seq_length: S.
    """

    lengths: tuple[int, ...]
    seq_length: int

    def epoch(self, offset: int) -> EpochWindows:
        """Return the windows of an epoch whose cuts are moved by ``offset`` tokens."""
        placed = [_place(length, self.seq_length, offset) for length in self.lengths]
        ends = tuple(accumulate(count for count, _ in placed))
        return EpochWindows(
            count=ends[-1] if ends else 0,
            ends=ends,
            firsts=tuple(first for _, first in placed),
            seq_length=self.seq_length,
        )

    @property
    def fixed_count(self) -> int | None:
        """The number of windows if no offset changes it, else ``None``."""
        loses = [
            (length - 1) // self.seq_length > 1
            and (length - 1) % self.seq_length < self.seq_length - 1
            for length in self.lengths
        ]
        return None if any(loses) else self.epoch(0).count


def _place(length: int, seq_length: int, offset: int) -> tuple[int, int]:
    """Return the number of windows in a segment and the token at which the first starts."""
    count, spare = divmod(length - 1, seq_length)
    if count <= 0:
        return 0, 0
    first = offset if count > 1 else offset % (spare + 1)
    return (length - 1 - first) // seq_length, first
