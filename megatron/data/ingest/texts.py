"""The texts of inputs, for those who want no tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron.data.ingest.chunks import line_of, read_chunks
from megatron.data.ingest.records import read_records
from megatron.data.ingest.sources import find_sources
from megatron.errors import DataError


def read_texts(
    inputs: Sequence[str], *, keys: Sequence[str] = ("text",), text_documents: str = "file"
) -> Iterator[str]:
    """Yield the texts of inputs, one after the other, all keys of a record in turn.

    Raises:
        DataError: as preprocessing, at the first unusable record.
    """
    for index, source in enumerate(find_sources(inputs, text_documents=text_documents)):
        for chunk in read_chunks(source, index, 0, keys):
            for record in read_records(chunk, keys):
                if record.problem is not None:
                    what = "row" if chunk.kind == "table" else "line"
                    line = line_of(chunk, record.number)
                    raise DataError(f"{chunk.path}, {what} {line}: {record.problem}")
                yield from record.texts
