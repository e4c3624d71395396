"""Merging pieces of text into ids: one after the other with a memory, or many in one call."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron.tokenizer.bytelevel import ByteLevelBPE, ByteWriting
from megatron.tokenizer.pattern import NotUnderstoodError
from megatron.tokenizer.vectorised import PiecesEncoder

if TYPE_CHECKING:
    import tokenizers

_LONGEST_CACHED = 64
_NATIVE_LITTLE = np.dtype("<u2") == np.dtype("=u2")

PieceEncoder = Callable[[str], list[int]]


class PieceCache(dict[str, bytes]):
    """Ids of a piece as stored bytes; computes what it does not hold."""

    def __init__(self, encode: PieceEncoder, dtype: np.dtype[Any], limit: int) -> None:
        """Begin empty; hold ``limit`` pieces at most."""
        super().__init__()
        self._encode = encode
        self._dtype = dtype
        self._limit = limit

    def __missing__(self, piece: str) -> bytes:
        """Encode a piece and remember it."""
        found = stored(self._encode(piece), self._dtype)
        if len(piece) <= _LONGEST_CACHED:
            if len(self) >= self._limit:
                self.clear()
            self[piece] = found
        return found


def stored(ids: Sequence[int], dtype: np.dtype[Any]) -> bytes:
    """Return ids as bytes of ``dtype`` (little-endian)."""
    if dtype.str == "<u2" and _NATIVE_LITTLE:
        return array("H", ids).tobytes()
    return np.asarray(ids, dtype=dtype).tobytes()


Ranks = tuple[dict[bytes, int], list[int]]
"""The rank of each byte string that merging makes, and the id of each rank."""


def all_at_once(ranks: Ranks, dtype: np.dtype[Any]) -> PiecesEncoder:
    """Return what merges many pieces in one call of ``tiktoken``.

    A text of them with NUL between is cut by a pattern for the purpose; NUL is a token of its own
    and in no piece.
    """
    import tiktoken

    merger = tiktoken.Encoding(
        "pieces", pat_str="[^\0]+|\0", mergeable_ranks=ranks[0], special_tokens={}
    )
    nul, by_rank = ranks[0][b"\0"], np.array(ranks[1], dtype=dtype)

    def encode(pieces: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        found = merger.encode_to_numpy(b"\0".join(pieces).decode("ascii"))
        is_id = found != nul
        ends = np.append(np.flatnonzero(~is_id), found.size)
        sizes = np.diff(ends, prepend=-1) - 1
        return by_rank[found[is_id]], sizes

    return encode


def one_by_one(cache: PieceCache, dtype: np.dtype[Any]) -> PiecesEncoder:
    """Return what looks pieces up in a cache, one after the other."""

    def encode(pieces: Sequence[bytes]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        found = [cache[piece.decode("ascii")] for piece in pieces]
        sizes = np.fromiter(map(len, found), np.int64, len(found)) // dtype.itemsize
        return np.frombuffer(b"".join(found), dtype), sizes

    return encode


def piece_encoder(
    parts: ByteLevelBPE, tokenizer: tokenizers.Tokenizer
) -> tuple[PieceEncoder, str, Ranks | None]:
    """Return the function that merges one piece, and the library's name.

    Where merging is all there is to a piece, also the ranks of byte strings, and the id of each.
    """
    try:
        import tiktoken
    except ImportError:
        return _tokenizers_piece_encoder(tokenizer), "tokenizers", None
    ranks = {bytes((byte,)): byte for byte in range(256)}
    ids = list(parts.byte_ids)
    for left, right, token in parts.merges:
        if left + right not in ranks:
            ranks[left + right] = len(ids)
            ids.append(token)
    merger = tiktoken.Encoding(
        "byte-level", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={}
    )
    whole_words = parts.whole_words

    def encode(piece: str) -> list[int]:
        if whole_words and (word := whole_words.get(piece.encode())) is not None:
            return [word]
        return [ids[rank] for rank in merger.encode_ordinary(piece)]

    _check_reachable(parts, tokenizer)
    return encode, "tiktoken", None if whole_words else (ranks, ids)


def _tokenizers_piece_encoder(tokenizer: tokenizers.Tokenizer) -> PieceEncoder:
    model = tokenizer.model
    write = ByteWriting().write

    def encode(piece: str) -> list[int]:
        return [token.id for token in model.tokenize(write(piece.encode()))]

    return encode


def _check_reachable(parts: ByteLevelBPE, tokenizer: tokenizers.Tokenizer) -> None:
    """Check that the text of every token encodes to that token (see ``_parse_merges``).

    True in any vocabulary that was trained, not in one that was edited.
    """
    from tokenizers.models import BPE

    write = ByteWriting().write
    vocabulary = {write(bytes((byte,))): id_ for byte, id_ in enumerate(parts.byte_ids)}
    vocabulary.update({write(left + right): id_ for left, right, id_ in parts.merges})
    # A model that takes whole words unmerged, or has the dropped merges, would prove nothing.
    model: Any = tokenizer.model
    if parts.whole_words or parts.dropped_merges:
        pairs = [(write(left), write(right)) for left, right, _ in parts.merges]
        model = BPE(vocab=vocabulary, merges=pairs)
    for word, token in vocabulary.items():
        found = model.tokenize(word)
        if len(found) != 1 or found[0].id != token:
            raise NotUnderstoodError(f"merging does not reach the token {word!r}")
