"""Fill in the middle: documents whose middle is moved to the end, so that a model learns to infill.

Bavarian et al. 2022 (arXiv 2207.14255).  A document is cut at two places into prefix, middle and
suffix and written, in PSM order, as ``<PRE> prefix <SUF> suffix <MID> middle``, or, in SPM order,
as ``<PRE> <SUF> suffix <MID> prefix middle`` (their section 3, the form that shares tokens with
PSM).  It is applied to what a window holds of a document (their context-level form), and every
piece keeps its length: what the three tokens take is cut off the end of the suffix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

from megatron.data.apportion import to_uniform
from megatron.data.permutation import hash_key

Level = Literal["character", "token"]
Unit = Literal["document", "window"]
UNKNOWN = "\ufffd"
_NUMBERS = 4
Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Text to ids and back, for cuts between characters.

    Attributes:
        encode: returns the ids of a text.
        decode: returns the text of ids; bytes that are no UTF-8 become U+FFFD.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


@dataclass(frozen=True, kw_only=True)
class Infilling:
    """What becomes of the training windows of a run.

    Attributes:
        rate: share of the pieces that are rearranged.
        spm_rate: share of those that are in SPM order.
        prefix: id of the token before the prefix.
        suffix: id of the token before the suffix.
        middle: id of the token before the middle.
        level: where cuts fall.  A piece whose text does not survive decoding and encoding is cut
            between tokens.
        unit: what is cut: each document, or the window as a whole.
        seed: of the run.
        eod: the end-of-document token, which stays at the end of a piece; None where there is
            none.
        codec: for cuts between characters.
    """

    rate: float
    spm_rate: float
    prefix: int
    suffix: int
    middle: int
    level: Level = "token"
    unit: Unit = "document"
    seed: int = 0
    eod: int | None = None
    codec: Codec | None = None

    @property
    def pads(self) -> bool:
        """Whether a piece may become shorter, so that padding follows it."""
        return self.level == "character"

    def facts(self) -> tuple[object, ...]:
        """Return what decides the outcome, for a fingerprint."""
        tokens = (self.prefix, self.suffix, self.middle, self.eod)
        return ("fim", self.rate, self.spm_rate, *tokens, self.level, self.unit, self.seed)

    def apply(
        self,
        tokens: NDArray[Any],
        starts: NDArray[np.int64],
        *,
        domain: str,
        epoch: int,
        sample: int,
    ) -> tuple[Ids, NDArray[np.bool_]]:
        """Rearrange one window; a pure function of (seed, domain, epoch, sample) and its tokens.

        Args:
            tokens: [n] ids.
            starts: ascending positions in [0, n) at which documents start.
            domain: the domain's name.
            epoch: pass over it.
            sample: place of the window in the epoch's order.

        Returns:
            Ids [n], and which of them are padding [n].
        """
        cuts = starts if self.unit == "document" else starts[:0]
        bounds = [0, *(cut for cut in cuts.tolist() if cut > 0), len(tokens)]
        key = np.array([hash_key("fim", self.seed, domain, epoch), sample], dtype=np.uint64)
        drawn = to_uniform(Philox(key=key).random_raw(_NUMBERS * (len(bounds) - 1)))
        chances = drawn.reshape(-1, _NUMBERS)
        result = tokens.astype(np.int64)
        padding = np.zeros(len(tokens), dtype=np.bool_)
        for number, (first, last) in enumerate(pairwise(bounds)):
            if chances[number, 0] < self.rate:
                self._piece(result, padding, first, last, chances[number, 1:])
        return result, padding

    def _piece(
        self,
        result: Ids,
        padding: NDArray[np.bool_],
        first: int,
        last: int,
        chances: NDArray[np.float64],
    ) -> None:
        """Rearrange ``result[first:last]`` in place, or leave it where the suffix is too short."""
        ended = self.eod is not None and last > first and result[last - 1] == self.eod
        room = last - first - ended
        before, middle, after = self._cut(result[first : first + room].tolist(), chances[1:])
        excess = len(before) + len(middle) + len(after) + 3 - room
        if excess > len(after):
            return
        after = after[: len(after) - excess] if excess > 0 else after
        if chances[0] < self.spm_rate:
            moved = [self.prefix, self.suffix, *after, self.middle, *before, *middle]
        else:
            moved = [self.prefix, *before, self.suffix, *after, self.middle, *middle]
        end = first + len(moved)
        result[first:end] = moved
        if ended and self.eod is not None:
            result[end] = self.eod
            end += 1
        result[end:last] = self.eod if self.eod is not None else 0
        padding[end:last] = True

    def _cut(
        self, ids: list[int], chances: NDArray[np.float64]
    ) -> tuple[list[int], list[int], list[int]]:
        if self.level == "character" and self.codec is not None:
            text = self.codec.decode(ids)
            low, high = _two(chances, len(text))
            parts = (text[:low], text[low:high], text[high:])
            encoded = [self.codec.encode(part) if part else [] for part in parts]
            same = all(
                self.codec.decode(own) == part for own, part in zip(encoded, parts, strict=True)
            )
            if same and UNKNOWN not in text:
                return encoded[0], encoded[1], encoded[2]
        low, high = _two(chances, len(ids))
        return ids[:low], ids[low:high], ids[high:]


def _two(chances: NDArray[np.float64], length: int) -> tuple[int, int]:
    """Return two cuts in [0, length], ascending, each drawn evenly."""
    one, other = (min(int(chance * (length + 1)), length) for chance in chances.tolist())
    return min(one, other), max(one, other)
