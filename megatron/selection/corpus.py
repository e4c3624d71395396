"""All documents to choose from: text, tables, data sets and tokenised domains, in a row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.selection.base import Document, Say
from megatron.selection.part import (
    Naming,
    Part,
    PartIndex,
    Row,
    naming_of,
    read_index,
    write_index,
)


@dataclass(frozen=True, kw_only=True)
class PartFacts:
    """What a table of scores remembers of a part.

    Attributes:
        name: of its documents' source.
        documents: how many.
        sha256: hash (hex) of their content.
    """

    name: str
    documents: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """Return it JSON-able."""
        return {"name": self.name, "documents": self.documents, "sha256": self.sha256}


class DocumentCorpus:
    """Documents of several parts, one part after the other."""

    def __init__(self, parts: Sequence[Part], indexes: Sequence[PartIndex]) -> None:
        """Join parts whose names differ; ``indexes`` are theirs."""
        self.parts = tuple(parts)
        self.indexes = tuple(indexes)
        self.naming: Naming = naming_of(self.indexes)
        counts = [index.documents for index in self.indexes]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        """Return how many documents there are."""
        return int(self._starts[-1])

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[Document]:
        """Yield the documents [start, stop) in order, in bounded memory.

        Raises:
            DataError: a file has changed or cannot be read.
        """
        for part, index, low, high in self._pieces(start, stop):
            yield from part.documents(index, self.naming, low, high)

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """Yield the documents [start, stop) with their records as they are in the files.

        Raises:
            DataError: a file has changed or cannot be read.
        """
        for part, index, low, high in self._pieces(start, stop):
            yield from part.rows(index, self.naming, low, high)

    def facts(self) -> list[PartFacts]:
        """Return what is remembered of each part."""
        return [
            PartFacts(name=part.name, documents=index.documents, sha256=index.sha256)
            for part, index in zip(self.parts, self.indexes, strict=True)
        ]

    def fingerprint(self) -> str:
        """Return a hash of what is in it, and of what its documents are called."""
        facts = [one.as_json() for one in self.facts()]
        content = json.dumps([facts, self.naming.kind], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def close(self) -> None:
        """Close the files."""
        for part in self.parts:
            part.close()

    def _pieces(self, start: int, stop: int | None) -> Iterator[tuple[Part, PartIndex, int, int]]:
        last = len(self) if stop is None else min(stop, len(self))
        for number, (part, index) in enumerate(zip(self.parts, self.indexes, strict=True)):
            first = int(self._starts[number])
            low, high = max(start - first, 0), min(last - first, index.documents)
            if low < high:
                yield part, index, low, high


def index_parts(
    parts: Sequence[Part], folder: Path | None = None, say: Say = lambda line: None
) -> DocumentCorpus:
    """Read every part once, or the index that an earlier call has left, and join them.

    Args:
        parts: in order.
        folder: where indexes are kept; None keeps none.
        say: takes lines for the user.

    Raises:
        DataError: a record cannot be used, naming file and line.
    """
    indexes = []
    for number, part in enumerate(parts):
        path = None if folder is None else folder / f"part-{number:04d}.npz"
        index = None if path is None else read_index(path, _plain(part.identity()))
        if index is None:
            index = part.build_index()
            say(f"{part.name}: {index.documents:,} documents")
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_index(path, index)
        indexes.append(index)
    return DocumentCorpus(parts, indexes)


def distinct_names(paths: Sequence[str], stem: Callable[[str], str]) -> list[str]:
    """Return a name for each path: the end of it, as long as it takes to tell them apart.

    Args:
        paths: all different.
        stem: takes the file's ending off.
    """
    whole = [Path(stem(path)).absolute().parts[1:] for path in paths]
    depth = [1] * len(paths)
    while True:
        names = ["/".join(parts[-n:]) for parts, n in zip(whole, depth, strict=True)]
        clash = [n for n, name in enumerate(names) if names.count(name) > 1]
        longer = [n for n in clash if depth[n] < len(whole[n])]
        if not longer:
            # Only endings tell them apart.
            return [paths[n] if n in clash else name for n, name in enumerate(names)]
        for n in longer:
            depth[n] += 1


def _plain(identity: Mapping[str, Any]) -> Any:
    """Return an identity as it comes back from a file."""
    return json.loads(json.dumps(identity))
