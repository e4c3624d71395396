"""The records of one text file, table or saved data set, from any place on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron.data.ingest.chunks import import_arrow, line_of, read_chunks
from megatron.data.ingest.records import (
    BadRecordError,
    Chunk,
    chunk_bytes,
    decode_line,
    parse_json,
    without_mark,
)
from megatron.data.ingest.sources import Source
from megatron.data.ingest.stamps import stamp
from megatron.errors import DataError
from megatron.selection.base import Document
from megatron.selection.part import Naming, PartIndex, Row, hash_id
from megatron.selection.records import TEXT, content, own_id, wanted_columns

_TABLES: Final = ("parquet", "dataset")


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """One source of documents that are text.

    Attributes:
        name: that its documents bear as their source.
        source: the file.
        field: key of the text or conversation; None finds out.
        columns: that are read to score, of a table; () of other files.
    """

    name: str
    source: Source
    field: str | None
    columns: tuple[str, ...]

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for an index to be this part's, JSON-able."""
        return {"name": self.name, "field": self.field, "source": self.source.identity()}

    def build_index(self) -> PartIndex:
        """Read the whole source once: count, hash, and check every record.

        Raises:
            DataError: a record cannot be used, naming file and line, or the file is damaged.
        """
        digest = hashlib.sha256()
        firsts, positions, hashes = [], [], bytearray()
        number = 0
        for chunk in read_chunks(self.source, 0, 0, self.columns):
            firsts.append(number)
            positions.append(chunk.start)
            body = chunk_bytes(chunk)
            if chunk.kind != "table":
                digest.update(body)
            for line, raw in _raw_records(chunk, body):
                record = self._parsed(chunk, line, raw)
                try:
                    content(record, self.field)
                except BadRecordError as error:
                    raise self._refused(chunk, line, error) from None
                hashes += hash_id(own_id(record) or f"{self.name}:{number}")
                number += 1
        if self.source.kind in _TABLES:
            for file in _files(self.source):
                digest.update(stamp(str(file)).sha256.encode())
        return PartIndex(
            identity=self.identity(),
            sha256=digest.hexdigest(),
            documents=number,
            firsts=np.array(firsts, dtype=np.int64),
            positions=np.array(positions, dtype=np.int64),
            ids=np.frombuffer(bytes(hashes), dtype="<u8"),
        )

    def documents(
        self, index: PartIndex, naming: Naming, start: int, stop: int
    ) -> Iterator[Document]:
        """Yield documents [start, stop) of this part.

        Raises:
            DataError: the file has changed or cannot be read.
        """
        for row in self._rows(index, start, stop, self.columns):
            yield self._document(row, naming)

    def rows(self, index: PartIndex, naming: Naming, start: int, stop: int) -> Iterator[Row]:
        """Yield documents [start, stop) with their records as they are in the file."""
        columns = all_columns(self.source) if self.source.kind in _TABLES else ()
        for number, record in self._rows(index, start, stop, columns):
            yield Row(document=self._document((number, record), naming), record=_mapping(record))

    def close(self) -> None:
        """Nothing stays open."""

    def _rows(
        self, index: PartIndex, start: int, stop: int, columns: tuple[str, ...]
    ) -> Iterator[tuple[int, Any]]:
        if start >= stop:
            return
        number, position = start, start
        if self.source.kind not in _TABLES:  # whose positions are rows
            at = int(np.searchsorted(index.firsts, start, side="right")) - 1
            number, position = int(index.firsts[at]), int(index.positions[at])
        for chunk in read_chunks(self.source, 0, position, columns):
            for line, raw in _raw_records(chunk, chunk_bytes(chunk)):
                if number >= start:
                    yield number, self._parsed(chunk, line, raw)
                number += 1
                if number >= stop:
                    return
        raise DataError(
            f"{self.source.path}: {number:,} records, and there were {index.documents:,}: it has "
            "changed while it was read"
        )

    def _document(self, row: tuple[int, Any], naming: Naming) -> Document:
        number, record = row
        try:
            text, turns = content(record, self.field)
        except BadRecordError as error:
            raise DataError(
                f"{self.source.path}: record {number + 1} has changed while it was read: {error}"
            ) from None
        name = naming.id_of(own_id(record), self.name, number)
        return Document(id=name, source=self.name, number=number, text=text, turns=turns)

    def _parsed(self, chunk: Chunk, line: int, raw: Any) -> Any:
        try:
            if isinstance(raw, UnicodeDecodeError):
                raise BadRecordError(f"invalid UTF-8: {raw.reason}")
            if chunk.kind == "table":
                return raw
            text = decode_line(raw)
            return parse_json(text) if chunk.kind == "jsonl" else text
        except BadRecordError as error:
            raise self._refused(chunk, line, error) from None

    def _refused(self, chunk: Chunk, line: int, error: BadRecordError) -> DataError:
        what = "row" if chunk.kind == "table" else "line"
        return DataError(f"{chunk.path}, {what} {line_of(chunk, line)}: {error}")


def open_text_part(name: str, source: Source, field: str | None) -> TextPart:
    """Make a part of a file.

    Raises:
        DataError: a table has no column of text, or cannot be read.
    """
    columns: tuple[str, ...] = ()
    if source.kind in _TABLES:
        try:
            columns = wanted_columns(all_columns(source), field)
        except BadRecordError as error:
            message = str(error).replace("the record has", "its columns are")
            raise DataError(f"{source.path}: {message}") from None
    elif source.kind in ("text", "lines") and field not in (None, TEXT):
        raise DataError(f"{source.path}: plain text has no field '{field}'; leave out --field")
    return TextPart(name=name, source=source, field=field, columns=columns)


def all_columns(source: Source) -> tuple[str, ...]:
    """Return the columns of a table.

    Raises:
        DataError: it cannot be read.
        MissingExtraError: the library that reads it is not installed.
    """
    import_arrow(source.path)
    if source.kind == "dataset":
        return _dataset_columns(source.path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return tuple(pq.read_schema(source.path).names)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source.path}: not a readable Parquet file: {error}") from None


def _dataset_columns(path: str) -> tuple[str, ...]:
    from megatron.selection.libraries import load

    try:
        return tuple(load("datasets", f"reading {path}").load_from_disk(path).column_names)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a readable data set: {error}") from None


def _files(source: Source) -> list[Path]:
    path = Path(source.path)
    if source.kind != "dataset":
        return [path]
    return sorted(file for file in path.iterdir() if file.suffix == ".arrow")


def _raw_records(chunk: Chunk, body: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the records of a chunk, not yet parsed, each with its line in the chunk."""
    if chunk.kind == "table":
        yield from enumerate(_table_rows(body))
        return
    body = without_mark(chunk, body)
    if chunk.kind == "text":
        yield 0, body
        return
    for number, line in enumerate(body.split(b"\n")):
        if line and not line.isspace():
            yield number, line


def _table_rows(body: bytes) -> Iterator[Any]:
    import pyarrow as pa

    table = pa.ipc.open_stream(body).read_all()
    try:
        yield from table.to_pylist()
    except UnicodeDecodeError:
        for number in range(table.num_rows):
            try:
                yield table.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _mapping(record: Any) -> Mapping[str, Any]:
    return record if isinstance(record, Mapping) else {TEXT: record}
