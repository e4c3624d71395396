"""Encoding a byte-level BPE at several times the speed of ``tokenizers``, to the same ids.

Text is a stream of few distinct pieces: words, indents, brackets.  A regular expression
cuts it into pieces, a dictionary gives each piece's ids as the bytes that go to disk, and
only pieces not met before are merged (by ``tiktoken``, or else by ``tokenizers``).  GPT-2's
pattern, the commonest, is split and looked up in NumPy, a batch of texts at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron.tokenizer.bytelevel import AddedToken, ByteLevelBPE
from megatron.tokenizer.pattern import GPT2_PATTERN, NotUnderstoodError, PatternSplitter
from megatron.tokenizer.pieces import PieceCache, all_at_once, one_by_one, piece_encoder, stored
from megatron.tokenizer.unicode_classes import ASCII_END, TIERS, tier_of
from megatron.tokenizer.vectorised import BATCH_CHARACTERS, BatchEncoder
from megatron.tokenizer.verify import EncodeRaw, first_difference, probe_texts

if TYPE_CHECKING:
    import tokenizers

# About 80 MB a process when full; emptied then, and refilled by the frequent pieces at once.
_CACHE_PIECES = 1 << 19
# Bytes a character above which a text has too little ASCII for batches to gain anything.
_MOSTLY_FOREIGN = 1.3
# A place where GPT-2's pattern always starts a piece, whatever stands around it.
_WORD_END = re.compile(r"(?<=[A-Za-z0-9])(?= [A-Za-z])")


class FastEncoder:
    """Encodes texts to stored bytes."""

    def __init__(
        self,
        parts: ByteLevelBPE,
        tokenizer: tokenizers.Tokenizer,
        reference: EncodeRaw,
        *,
        cache_pieces: int = _CACHE_PIECES,
    ) -> None:
        """Prepare the encoder, and compare it with ``reference`` on ASCII texts.

        Args:
            parts: what the tokenizer is made of.
            tokenizer: the same, as an object: its normalizer is used, and its model where
                tiktoken is not installed.
            reference: what the ids have to equal.
            cache_pieces: pieces remembered at most, per token type.

        Raises:
            NotUnderstoodError: a pattern, a token that encoding does not reach, or a difference.
        """
        self._reference = reference
        self._parts = parts
        self._normalize = tokenizer.normalizer.normalize_str if parts.normalizes else None
        self._splitters = [PatternSplitter(pattern) for pattern in parts.patterns]
        self._piece, self.backend, self._ranks = piece_encoder(parts, tokenizer)
        self._caches: dict[str, PieceCache] = {}
        self._batches: dict[str, BatchEncoder] = {}
        self._in_batches = parts.patterns == (GPT2_PATTERN,) and not (
            parts.add_prefix_space or parts.prefix or parts.suffix
        )
        self._cache_pieces = cache_pieces
        early = [t for t in parts.added if not (t.normalized and parts.normalizes)]
        late = [t for t in parts.added if t.normalized and parts.normalizes]
        self._early, self._late = _NameFinder(early), _NameFinder(late)
        if self._normalize and any(self._normalize(t.content) != t.content for t in late):
            raise NotUnderstoodError("an added token that the normalizer changes")
        self._probes = probe_texts(parts)
        self._verified: set[int] = set()
        self._open_tier(ASCII_END)

    @property
    def verified_texts(self) -> int:
        """Number of texts on which this encoder was compared with its reference so far."""
        return sum(tier_of(text) in self._verified for text in self._probes)

    def encode_raw(self, texts: Sequence[str], dtype: np.dtype[Any]) -> list[bytes]:
        """Return each text's ids as bytes of ``dtype`` (little-endian).

        The first text of a tier of characters makes its patterns and compares them first.

        Raises:
            NotUnderstoodError: that comparison failed; nothing was encoded wrongly.
            UnicodeEncodeError: a text holds a lone surrogate.
        """
        if dtype.str not in self._caches:
            cache = PieceCache(self._piece, dtype, self._cache_pieces)
            self._caches[dtype.str] = cache
            ranks = self._ranks
            pieces = all_at_once(ranks, dtype) if ranks else one_by_one(cache, dtype)
            self._batches[dtype.str] = BatchEncoder(pieces, self._stretch(cache), dtype)
        out: list[bytes] = []
        batch: list[tuple[int, str]] = []
        size = 0
        for number, text in enumerate(texts):
            out.append(b"")
            self._admit(text)
            if not self._in_batches or (ready := self._ready_for_batch(text)) is None:
                out[number] = self._encode_text(text, self._caches[dtype.str], dtype)
                continue
            for part in _cut_at_words(ready):
                batch.append((number, part))
                size += len(part)
                if size >= BATCH_CHARACTERS:
                    self._encode_batch(batch, out, dtype)
                    batch, size = [], 0
        self._encode_batch(batch, out, dtype)
        return out

    def _admit(self, text: str) -> None:
        """Refuse lone surrogates, and compare with the reference before a new tier is used."""
        if not text.isascii():
            text.encode("utf-8")
            if (tier := tier_of(text)) not in self._verified:
                self._open_tier(tier)

    def _ready_for_batch(self, text: str) -> str | None:
        """Return the text as it goes into a batch; None if it has to be encoded by itself."""
        if not text or "\0" in text or self._early.may_occur(text):
            return None
        if not text.isascii():
            if len(text.encode()) > _MOSTLY_FOREIGN * len(text):
                return None
            if self._normalize:
                text = self._normalize(text)
        return None if not text or "\0" in text or self._late.may_occur(text) else text

    def _encode_batch(
        self, batch: list[tuple[int, str]], out: list[bytes], dtype: np.dtype[Any]
    ) -> None:
        """Encode parts of texts and append each to its text's bytes."""
        if not batch:
            return
        found = self._batches[dtype.str].encode([part for _, part in batch])
        for (number, _), raw in zip(batch, found, strict=True):
            out[number] = out[number] + raw if out[number] else raw

    def _stretch(self, cache: PieceCache) -> Callable[[str], bytes]:
        splitter = self._splitters[0]
        get = cache.__getitem__

        def encode(stretch: str) -> bytes:
            return b"".join(map(get, splitter.for_text(stretch)(stretch)))

        return encode

    def _open_tier(self, tier: int) -> None:
        """Compare with the reference on texts of a tier, and of those below it."""
        dtype = np.dtype("<i4")
        for lower in TIERS:
            # A normalizer may lead from any tier to any other.
            if lower in self._verified or (lower > tier and not self._normalize):
                continue
            if lower > tier == ASCII_END:
                continue
            for splitter in self._splitters:
                splitter.of_tier(lower)
            self._verified.add(lower)
            texts = [text for text in self._probes if tier_of(text) == lower]
            different = first_difference(
                texts,
                lambda batch: self.encode_raw(batch, dtype),
                lambda batch: self._reference(batch, dtype),
            )
            if different is not None:
                raise NotUnderstoodError(f"the fast encoder differs on {different!r}")

    def _encode_text(self, text: str, cache: PieceCache, dtype: np.dtype[Any]) -> bytes:
        # Splitting by name first and normalizing what is left is the order of `tokenizers`.
        parts = self._parts
        out = [stored(parts.prefix, dtype)]
        for segment, token in self._segments(text):
            if token is None:
                out.extend(map(cache.__getitem__, self._pieces(segment)))
            else:
                out.append(stored((token,), dtype))
        out.append(stored(parts.suffix, dtype))
        return b"".join(out)

    def _segments(self, text: str) -> Iterator[tuple[str, int | None]]:
        for segment, token in self._early.split(text):
            if token is not None:
                yield segment, token
                continue
            if self._normalize and not segment.isascii():
                segment = self._normalize(segment)
            yield from self._late.split(segment)

    def _pieces(self, segment: str) -> list[str]:
        if self._parts.add_prefix_space and not segment.startswith(" "):
            segment = " " + segment
        pieces = [segment]
        for splitter in self._splitters:
            find = splitter.for_text(segment)
            pieces = find(pieces[0]) if len(pieces) == 1 else [q for p in pieces for q in find(p)]
        return pieces


class _NameFinder:
    """Finds added tokens in a text: leftmost, then longest."""

    def __init__(self, tokens: Sequence[AddedToken]) -> None:
        self._ids = {token.content: token.id for token in tokens}
        names = sorted(self._ids, key=lambda name: (-len(name), name))
        self._pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._hints = _substrings(names)

    def may_occur(self, text: str) -> bool:
        """Tell whether a name could be in the text, fast and possibly wrong about yes."""
        return any(hint in text for hint in self._hints) and bool(self._pattern.search(text))

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield the text between names, with None, and the names, with their id."""
        at = 0
        for match in self._pattern.finditer(text):
            if match.start() > at:
                yield text[at : match.start()], None
            yield match.group(), self._ids[match.group()]
            at = match.end()
        if at < len(text):
            yield text[at:], None


def _cut_at_words(text: str) -> Iterator[str]:
    """Cut a long text where pieces start anyway, so that memory does not grow with it."""
    start = 0
    while len(text) - start > 2 * BATCH_CHARACTERS:
        found = _WORD_END.search(text, start + BATCH_CHARACTERS)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:] if start else text


def _substrings(names: Sequence[str]) -> tuple[str, ...]:
    """Return a few strings of which every name holds at least one."""
    starts = {name[:2] for name in names}
    return tuple(sorted(starts)) if len(starts) <= 4 else ("",)
