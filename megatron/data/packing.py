"""Windows of whole documents: as many as fit, or one each, instead of cuts through the stream.

``pack_until_overflow`` puts documents that lie next to each other into one window until the next
would not fit; ``unpacked`` gives every document a window of its own.  What is left of a window is
padding that no loss counts.  Windows are ranges of the stream, found from the documents' sizes
when the data is opened (ten million documents take a second, and 12 bytes a window): nothing is
cached on disk, so nothing can be stale, and every rank finds the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

PackImpl = Literal["packed", "pack_until_overflow", "unpacked"]
_SHORTEST: Final = 2
"""Tokens of a window: one that is read and one that is predicted."""


@dataclass(frozen=True, kw_only=True)
class DocumentWindows:
    """The windows of a domain, numbered through all segments; the same in every epoch.

    Attributes:
        count: number of windows.
        ends: per segment, the number of windows in it and all before it.
        starts: per segment, [n] tokens of the segment before each of its windows.
        lengths: per segment, [n] tokens of each of its windows, 2 to S + 1.
    """

    count: int
    ends: tuple[int, ...]
    starts: tuple[NDArray[np.int64], ...]
    lengths: tuple[NDArray[np.int32], ...]

    def locate(self, window: int) -> tuple[int, int]:
        """Return ``(segment, token within the segment)`` at which ``window`` starts."""
        segment, place = self._place(window)
        return segment, int(self.starts[segment][place])

    def length(self, window: int) -> int:
        """Return the number of tokens of ``window``."""
        segment, place = self._place(window)
        return int(self.lengths[segment][place])

    def _place(self, window: int) -> tuple[int, int]:
        if not 0 <= window < self.count:
            raise IndexError(f"window {window} of {self.count}")
        segment = bisect_right(self.ends, window)
        return segment, window - (self.ends[segment - 1] if segment else 0)


def document_windows(
    sizes: Sequence[NDArray[Any]], *, seq_length: int, pack_impl: PackImpl, allow_chopped: bool
) -> DocumentWindows:
    """Lay out the windows of several segments.

    Args:
        sizes: per segment, tokens of each document.
        seq_length: S; a window holds S + 1 tokens.
        pack_impl: ``pack_until_overflow`` or ``unpacked``.
        allow_chopped: cut a document of more than S + 1 tokens off behind them; ``False`` leaves
            it out.
    """
    limit = seq_length + 1
    found = [
        _pack(part, limit, allow_chopped)
        if pack_impl == "pack_until_overflow"
        else _each(part, limit, allow_chopped)
        for part in sizes
    ]
    ends = tuple(accumulate(len(starts) for starts, _ in found))
    return DocumentWindows(
        count=ends[-1] if ends else 0,
        ends=ends,
        starts=tuple(starts for starts, _ in found),
        lengths=tuple(lengths for _, lengths in found),
    )


def _each(
    sizes: NDArray[Any], limit: int, chop: bool
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    wide = sizes.astype(np.int64)
    kept = (wide >= _SHORTEST) & (chop | (wide <= limit))
    return (np.cumsum(wide) - wide)[kept], np.minimum(wide, limit)[kept].astype(np.int32)


def _pack(
    sizes: NDArray[Any], limit: int, chop: bool
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Fill windows from the front: each takes documents until the next would not fit.

    A document that is too long stands alone, and ends the window before it.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    begins = ends - sizes
    # Per document: the first that would not fit into a window that starts with it.
    following = np.searchsorted(ends, begins + limit, side="right")
    following = np.maximum(following, np.arange(1, len(sizes) + 1)).tolist()
    firsts, document = [], 0
    while document < len(sizes):
        firsts.append(document)
        document = following[document]
    first = np.array(firsts, dtype=np.int64)
    starts = begins[first]
    lengths = np.diff(np.append(starts, ends[-1] if len(ends) else 0))
    kept = (lengths >= _SHORTEST) & (chop | (lengths <= limit))
    return starts[kept], np.minimum(lengths, limit)[kept].astype(np.int32)
