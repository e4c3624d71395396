"""Documents, and the two things every corpus needs of them: no repeats, and honest splits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import DataError

SPLITS = ("train", "valid", "test")
BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text and where it came from.

    Attributes:
        text: the text, never empty.
        source: what a person would call its origin ("json/decoder.py", "block U+0900").
    """

    text: str
    source: str

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())

    @property
    def digest(self) -> bytes:
        """A hash of the text; it decides the document's place, so that names play no part."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).digest()


class RepeatFilter:
    """Drops what was seen before: paragraphs that many documents share, and whole documents.

    A manual quotes its own sections and source files share their preambles; a paragraph
    that stood in both a training and a validation document would make the validation
    loss a measure of memory.
    """

    def __init__(self, *, shortest: int = 60) -> None:
        """Start with nothing seen; paragraphs under ``shortest`` characters always pass."""
        self._shortest = shortest
        self._seen: set[bytes] = set()

    def __call__(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents without the paragraphs seen before, leaving out emptied ones."""
        for document in documents:
            kept = [part for part in document.text.split("\n\n") if self._is_new(part)]
            text = "\n\n".join(kept).strip("\n")
            if text.strip():
                yield Document(text=text + "\n", source=document.source)

    def _is_new(self, paragraph: str) -> bool:
        words = " ".join(paragraph.split())
        if len(words) < self._shortest:
            return True
        digest = hashlib.blake2b(words.encode(), digest_size=12).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True


def take_bytes(documents: Iterable[Document], limit: int) -> Iterator[Document]:
    """Yield documents until they hold ``limit`` bytes, and read no further."""
    total = 0
    for document in documents:
        yield document
        total += document.size
        if total >= limit:
            return


def split_documents(
    documents: Sequence[Document],
    *,
    valid_share: float = 0.06,
    test_share: float = 0.03,
    least_bytes: int = 48_000,
) -> dict[str, list[Document]]:
    """Share documents out to train, valid and test by their digests, each to one split only.

    Args:
        documents: texts that differ from each other.
        valid_share: share of the bytes that validation gets.
        test_share: share of the bytes that the test split gets.
        least_bytes: what validation gets at least (the test split half of it).

    Raises:
        DataError: there is too little text for three splits.
    """
    total = sum(document.size for document in documents)
    wanted = {
        "valid": max(int(total * valid_share), least_bytes),
        "test": max(int(total * test_share), least_bytes // 2),
    }
    if total < 4 * sum(wanted.values()):
        raise DataError(
            f"{total} bytes of text are too few for train, valid and test splits "
            f"(at least {4 * sum(wanted.values())} are needed)"
        )
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    held = dict.fromkeys(wanted, 0)
    for document in sorted(documents, key=lambda item: item.digest):
        size = document.size
        for name, want in wanted.items():
            # One huge document would be all of a small split: the large ones train.
            if held[name] < want and size <= want // 4:
                splits[name].append(document)
                held[name] += size
                break
        else:
            splits["train"].append(document)
    for name, want in wanted.items():
        if held[name] < want // 2:
            raise DataError(f"the documents are too large to make a {name} split of {want} bytes")
    return splits


def write_jsonl(path: Path, documents: Iterable[Document]) -> None:
    """Write documents as JSON lines with the keys ``text`` and ``meta``, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as stream:
        for document in documents:
            line = {"text": document.text, "meta": {"source": document.source}}
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def cut_documents(path: Path, target: Path, end: str) -> Path:
    """Write a text file that holds many documents as JSON lines, and return ``target``.

    Args:
        path: UTF-8 text; bytes that are not (a file cut off in mid-character) are replaced.
        target: the file to write; one that is there is taken as it is.
        end: what ends a document; it stays with the document.
    """
    if not target.exists():
        write_jsonl(target, _cut(path, end))
    return target


def _cut(path: Path, end: str) -> Iterator[Document]:
    held, number = "", 0
    with path.open(encoding="utf-8", errors="replace", newline="") as stream:
        while block := stream.read(BLOCK):
            *whole, held = (held + block).split(end)
            for text in whole:
                yield Document(text=text + end, source=f"{path.name} {number}")
                number += 1
    if held.strip():
        yield Document(text=held, source=f"{path.name} {number}")
