"""Per-token losses of a loss store, summed up by document.

The store is what ``tools/score_data.py`` writes and DoReMi reads: the losses of the windows that a
run trains on (:mod:`megatron.data.loss_header`).  A window begins where its cut falls, so a token
was predicted from the tokens of the same window before it, those of earlier documents among them,
and the first tokens of a window from few or none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.checkpoint.files import replace_file
from megatron.data.loss_header import (
    LOSS_TYPE,
    DomainScores,
    StoreHeader,
    read_header,
    stream_fingerprint,
)
from megatron.data.reader import TokenReader
from megatron.data.sources import Source
from megatron.data.splits import split_documents
from megatron.errors import DataError
from megatron.selection.base import Corpus, Document, Say
from megatron.selection.corpus import DocumentCorpus
from megatron.selection.token_part import TokenPart

_PLACES_NAME = "places.json"
_REMEDY = "make it with tools/score_data.py"


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the documents of a source lie in the store.

    Attributes:
        prefix: of the tokens.
        first: number in the prefix of the source's first document.
        start: first token of the prefix that the store has.
        stop: the token after its last.
        shift: added to a token's place in the prefix it gives its place in the domain's stream.
        domain: name in the store.
    """

    prefix: str
    first: int
    start: int
    stop: int
    shift: int
    domain: str


def store_facts(folder: Path) -> Mapping[str, Any]:
    """Return what a store's losses depend on, JSON-able.

    Raises:
        DataError: there is no store.
    """
    header = read_header(folder, _REMEDY)
    return {
        "losses": header.model_hash,
        "precision": header.precision,
        "seq_length": header.seq_length,
        "epoch_offset": header.epoch_offset,
        "seed": header.seed,
    }


def prepare_stored(store: Path, corpus: Corpus, folder: Path, say: Say) -> None:
    """Find the corpus' documents in a store, and note where they are.

    Args:
        store: its folder.
        corpus: must be of tokenised domains.
        folder: takes the note.
        say: takes a line for the console.

    Raises:
        DataError: a source of the corpus is not in the store, or not scored to its end.
    """
    header = read_header(store, _REMEDY)
    if not isinstance(corpus, DocumentCorpus):
        raise TypeError("a loss store is read for a corpus of parts")
    parts = []
    for part in corpus.parts:
        if not isinstance(part, TokenPart):
            raise DataError(
                f"--losses {store}: a store has the losses of tokenised domains, and {part.name} "
                "is text; give prefixes or domains to --train, or a model with --model"
            )
        parts.append(part)
    places: dict[str, _Place] = {}
    for name, scores in header.domains.items():
        places |= _find(name, scores, parts)
    for part in parts:
        if part.name not in places:
            held = ", ".join(header.domains) or "none"
            raise DataError(
                f"--losses {store}: no losses of the documents of {part.name} (the store is of the "
                f"training parts of {held}, and these are other tokens); add them with "
                "tools/score_data.py"
            )
        _check_complete(store, header, places[part.name].domain)
        say(_described(part, places[part.name]))
    folder.mkdir(parents=True, exist_ok=True)
    noted = {name: asdict(place) for name, place in places.items()}
    replace_file(folder / _PLACES_NAME, json.dumps(noted, indent=1).encode())


def _described(part: TokenPart, place: _Place) -> str:
    own, held = part.num_tokens, place.stop - place.start
    outside = f"; {own - held:,} tokens outside of it get no score" if own > held else ""
    return f"{part.name}: losses of domain '{place.domain}', {held:,} tokens{outside}"


def _check_complete(store: Path, header: StoreHeader, domain: str) -> None:
    scores = header.domains[domain]
    if not scores.complete:
        raise DataError(
            f"{store} is unfinished: of domain '{domain}' {sum(scores.scored):,} of "
            f"{sum(scores.windows):,} windows are scored; give the command again that made it"
        )


def _find(name: str, scores: DomainScores, parts: Sequence[TokenPart]) -> dict[str, _Place]:
    """Return the places of those parts, one after the other, that are a domain of the store."""
    whole = [part.source for part in parts]
    tries = [whole]
    if scores.split is not None:
        # The whole of a prefix was given, and the store has what the run trains on.
        tries.append([_training(source, scores.split) for source in whole])
    for sources in tries:
        for first, last in _runs(len(parts)):
            if stream_fingerprint(sources[first:last]) == scores.fingerprint:
                return _places(name, parts[first:last], sources[first:last])
    return {}


def _runs(count: int) -> Iterator[tuple[int, int]]:
    for first in range(count):
        for last in range(first + 1, count + 1):
            yield first, last


def _training(source: Source, split: str) -> Source:
    return replace(source, documents=split_documents(source.reader, split, "train"))


def _places(name: str, parts: Sequence[TokenPart], sources: Sequence[Source]) -> dict[str, _Place]:
    found, position = {}, 0
    for part, source in zip(parts, sources, strict=True):
        span = source.documents
        found[part.name] = _Place(
            prefix=os.path.abspath(source.reader.prefix),
            first=part.source.documents.first,
            start=span.start,
            stop=span.stop,
            shift=position - span.start,
            domain=name,
        )
        position += span.stop - span.start
    return found


class StoredLosses:
    """Reads documents' losses; made by what :func:`prepare_stored` has noted."""

    def __init__(self, store: Path, folder: Path) -> None:
        """Open the store's files.

        Raises:
            DataError: one is missing or of another size.
        """
        header = read_header(store, _REMEDY)
        content = json.loads((folder / _PLACES_NAME).read_bytes())
        self._places = {name: _Place(**place) for name, place in content.items()}
        self._readers = {name: TokenReader(place.prefix) for name, place in self._places.items()}
        self._losses = {
            domain: _mapped(store, header.domains[domain])
            for domain in {place.domain for place in self._places.values()}
        }

    def score(self, documents: Sequence[Document]) -> NDArray[np.float64]:
        """Return [n] mean losses in nats over the tokens of each document that have one.

        As elsewhere a document's first token does not count.  Where a store holds several epochs,
        a token's loss is its mean over them.  NaN marks a document without any.
        """
        return np.array([self._score(one) for one in documents], dtype=np.float64)

    def _score(self, document: Document) -> float:
        place = self._places[document.source]
        reader = self._readers[document.source]
        number = place.first + document.number
        start = reader.document_start(number)
        stop = start + reader.document_size(number)
        if start < place.start or stop > place.stop:
            return float("nan")
        part = self._losses[place.domain][:, start + place.shift + 1 : stop + place.shift]
        losses = part.astype(np.float64)
        known = np.isfinite(losses)
        counts = known.sum(axis=0)
        if not counts.any():
            return float("nan")
        sums = np.where(known, losses, 0.0).sum(axis=0)
        return float((sums[counts > 0] / counts[counts > 0]).mean())


def _mapped(store: Path, scores: DomainScores) -> NDArray[Any]:
    path, shape = store / scores.file, (len(scores.windows), scores.tokens)
    try:
        size = path.stat().st_size
        if size != scores.file_bytes:
            raise DataError(
                f"{path}: {size:,} bytes, the header of the store asks for {scores.file_bytes:,}; "
                "copy it again"
            )
        return np.memmap(path, dtype=LOSS_TYPE, mode="r", shape=shape)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
