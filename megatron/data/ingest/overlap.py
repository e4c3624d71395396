"""How much of one dataset is found in another, by hashes of documents and of 13-grams.

A validation document that the training data holds makes its loss a measure of memory.
Documents are compared exactly, and by their 13-grams: runs of 13 tokens, the length that
the contamination studies of GPT-3 (Brown et al. 2020, appendix C) settled on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.reader import TokenReader
from megatron.errors import DataError

NGRAM = 13
_BATCH_TOKENS = 1 << 20
_FILTER_BITS = 27
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)

Hashes = NDArray[np.uint64]
Span = tuple[TokenReader, int, int]


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What of B is found in A.

    Attributes:
        documents: documents of B that were looked at, empty ones aside.
        of: documents that B has.
        exact: of those looked at, how many A holds token for token.
        similar: how many have at least ``threshold`` of their 13-grams in A, or are exact.
        touched: how many share any 13-gram with A, or are exact.
        threshold: the share of 13-grams that makes a document similar.
        scanned: share of A's tokens that was read; below 1 the counts are lower bounds.
    """

    documents: int
    of: int
    exact: int
    similar: int
    touched: int
    threshold: float
    scanned: float

    def share(self, count: int) -> float:
        """Return a count as a share of the documents looked at."""
        return count / self.documents if self.documents else 0.0

    def lines(self) -> list[str]:
        """Return the result as lines for the user."""
        seen = f"{self.documents:,} of {self.of:,} documents looked at"
        if self.scanned < 1:
            seen += f", in {100 * self.scanned:.1f} % of A (so these are lower bounds)"
        return [
            seen,
            f"found exactly: {self.exact:,} ({100 * self.share(self.exact):.2f} %)",
            f"at least {100 * self.threshold:.0f} % of their {NGRAM}-grams found: "
            f"{self.similar:,} ({100 * self.share(self.similar):.2f} %)",
            f"any {NGRAM}-gram found: {self.touched:,} ({100 * self.share(self.touched):.2f} %)",
        ]


def overlap(
    a: Sequence[Span] | Sequence[str],
    b: Sequence[Span] | Sequence[str],
    *,
    max_documents: int | None = 20_000,
    max_scan_tokens: int | None = None,
    threshold: float = 0.8,
) -> Overlap:
    """Return how much of B is found in A.

    Memory is bounded by the documents of B looked at (8 bytes a token of theirs, twice) plus
    a filter of 16 MiB; A is streamed once.

    Args:
        a: prefixes, or ``(reader, first document, last document)`` spans.
        b: the same.
        max_documents: look at this many of B's documents, evenly spread; None is all.
        max_scan_tokens: read at most about this much of A, in evenly spread pieces.
        threshold: share of its 13-grams that makes a document similar.

    Raises:
        DataError: a dataset is unsound, or the two were tokenised differently.
    """
    with ExitStack() as stack:
        spans_a, spans_b = _opened(a, stack), _opened(b, stack)
        _check_tokenizers([*spans_a, *spans_b])
        probe = _Probe(spans_b, max_documents)
        scanned = probe.scan(spans_a, max_scan_tokens) if probe.documents else 1.0
        return probe.result(threshold, scanned)


class _Probe:
    """The hashes of B's documents, and which of them have been met."""

    def __init__(self, spans: Sequence[Span], max_documents: int | None) -> None:
        self.of = sum(last - first for _, first, last in spans)
        whole: list[Hashes] = []
        grams: list[Hashes] = []
        owners: list[NDArray[np.int64]] = []
        self.documents = 0
        step = 1.0 if max_documents is None else max(1.0, self.of / max(max_documents, 1))
        for tokens, sizes in _sampled_batches(spans, step):
            whole.append(_document_hashes(tokens, sizes))
            hashes, documents = _gram_hashes(tokens, sizes)
            grams.append(hashes)
            owners.append(documents + self.documents)
            self.documents += sizes.size
        self._whole = np.concatenate([*whole, np.empty(0, np.uint64)])
        all_grams = np.concatenate([*grams, np.empty(0, np.uint64)])
        self._owner = np.concatenate([*owners, np.empty(0, np.int64)])
        self._grams, self._gram_of = np.unique(all_grams, return_inverse=True)
        self._gram_met = np.zeros(self._grams.size, dtype=bool)
        self._whole_sorted = np.unique(self._whole)
        self._whole_met = np.zeros(self._whole_sorted.size, dtype=bool)
        self._filter = np.zeros(1 << (_FILTER_BITS - 3), dtype=np.uint8)
        byte, bit = _filter_place(self._grams)
        for one in 1 << np.arange(8, dtype=np.uint8):  # assignment takes repeated places well
            self._filter[byte[bit == one]] |= one

    def scan(self, spans: Sequence[Span], max_tokens: int | None) -> float:
        """Look for B's hashes in A; return the share of A's tokens read."""
        total = sum(_span_tokens(span) for span in spans)
        read = 0
        share = 1.0 if max_tokens is None else min(1.0, max_tokens / max(total, 1))
        batches = 0
        for span in spans:
            for first, last in _batch_bounds(span):
                # Evenly spread: a batch is read whenever the share asked for has grown by one.
                batches += 1
                if int(batches * share) == int((batches - 1) * share) and share < 1.0:
                    continue
                tokens, sizes = _load(span[0], first, last)
                read += tokens.size
                self._meet(self._whole_sorted, self._whole_met, _document_hashes(tokens, sizes))
                hashes = _rolling(tokens)
                byte, bit = _filter_place(hashes)
                self._meet(self._grams, self._gram_met, hashes[(self._filter[byte] & bit) != 0])
        return read / total if total else 1.0

    def result(self, threshold: float, scanned: float) -> Overlap:
        exact = self._whole_met[np.searchsorted(self._whole_sorted, self._whole)]
        met = self._gram_met[self._gram_of]
        have = np.bincount(self._owner, minlength=self.documents)
        found = np.bincount(self._owner[met], minlength=self.documents)
        similar = exact | ((have > 0) & (found >= threshold * have))
        return Overlap(
            documents=self.documents,
            of=self.of,
            exact=int(exact.sum()),
            similar=int(similar.sum()),
            touched=int((exact | (found > 0)).sum()),
            threshold=threshold,
            scanned=min(scanned, 1.0),
        )

    @staticmethod
    def _meet(known: Hashes, met: NDArray[np.bool_], hashes: Hashes) -> None:
        if not known.size or not hashes.size:
            return
        at = np.minimum(np.searchsorted(known, hashes), known.size - 1)
        met[at[known[at] == hashes]] = True


def _opened(given: Sequence[Span] | Sequence[str], stack: ExitStack) -> list[Span]:
    spans: list[Span] = []
    for item in given:
        if isinstance(item, tuple):
            spans.append(item)
        else:
            reader = stack.enter_context(TokenReader(item))
            spans.append((reader, 0, reader.num_documents))
    return spans


def _check_tokenizers(spans: Sequence[Span]) -> None:
    first: tuple[str, str] | None = None
    for reader, _, _ in spans:
        sha256 = reader.sidecar.tokenizer.get("sha256") if reader.sidecar else None
        if sha256 is None:
            continue
        if first is not None and first[1] != sha256:
            raise DataError(
                f"{first[0]} and {reader.prefix} were tokenised by different tokenizers, so their "
                "tokens cannot be compared; preprocess both with one"
            )
        first = first or (reader.prefix, sha256)


def _span_tokens(span: Span) -> int:
    reader, first, last = span
    return reader.document_start(last) - reader.document_start(first)


def _batch_bounds(span: Span) -> Iterator[tuple[int, int]]:
    """Cut a span into runs of whole documents of about a million tokens."""
    reader, document, last = span
    while document < last:
        start = reader.document_start(document)
        stop = reader.documents_before(min(start + _BATCH_TOKENS, reader.num_tokens))
        stop = min(max(stop, document + 1), last)
        yield document, stop
        document = stop


def _load(reader: TokenReader, first: int, last: int) -> tuple[Hashes, NDArray[np.int64]]:
    """Return the mixed tokens of documents and their sizes, empty documents left out."""
    tokens = reader.read(reader.document_start(first), reader.document_start(last))
    sizes = reader.document_sizes(first, last).astype(np.int64)
    return _mix(tokens.astype(np.uint64)), sizes[sizes > 0]


def _sampled_batches(
    spans: Sequence[Span], step: float
) -> Iterator[tuple[Hashes, NDArray[np.int64]]]:
    """Yield batches of every ``step``-th document, counted over all spans."""
    seen = 0
    for span in spans:
        if step <= 1.0:
            for first, last in _batch_bounds(span):
                yield _load(span[0], first, last)
            continue
        count = span[2] - span[1]
        low, high = -(-seen // step), -(-(seen + count) // step)
        picks = [span[1] + int(i * step) - seen for i in np.arange(low, high)]
        for document in picks:
            if span[1] <= document < span[2]:
                yield _load(span[0], document, document + 1)
        seen += count


def _mix(values: Hashes) -> Hashes:
    """Scramble 64-bit values (the finalizer of SplitMix64: Steele et al. 2014)."""
    mixed = values + _MULTIPLIER
    mixed ^= mixed >> np.uint64(30)
    mixed *= _MIX_1
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MIX_2
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _rolling(mixed: Hashes) -> Hashes:
    """Return the hash of every run of 13 tokens: a polynomial mod 2^64, scrambled."""
    count = mixed.size - NGRAM + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    total = mixed[:count].copy()
    for offset in range(1, NGRAM):
        total *= _MULTIPLIER
        total += mixed[offset : offset + count]
    return _mix(total)


def _gram_hashes(mixed: Hashes, sizes: NDArray[np.int64]) -> tuple[Hashes, NDArray[np.int64]]:
    """Return the hashes of the 13-grams that lie within one document, and the documents."""
    hashes = _rolling(mixed)
    ends = np.cumsum(sizes)
    owner = np.repeat(np.arange(sizes.size), sizes)[: hashes.size]
    inside = np.arange(hashes.size) + NGRAM <= ends[owner] if hashes.size else owner.astype(bool)
    return hashes[inside], owner[inside].astype(np.int64)


def _document_hashes(mixed: Hashes, sizes: NDArray[np.int64]) -> Hashes:
    """Return one hash per document: Σ mix(token)·m^place, with the length, scrambled."""
    if not sizes.size:
        return np.empty(0, np.uint64)
    starts = np.cumsum(sizes) - sizes
    powers = np.full(int(sizes.max()), _MULTIPLIER, dtype=np.uint64)
    np.multiply.accumulate(powers, out=powers)
    place = np.arange(mixed.size) - np.repeat(starts, sizes)
    sums: Any = np.add.reduceat(mixed * powers[place], starts)
    return _mix(sums ^ _mix(sizes.astype(np.uint64)))


def _filter_place(hashes: Hashes) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    place = (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)
    return place >> 3, np.left_shift(np.uint8(1), (place & 7).astype(np.uint8))
