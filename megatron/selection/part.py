"""What the parts of a corpus have in common: an index of where records are, and their names."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron.checkpoint.files import replacing
from megatron.selection.base import Document

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PartIndex:
    """What one reading of a part has told.

    Attributes:
        identity: of the part that it is of.
        sha256: hash (hex) of the content.
        documents: how many records there are.
        firsts: [c] number of the first record of each stretch.
        positions: [c] where the stretch begins, in the reader's unit.
        ids: [documents] hashes of the records' own ids (of their places where they have none);
            [0] if the part has no ids of its own.
    """

    identity: Mapping[str, Any]
    sha256: str
    documents: int
    firsts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    positions: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    ids: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How documents get their ids.

    Attributes:
        kind: ``own`` (the record's own id), ``source`` (``SOURCE/ID``, where two sources have an
            id in common) or ``place`` (``SOURCE:NUMBER``, where one source has an id twice).
    """

    kind: Literal["own", "source", "place"] = "own"

    def id_of(self, own: str | None, source: str, number: int) -> str:
        """Return the id of a record."""
        if own is None or self.kind == "place":
            return f"{source}:{number}"
        return own if self.kind == "own" else f"{source}/{own}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A document and the record that it comes from.

    Attributes:
        document: as the selectors see it.
        record: as it is in the file; ``{"text": …}`` of what is no object there.
    """

    document: Document
    record: Mapping[str, Any]


class Part(Protocol):
    """One source of a corpus."""

    @property
    def name(self) -> str:
        """Name that its documents bear as their source."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for an index to be this part's, JSON-able."""
        ...

    def build_index(self) -> PartIndex:
        """Read the part once and check every record."""
        ...

    def documents(
        self, index: PartIndex, naming: Naming, start: int, stop: int
    ) -> Iterator[Document]:
        """Yield documents [start, stop) of this part."""
        ...

    def rows(self, index: PartIndex, naming: Naming, start: int, stop: int) -> Iterator[Row]:
        """Yield them with their records."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


def hash_id(name: str) -> bytes:
    """Return eight bytes of a name's hash."""
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def naming_of(indexes: Sequence[PartIndex]) -> Naming:
    """Return the naming under which no two documents have the same id."""
    groups = [index.ids for index in indexes if len(index.ids)]
    if any(_repeats(ids) for ids in groups):
        return Naming(kind="place")
    if len(groups) > 1 and _repeats(np.concatenate(groups)):
        return Naming(kind="source")
    return Naming(kind="own")


def _repeats(ids: NDArray[np.uint64]) -> bool:
    ordered = np.sort(ids)
    return bool((ordered[1:] == ordered[:-1]).any())


def read_index(path: Path, identity: Mapping[str, Any]) -> PartIndex | None:
    """Read an index; None if there is none, or it is another part's."""
    try:
        with np.load(path, allow_pickle=False) as found:
            head = json.loads(bytes(found["head"]))
            if head.get("version") != _VERSION or head["identity"] != identity:
                return None
            return PartIndex(
                identity=identity,
                sha256=head["sha256"],
                documents=head["documents"],
                firsts=found["firsts"],
                positions=found["positions"],
                ids=found["ids"],
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write_index(path: Path, index: PartIndex) -> None:
    """Write an index atomically and durably."""
    head = {
        "version": _VERSION,
        "identity": dict(index.identity),
        "sha256": index.sha256,
        "documents": index.documents,
    }
    packed = np.frombuffer(json.dumps(head).encode(), dtype=np.uint8)
    with replacing(path) as out:
        np.savez(out, head=packed, firsts=index.firsts, positions=index.positions, ids=index.ids)
