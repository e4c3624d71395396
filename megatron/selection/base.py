"""What a document, a target and a selector are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Say = Callable[[str], None]

ANSWERING: Final = "assistant"
"""Role of the turns that are answers."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """One record of a corpus or a target set.

    Attributes:
        id: its own ``id`` if the record has one, else ``SOURCE:NUMBER``; unique in a corpus.
        source: name of the file, data set or domain that it stands in.
        number: place in that source, from 0.
        text: all of it; of a conversation, the contents of its turns joined by newlines.
        turns: of a conversation, in order; () for plain text.
        tokens: its ids, if it comes from a tokenised domain; None otherwise.
        tokenizer: SHA-256 (hex) of the tokenizer that made ``tokens``, by the domain's sidecar;
            None where there are none or it is not known.  A model with that tokenizer reads the
            tokens as they are.
        labels: as many as tokens, of a tokenised domain that has labels: -100 where a token is
            read and not learned; None otherwise.
    """

    id: str
    source: str
    number: int
    text: str
    turns: tuple[Turn, ...] = ()
    tokens: NDArray[Any] | None = None
    tokenizer: str | None = None
    labels: NDArray[np.int32] | None = None


@dataclass(frozen=True, kw_only=True)
class Target:
    """A named subtask of what shall be learned: examples of it."""

    name: str
    documents: tuple[Document, ...]


class Corpus(Protocol):
    """Documents that can be read again and again, from any place, in one order."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        """Yield the documents [start, stop) in order, in bounded memory."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of what is in it; of another corpus it is another."""
        ...


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What scoring has cost.

    Attributes:
        flops: in floating-point operations of models, by the formula of training's.
        tokens: that models have read for it.
    """

    flops: float = 0.0
    tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(flops=self.flops + other.flops, tokens=self.tokens + other.tokens)


class Selector(Protocol):
    """One way of scoring documents against targets.

    ``prepare`` does, once, what needs the whole corpus or the targets (document frequencies, a
    decomposition, a warm-up) and keeps it in files; ``open`` reads those; ``score`` then takes
    documents in batches of any size, and a document's scores depend on nothing but the document
    and what is prepared.  So scoring can be cut into shards, killed and gone on with.  (Batches are
    cut at the same documents whatever the number of shards, so rounding that depends on who stands
    in a batch harms nothing.)
    """

    @property
    def method(self) -> str:
        """Name of the method, as in ``--method``."""
        ...

    @property
    def aggregate(self) -> str:
        """``mean`` or ``max`` over the subtasks; ``none`` where one column has no targets."""
        ...

    @property
    def needs_targets(self) -> bool:
        """Whether it compares documents with targets, and so has a column for each."""
        ...

    def parameters(self) -> Mapping[str, Any]:
        """Return, JSON-able, all that decides the scores beside corpus and targets."""
        ...

    def prepare(self, corpus: Corpus, targets: Sequence[Target], folder: Path, say: Say) -> Cost:
        """Make what ``open`` reads, in ``folder``; go on where a killed call stopped.

        The caller holds a lock on the folder, and records that preparing has ended.

        Returns:
            What all of it has cost, with what a killed call did: the same as without the kill.
        """
        ...

    def open(self, folder: Path, targets: Sequence[Target]) -> None:
        """Read what was prepared; called before the first ``score`` of a process."""
        ...

    def score(self, documents: Sequence[Document]) -> tuple[FloatArray, Cost]:
        """Score a batch.

        Returns:
            [n, subtasks] (or [n, 1] without targets), higher = more of what the method measures
            (for perplexity: mean nats per token); NaN for a document that cannot be scored (empty
            text), which is never chosen; and what it cost.
        """
        ...
