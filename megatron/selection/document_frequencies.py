"""In how many documents of a corpus each word stands, counted in bounded memory.

Words are counted by segments of the corpus.  A finished segment is a file of its words, sorted,
each with its number of documents; so a killed count goes on behind the last file, and the files
are merged word by word without ever holding the corpus's vocabulary.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np

from megatron.checkpoint.files import replace_file, replacing
from megatron.selection.base import Corpus, Document, Say

WordsOf = Callable[[Document], list[str]]

_BATCH: Final = 256  # documents between two looks at the segment's size
_MERGED_AT_ONCE: Final = 64  # files open at a time
_PLACES: Final = 32  # bits for the number of a word in its segment
_SUMMED_IN_ORDER: Final = 8_000_000  # words; 16 bytes of memory each

_Line = tuple[bytes, int, int]
"""A word, its documents, and its place among all words by where they first stand."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a segment is full.

    Attributes:
        documents: so many, which is also what a kill can lose.
        words: so many different ones, about 200 bytes of memory each.
    """

    documents: int = 250_000
    words: int = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What BM25 takes from the whole corpus.

    Attributes:
        documents: in all.
        words: in all, repeats included.
        vocabulary: different words.
        mean_idf: mean of :func:`idf` over the vocabulary.
        frequency: documents with each of the words asked for; those of no document are left out.
    """

    documents: int
    words: int
    vocabulary: int
    mean_idf: float
    frequency: Mapping[str, int]

    @property
    def mean_length(self) -> float:
        """Words in a document."""
        return self.words / self.documents if self.documents else 0.0

    def write(self, path: Path) -> None:
        """Replace a file by these numbers."""
        replace_file(path, json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, path: Path) -> Statistics:
        """Return the numbers that :meth:`write` has written."""
        return cls(**json.loads(path.read_bytes()))


def idf(frequency: int, documents: int) -> float:
    """Return ``ln(N - n + ½) - ln(n + ½)``, negative for a word of more than half the documents."""
    return math.log(documents - frequency + 0.5) - math.log(frequency + 0.5)


def count(
    corpus: Corpus,
    words_of: WordsOf,
    wanted: Collection[str],
    folder: Path,
    say: Say,
    limits: Limits | None = None,
) -> Statistics:
    """Count a corpus, going on behind the segments that ``folder`` has.

    Args:
        corpus: to count.
        words_of: the words of a document, empty ones included.
        wanted: words whose numbers shall be returned.
        folder: for the segments; they are removed by :func:`remove_segments`.
        say: is told of every segment.
        limits: when a segment is full.
    """
    limits = limits or Limits()
    segments = _found(folder)
    at = segments[-1].stop if segments else 0
    documents = corpus.read(at)
    while at < len(corpus):
        segment = _count_segment(documents, words_of, limits)
        if segment.documents == 0:
            break
        name = _name(folder, at, at + segment.documents)
        _write(name, segment.length, sorted(_lines(segment.frequency, at << _PLACES)))
        at += segment.documents
        segments.append(_Segment(path=name, stop=at))
        say(f"words counted in {at:,} of {len(corpus):,} documents")
        if len(segments) >= _MERGED_AT_ONCE:
            segments = [_merge(folder, segments)]
    return _summed(segments, at, {word.encode("utf-8", "surrogatepass") for word in wanted})


def remove_segments(folder: Path) -> None:
    """Remove the files of a count that has ended."""
    for path in folder.glob("frequencies-*"):
        path.unlink()


@dataclass(kw_only=True)
class _Counted:
    """Numbers of one segment."""

    documents: int = 0
    length: int = 0
    frequency: Counter[str]

    def distinct(
        self, documents: Iterator[Document], words_of: WordsOf
    ) -> Iterator[Mapping[str, None]]:
        """Yield a document's words, each once, where it first stands; hold one document."""
        for one in documents:
            found = words_of(one)
            self.documents += 1
            self.length += len(found)
            yield dict.fromkeys(found)


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """A file of frequencies, and the document behind its last."""

    path: Path
    stop: int


def _count_segment(documents: Iterator[Document], words_of: WordsOf, limits: Limits) -> _Counted:
    """Count documents until the segment is full or there are none."""
    found = _Counted(frequency=Counter())
    while found.documents < limits.documents and len(found.frequency) < limits.words:
        before = found.documents
        batch = itertools.islice(documents, min(_BATCH, limits.documents - before))
        found.frequency.update(itertools.chain.from_iterable(found.distinct(batch, words_of)))
        if found.documents == before:
            break
    return found


def _lines(frequency: Mapping[str, int], first: int) -> Iterator[_Line]:
    for place, (word, number) in enumerate(frequency.items(), start=first):
        yield word.encode("utf-8", "surrogatepass"), number, place


def _name(folder: Path, start: int, stop: int) -> Path:
    return folder / f"frequencies-{start:015d}-{stop:015d}"


def _write(path: Path, length: int, lines: Sequence[_Line]) -> None:
    """Write a segment: its number of words, then its words, none of which has a space in it."""
    body = b"".join(b"%b %d %d\n" % line for line in lines)
    replace_file(path, b"%d\n" % length + body)


def _found(folder: Path) -> list[_Segment]:
    """Return the finished segments that cover the corpus from its first document on, in order.

    A kill between merging and removing leaves both the merged file and its parts; the longest one
    from each place wins.
    """
    spans: list[tuple[int, int, Path]] = []
    for path in folder.glob("frequencies-*"):
        if path.name.endswith(".tmp"):
            path.unlink()
            continue
        _, first, last = path.name.split("-")
        spans.append((int(first), -int(last), path))
    segments: list[_Segment] = []
    at = 0
    for start, stop, path in sorted(spans):
        if start == at:
            segments.append(_Segment(path=path, stop=-stop))
            at = -stop
        else:
            path.unlink()
    return segments


def _merge(folder: Path, segments: Sequence[_Segment]) -> _Segment:
    """Write segments that follow one another as one, and remove them."""
    merged = _Segment(path=_name(folder, 0, segments[-1].stop), stop=segments[-1].stop)
    with ExitStack() as stack, replacing(merged.path) as file:
        length, lines = _opened(stack, segments)
        file.write(b"%d\n" % length)
        file.writelines(b"%b %d %d\n" % line for line in lines)
    for one in segments:
        one.path.unlink()
    return merged


def _opened(stack: ExitStack, segments: Sequence[_Segment]) -> tuple[int, Iterator[_Line]]:
    """Return the number of words in segments, and each different one with its frequency."""
    files = [stack.enter_context(one.path.open("rb")) for one in segments]
    length = sum(int(next(file)) for file in files)
    return length, _summed_lines(heapq.merge(*(map(_parsed, file) for file in files)))


def _parsed(line: bytes) -> _Line:
    word, number, place = line.rsplit(b" ", 2)
    return word, int(number), int(place)


def _summed_lines(lines: Iterator[_Line]) -> Iterator[_Line]:
    for word, group in itertools.groupby(lines, key=lambda line: line[0]):
        found = list(group)
        yield word, sum(line[1] for line in found), min(line[2] for line in found)


def _summed(segments: Sequence[_Segment], documents: int, wanted: Collection[bytes]) -> Statistics:
    """Return the numbers of all segments together."""
    frequency: dict[str, int] = {}
    weights = _Weights(documents)
    with ExitStack() as stack:
        length, lines = _opened(stack, segments)
        for word, number, place in lines:
            weights.add(number, place)
            if word in wanted:
                frequency[word.decode("utf-8", "surrogatepass")] = number
    return Statistics(
        documents=documents,
        words=length,
        vocabulary=weights.words,
        mean_idf=weights.mean(),
        frequency=frequency,
    )


class _Weights:
    """The mean of :func:`idf` over the words of a corpus.

    Rounding depends on the order of a sum.  As long as memory allows it is that of the words'
    first places, which rank_bm25 has, so that equal scores there are equal scores here.
    """

    def __init__(self, documents: int) -> None:
        self.words = 0
        self._documents = documents
        self._sizes: Counter[int] = Counter()
        self._numbers, self._places = array("q"), array("q")

    def add(self, number: int, place: int) -> None:
        """Take a word that so many documents have."""
        self.words += 1
        self._sizes[number] += 1
        if self.words <= _SUMMED_IN_ORDER:
            self._numbers.append(number)
            self._places.append(place)

    def mean(self) -> float:
        """Return the mean; 0 without words."""
        if not self.words:
            return 0.0
        each = {number: idf(number, self._documents) for number in self._sizes}
        if self.words > _SUMMED_IN_ORDER:
            return math.fsum(many * each[one] for one, many in self._sizes.items()) / self.words
        order = np.argsort(np.frombuffer(self._places, np.int64))
        numbers = np.frombuffer(self._numbers, np.int64)[order]
        total = 0.0
        for number in numbers.tolist():
            total += each[number]
        return total / self.words
