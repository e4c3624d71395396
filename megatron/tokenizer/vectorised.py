"""GPT-2's splitting and the lookup of its pieces for a whole batch of texts in NumPy.

A piece of up to 16 bytes is its own exact key: two 64-bit words.  A table row of 32 bytes holds
key, ids and their number, so that a piece costs one cache line and no Python object.  Pieces
that the table does not hold come from a function, and enter it.

Only ASCII is split here.  What lies around other characters, from one space between two
ASCII words to the next, is given to a function whole: at such a space every piece ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.tokenizer.unicode_classes import ASCII_END, class_ranges

Words = NDArray[np.uint64]
Places = NDArray[np.int64]
PiecesEncoder = Callable[[Sequence[bytes]], tuple[NDArray[Any], Places]]

BATCH_CHARACTERS = 1 << 18
_TABLE_BITS = 20  # 32 MiB
_ROW_BYTES = 32
_KEY_BYTES = 16
_LETTER, _NUMBER, _OTHER, _SPACE, _END, _FOREIGN = range(6)
_SHIFT = np.uint64(64 - _TABLE_BITS)
_MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_ONES = 2**64 - 1
# Which bytes of the two words belong to a piece, by its length; longer pieces have no key.
_TOO_LONG = _KEY_BYTES + 1
_BYTES = [(1 << 8 * count) - 1 for count in range(9)]
_FIRST = np.array([*_BYTES, *[_ONES] * 9], dtype=np.uint64)
_SECOND = np.array([*[0] * 9, *_BYTES[1:], 0], dtype=np.uint64)
_APOSTROPHE, _BLANK = ord("'"), ord(" ")
_ONE_LETTER = np.isin(np.arange(256), list(b"stmd"))
_TWO_LETTERS = (b"re", b"ve", b"ll")


class BatchEncoder:
    """Encodes texts without NUL by GPT-2's pattern."""

    def __init__(
        self,
        encode_pieces: PiecesEncoder,
        encode_stretch: Callable[[str], bytes],
        dtype: np.dtype[Any],
    ) -> None:
        """Make an empty table.

        Args:
            encode_pieces: gives the ids of ASCII pieces end to end, and how many each has.
            encode_stretch: gives those of several pieces, with any characters, as bytes.
            dtype: little-endian token type of two or four bytes.
        """
        self._encode_pieces = encode_pieces
        self._encode_stretch = encode_stretch
        self._dtype = dtype
        self._base = _KEY_BYTES // dtype.itemsize
        self._most_ids = _KEY_BYTES // dtype.itemsize - 1  # the last place holds their number
        self._table = np.zeros((1 << _TABLE_BITS, _ROW_BYTES // 8), dtype=np.uint64)
        # No ASCII piece has this key.  Row 0 is the end of a text: the key 0, and no ids.
        self._table[1:, 0] = _ONES
        self._classes = _class_table()

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as bytes.

        Args:
            texts: without NUL, none empty; together about ``BATCH_CHARACTERS``.
        """
        text = ("\0".join(texts) + "\0").encode("utf-8")
        raw = text + bytes(_KEY_BYTES)
        data = np.frombuffer(raw, dtype=np.uint8)[: len(text)]
        classes = np.frombuffer(raw.translate(self._classes), dtype=np.uint8)[: len(text)]
        marks = _piece_starts(data, classes)
        foreign = _mark_foreign(classes, data, marks)
        starts = np.flatnonzero(marks)
        lengths = np.diff(starts, append=len(text))
        keyed = np.minimum(lengths, _TOO_LONG)
        is_foreign = np.zeros(starts.size, dtype=bool)
        is_foreign[np.searchsorted(starts, foreign)] = True
        keyed[is_foreign] = _TOO_LONG
        rows, known, place = self._look_up(raw, starts, keyed)
        long_pieces = self._fill_stretches(text, starts, lengths, rows, is_foreign)
        missing = np.flatnonzero(~(known | is_foreign))
        if missing.size:
            begins = starts[missing]
            ends = begins + lengths[missing]
            pieces = [text[a:b] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]
            ids, sizes = self._encode_pieces(pieces)
            long_pieces += self._fill(ids, sizes, rows, missing)
            kept = missing[(sizes <= self._most_ids) & (keyed[missing] < _TOO_LONG)]
            kept = kept[place[kept] != 0]
            self._table[place[kept]] = rows[kept]
        tokens = rows.view(self._dtype)
        counts = tokens[:, -1].astype(np.int64)
        for piece, ids in long_pieces:
            counts[piece] = ids.size
        ends = np.cumsum(counts)
        out = self._emit(tokens, counts, ends - counts, long_pieces)
        return _cut(out, ends[data[starts] == 0].tolist())

    def _fill_stretches(
        self,
        text: bytes,
        starts: Places,
        lengths: Places,
        rows: Words,
        is_foreign: NDArray[np.bool_],
    ) -> list[tuple[int, NDArray[Any]]]:
        """Put the ids of what is not split here into their rows; return what fits no row."""
        pieces = np.flatnonzero(is_foreign)
        if not pieces.size:
            return []
        begins = starts[pieces]
        ends = begins + lengths[pieces]
        found = [
            self._encode_stretch(text[start:stop].decode())
            for start, stop in zip(begins.tolist(), ends.tolist(), strict=True)
        ]
        sizes = np.fromiter(map(len, found), np.int64, len(found)) // self._dtype.itemsize
        return self._fill(np.frombuffer(b"".join(found), self._dtype), sizes, rows, pieces)

    def _look_up(
        self, raw: bytes, starts: Places, lengths: Places
    ) -> tuple[Words, NDArray[np.bool_], Places]:
        """Return each piece's table row, whether it is the piece's own, and its place."""
        words = np.ndarray((len(raw) - 7,), dtype="<u8", buffer=raw, strides=(1,))
        first, second = words[starts], words[starts + 8]
        first &= _FIRST[lengths]
        second &= _SECOND[lengths]
        mixed = second * _MIX_2
        mixed ^= first
        mixed *= _MIX_1
        mixed >>= _SHIFT
        place = mixed.view(np.int64)
        rows = np.take(self._table, place, axis=0)
        known = rows[:, 0] == first
        known &= rows[:, 1] == second
        known &= lengths < _TOO_LONG
        unknown = np.flatnonzero(~known)
        rows[unknown, 0], rows[unknown, 1] = first[unknown], second[unknown]
        return rows, known, place

    def _fill(
        self, ids: NDArray[Any], sizes: Places, rows: Words, pieces: Places
    ) -> list[tuple[int, NDArray[Any]]]:
        """Put ids into the rows of pieces; return what fits no row."""
        offsets = np.cumsum(sizes) - sizes
        tokens = rows.view(self._dtype)
        fits = sizes <= self._most_ids
        for index in range(self._most_ids):
            chosen = np.flatnonzero(fits & (sizes > index))
            tokens[pieces[chosen], self._base + index] = ids[offsets[chosen] + index]
        tokens[pieces, -1] = np.where(fits, sizes, 0)
        return [
            (int(pieces[i]), ids[offsets[i] : offsets[i] + sizes[i]])
            for i in np.flatnonzero(~fits).tolist()
        ]

    def _emit(
        self,
        tokens: NDArray[Any],
        counts: Places,
        positions: Places,
        long_pieces: list[tuple[int, NDArray[Any]]],
    ) -> NDArray[Any]:
        total = int(positions[-1] + counts[-1])
        out = np.empty(total + 1, dtype=self._dtype)
        # An end of text writes where the next piece, or the spare last place, comes to lie:
        # of several writes to one place the last one stays.
        out[positions] = tokens[:, self._base]
        left = np.flatnonzero(counts > 1)
        for index in range(1, self._most_ids):
            if not left.size:
                break
            out[positions[left] + index] = tokens[left, self._base + index]
            left = left[counts[left] > index + 1]
        for piece, ids in long_pieces:
            out[positions[piece] : positions[piece] + ids.size] = ids
        return out[:total]


def _piece_starts(data: NDArray[np.uint8], classes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    r"""Mark where GPT-2's pattern starts a piece.

    A run of one class is a piece, but: the last of several white-space characters before
    something else is cut off (``\s+(?!\S)``), and joins it if it is a blank (`` ?``); and an
    apostrophe that starts a piece takes the letters of a contraction with it.
    """
    starts = np.empty(data.size, dtype=bool)
    starts[0] = True
    np.not_equal(classes[1:], classes[:-1], out=starts[1:])
    before_word = (classes[:-1] == _SPACE) & (classes[1:] < _SPACE)
    starts[:-1] |= before_word
    before_word &= data[:-1] == _BLANK
    starts[1:] &= ~before_word
    apostrophes = np.flatnonzero(data == _APOSTROPHE)
    apostrophes = apostrophes[starts[apostrophes]]
    if apostrophes.size:
        last = data.size - 1
        one, two = (data[np.minimum(apostrophes + step, last)] for step in (1, 2))
        short = apostrophes[_ONE_LETTER[one]]
        starts[short + 1], starts[short + 2] = False, True
        for pair in _TWO_LETTERS:
            long = apostrophes[(one == pair[0]) & (two == pair[1])]
            starts[long + 1] = starts[long + 2] = False
            starts[long + 3] = True
    return starts


def _mark_foreign(
    classes: NDArray[np.uint8], data: NDArray[np.uint8], starts: NDArray[np.bool_]
) -> Places:
    """Make each stretch around characters beyond ASCII one piece; return where they start."""
    places = np.flatnonzero(classes == _FOREIGN)
    if not places.size:
        return places
    at_space = (data[1:-1] == _BLANK) & (classes[:-2] <= _NUMBER) & (classes[2:] == _LETTER)
    ends_of_text = np.flatnonzero(data == 0)
    cuts = np.concatenate([[0], np.flatnonzero(at_space) + 1, ends_of_text, ends_of_text + 1])
    cuts.sort()
    stretch = np.unique(np.searchsorted(cuts, places, side="right") - 1)
    first, last = cuts[stretch], cuts[stretch + 1]
    depth = np.zeros(data.size + 1, dtype=np.int8)
    depth[first + 1] += 1
    depth[last] -= 1
    starts &= np.cumsum(depth[:-1], dtype=np.int8) == 0
    return first


def _class_table() -> bytes:
    """Return each byte's class, as the engine of ``tokenizers`` sees ASCII."""
    table = bytearray([_OTHER] * 0x80 + [_FOREIGN] * 0x80)
    for escape, of_class in ((r"\p{L}", _LETTER), (r"\p{N}", _NUMBER), (r"\s", _SPACE)):
        for low, high in class_ranges(escape, ASCII_END):
            table[low:high] = bytes([of_class]) * (high - low)
    table[0] = _END
    return bytes(table)


def _cut(out: NDArray[Any], ends: list[int]) -> list[bytes]:
    stored = out.tobytes()
    itemsize = out.dtype.itemsize
    cut, start = [], 0
    for end in ends:
        cut.append(stored[start : end * itemsize])
        start = end * itemsize
    return cut
