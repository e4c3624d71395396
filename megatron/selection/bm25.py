"""BM25 of every document for the words of each target subtask; costs no model FLOPs.

Okapi BM25 as rank_bm25 computes it and the released code of Yin and Rush (2024, arXiv 2410.16208)
uses it: ``Σ_q w_q·f·(k1 + 1) / (f + k1·(1 - b + b·|d| / avgdl))`` over the query's words, a word
as often as it stands there, with ``w = ln(N - n + ½) - ln(n + ½)`` and, where that is negative,
``epsilon`` times the mean over the vocabulary.  Frequencies and lengths are those of the whole
corpus.  bm25s computes a document's part.

The query of a subtask is all of its examples, joined by newlines (released, but for MMLU's, which
it joins without any).  With ``--examples mean`` a subtask scores the mean over its examples, each a
query of its own: the same ranking for a subtask alone, while subtasks of more examples weigh no
longer more than others.  Documents without a word score NaN; they count in the statistics.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from megatron.errors import ConfigError
from megatron.selection import document_frequencies, libraries
from megatron.selection.base import Corpus, Cost, Document, FloatArray, Say, Target
from megatron.selection.document_frequencies import Limits, Statistics, idf
from megatron.selection.words import (
    EXAMPLES,
    FIELDS,
    add_text_arguments,
    check_choice,
    example_texts,
    field_text,
    has_word,
    words,
)

_STATISTICS: Final = "statistics.json"
_DOCUMENTS_AT_ONCE: Final = 4096
_LIMITS: Final = Limits()


@dataclass(kw_only=True)
class Bm25:
    """Scores by the words that a document shares with the targets.

    Attributes:
        messages: what of a chat is read, see :data:`~megatron.selection.words.FIELDS`.
        examples: how those of a subtask are taken together.
        aggregate: over the subtasks, "mean" (released) or "max".
        k1: how late a repeated word saturates.
        b: how much a long document is marked down, 0 to 1.
        epsilon: weight of words that most documents have, in mean weights.
        limits: memory of counting; scores do not depend on it.
    """

    messages: str = "first"
    examples: str = "joined"
    aggregate: str = "mean"
    k1: float = 1.5
    b: float = 0.75
    epsilon: float = 0.25
    limits: Limits = _LIMITS
    method: ClassVar[str] = "bm25"
    needs_targets: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the values; raises ConfigError."""
        self._opened: _Queries | None = None
        check_choice("--messages", self.messages, FIELDS)
        check_choice("--examples", self.examples, EXAMPLES)
        check_choice("--aggregate", self.aggregate, ("mean", "max"))
        if not self.k1 >= 0:
            raise ConfigError(f"--k1 {self.k1}: must be 0 or more")
        if not 0 <= self.b <= 1:
            raise ConfigError(f"--b {self.b}: must be between 0 and 1")

    def parameters(self) -> Mapping[str, Any]:
        """Return all that decides the scores beside corpus and targets."""
        names = ("messages", "examples", "aggregate", "k1", "b", "epsilon")
        return {name: getattr(self, name) for name in names}

    def prepare(self, corpus: Corpus, targets: Sequence[Target], folder: Path, say: Say) -> Cost:
        """Count the corpus's words into ``folder``, going on where a killed call stopped."""
        path = folder / _STATISTICS
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            asked = set().union(*(_query_words(one) for one in targets))
            found = document_frequencies.count(corpus, self._words, asked, folder, say, self.limits)
            found.write(path)
        document_frequencies.remove_segments(folder)
        return Cost()

    def open(self, folder: Path, targets: Sequence[Target]) -> None:
        """Read the statistics and weigh the queries' words by them.

        Raises:
            MissingExtraError: bm25s or SciPy is not installed.
        """
        load_libraries()
        self._opened = _Queries(self, Statistics.read(folder / _STATISTICS), targets)

    def score(self, documents: Sequence[Document]) -> tuple[FloatArray, Cost]:
        """Return [n, subtasks] scores, NaN for documents without a word."""
        if self._opened is None:
            raise RuntimeError("open comes before score")
        found = np.empty((len(documents), len(self._opened.queries)))
        for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
            batch = documents[start : start + _DOCUMENTS_AT_ONCE]
            scores = self._opened.score([self._words(one) for one in batch])
            found[start : start + _DOCUMENTS_AT_ONCE] = scores
        return found, Cost()

    def _words(self, document: Document) -> list[str]:
        return words(field_text(document, self.messages))


@dataclass(frozen=True, kw_only=True)
class _Query:
    """A subtask's words that the corpus has.

    Attributes:
        ids: in order, repeats included.
        examples: that they come from.
    """

    ids: NDArray[np.int32]
    examples: int

    @classmethod
    def of(cls, target: Target, terms: Mapping[str, int]) -> _Query:
        """Look up a subtask's words."""
        ids = [terms[word] for word in _query_words(target) if word in terms]
        return cls(ids=np.array(ids, dtype=np.int32), examples=len(example_texts(target)))


class _Queries:
    """The words of all queries that the corpus has, with their weights."""

    def __init__(self, rule: Bm25, statistics: Statistics, targets: Sequence[Target]) -> None:
        self.terms = {word: at for at, word in enumerate(sorted(statistics.frequency))}
        self.rule, self.mean_length = rule, statistics.mean_length
        weights = [
            _weight(statistics.frequency[word], statistics, rule.epsilon) for word in self.terms
        ]
        self.weights = np.array(weights, dtype=np.float64)
        self.queries = [_Query.of(one, self.terms) for one in targets]

    def score(self, documents: list[list[str]]) -> FloatArray:
        """Return [n, subtasks]; a row depends on its document alone, to the bit."""
        from megatron.selection.bm25_index import CorpusIndex

        other = len(self.terms)
        get = self.terms.get
        ids = [[get(word, other) for word in one] for one in documents]
        scores = np.zeros((len(documents), len(self.queries)))
        if self.terms:
            index = CorpusIndex(
                weights=self.weights, mean_length=self.mean_length, k1=self.rule.k1, b=self.rule.b
            )
            index.index((ids, self.terms), create_empty_token=False, show_progress=False)
            for column, query in enumerate(self.queries):
                parts = query.examples if self.rule.examples == "mean" else 1
                scores[:, column] = index.get_scores_from_ids(query.ids) / parts
        scores[[not has_word(one) for one in documents]] = np.nan
        return scores


def _query_words(target: Target) -> list[str]:
    """Return the words of a subtask's examples, joined."""
    return words("\n".join(example_texts(target)))


def _weight(frequency: int, statistics: Statistics, epsilon: float) -> float:
    """Return a word's weight."""
    found = idf(frequency, statistics.documents)
    return epsilon * statistics.mean_idf if found < 0 else found


def load_libraries() -> None:
    """Raise MissingExtraError unless what scoring takes is installed."""
    for name in ("scipy.sparse", "bm25s"):
        libraries.load(name, "--method bm25")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    add_text_arguments(parser, examples="joined")
    parser.add_argument("--k1", type=float, default=1.5, metavar="K",
        help="how late a repeated word saturates (default: 1.5)")  # fmt: skip
    parser.add_argument("--b", type=float, default=0.75, metavar="B",
        help="how much a long document is marked down, 0 to 1 (default: 0.75)")  # fmt: skip
    parser.add_argument("--epsilon", type=float, default=0.25, metavar="E",
        help="weight of words that more than half of the documents have, in mean weights "
        "(default: 0.25)")  # fmt: skip


def from_options(options: argparse.Namespace) -> Bm25:
    """Make the selector."""
    load_libraries()
    return Bm25(
        messages=options.messages,
        examples=options.examples,
        aggregate=options.aggregate,
        k1=options.k1,
        b=options.b,
        epsilon=options.epsilon,
    )
