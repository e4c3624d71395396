"""Cutting inputs into chunks, from any position on, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any

from megatron.data.ingest.records import Chunk
from megatron.data.ingest.sources import Source
from megatron.data.ingest.streams import read_blocks
from megatron.errors import DataError, MissingExtraError, did_you_mean

CHUNK_BYTES = 1 << 20
# One plain-text file is one document, held in memory with its tokens.
LARGEST_TEXT = 1 << 30
_FEWEST_ROWS, _MOST_ROWS = 1, 1 << 16


def read_chunks(
    source: Source,
    index: int,
    start: int,
    keys: Sequence[str],
    stretch: range | None = None,
) -> Iterator[Chunk]:
    """Yield the chunks of one input from position ``start`` on.

    The cut depends on the input and the stretch alone, never on ``start`` or the number of workers.
    Stretches that lie end to end give every record once, in order.

    Args:
        source: the input.
        index: its place in the list of inputs.
        start: 0, or the ``stop`` of a chunk yielded before.
        keys: columns to read, for tables.
        stretch: bytes of the input on disk; what begins in them is read.  Of tables it is as
            large a share of the rows; of compressed files what is unpacked from them (all before
            is unpacked too, and thrown away).  None = all.

    Raises:
        DataError: the input is damaged, lacks a column, or a text file is too large.
    """
    stretch = range(source.size) if stretch is None else stretch
    if source.size and not stretch:
        return
    if source.kind in ("parquet", "dataset"):
        yield from _table_chunks(source, index, start, keys, stretch)
    elif source.kind == "text":
        if stretch.start == 0:
            yield from _whole_text(source, index, start)
    elif source.compression:
        yield from _compressed_lines(source, index, start, stretch)
    else:
        yield from _plain_lines(source, index, start, stretch)


def _plain_lines(source: Source, index: int, start: int, stretch: range) -> Iterator[Chunk]:
    """Cut at newlines; workers read their stretch of the file themselves."""
    with open(source.path, "rb") as file:
        first, end = (_line_start(file, at, source.size) for at in (stretch.start, stretch.stop))
        start = max(start, first)
        while start < end:
            file.seek(min(start + CHUNK_BYTES, end))
            file.readline()
            stop = min(file.tell(), end)
            yield Chunk(
                source=index,
                path=source.path,
                kind=source.kind,
                start=start,
                stop=stop,
                consumed=stop,
            )
            start = stop


def _line_start(file: IO[bytes], at: int, size: int) -> int:
    """Return where the first line begins at ``at`` or after it."""
    if not 0 < at < size:
        return at
    file.seek(at - 1)
    file.readline()
    return min(file.tell(), size)


def _compressed_lines(source: Source, index: int, start: int, stretch: range) -> Iterator[Chunk]:
    position, line = 0, 1
    pending: list[bytes] = []
    pending_bytes = 0

    def cut(content: bytes, consumed: int) -> Iterator[Chunk]:
        skip = max(0, min(start - position, len(content)))
        if content[skip:] and stretch.start < consumed <= stretch.stop:
            yield Chunk(
                source=index,
                path=source.path,
                kind=source.kind,
                start=position + skip,
                stop=position + len(content),
                consumed=consumed,
                payload=content[skip:],
                first_line=line + content.count(b"\n", 0, skip),
            )

    for block, consumed in read_blocks(source.path, source.compression):
        pending.append(block)
        pending_bytes += len(block)
        if pending_bytes < CHUNK_BYTES or b"\n" not in block:
            continue
        content = b"".join(pending)
        end = content.rfind(b"\n") + 1
        content, rest = content[:end], content[end:]
        yield from cut(content, consumed)
        if consumed > stretch.stop:
            return
        position += len(content)
        line += content.count(b"\n")
        pending, pending_bytes = [rest], len(rest)
    yield from cut(b"".join(pending), source.size)


def _whole_text(source: Source, index: int, start: int) -> Iterator[Chunk]:
    if start or not source.size:
        return
    payload: bytes | None = None
    size = source.size
    if source.compression:
        blocks = []
        size = 0
        for block, _ in read_blocks(source.path, source.compression):
            size += len(block)
            _check_text_size(source.path, size)
            blocks.append(block)
        payload = b"".join(blocks)
    _check_text_size(source.path, size)
    yield Chunk(
        source=index,
        path=source.path,
        kind="text",
        start=0,
        stop=size,
        consumed=source.size,
        payload=payload,
        first_line=1,
    )


def _check_text_size(path: str, size: int) -> None:
    if size > LARGEST_TEXT:
        raise DataError(
            f"{path}: more than {LARGEST_TEXT >> 20} MiB of plain text as one document; give "
            "--text-documents line if each line is one, or cut the file"
        )


def _table_chunks(
    source: Source, index: int, start: int, keys: Sequence[str], stretch: range
) -> Iterator[Chunk]:
    """Send rows as Arrow streams, so that any Arrow-backed format looks the same to a worker."""
    import_arrow(source.path)
    import pyarrow as pa

    batches = _parquet_batches if source.kind == "parquet" else _dataset_batches
    position = 0
    for table, rows_total in batches(source, start, keys, stretch):
        if isinstance(table, int):  # rows skipped without being read
            position += table
            continue
        own = _rows(source, rows_total, stretch)
        whole = position + table.num_rows
        stop = min(whole, own.stop)
        skip = max(0, min(max(start, own.start) - position, table.num_rows))
        if position + skip < stop:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write(table.slice(skip, stop - position - skip))
            yield Chunk(
                source=index,
                path=source.path,
                kind="table",
                start=position + skip,
                stop=stop,
                consumed=source.size * stop // max(rows_total, 1),
                payload=sink.getvalue().to_pybytes(),
                first_line=position + skip + 1,
            )
        position = whole


def _rows(source: Source, rows: int, stretch: range) -> range:
    """Return which of an input's rows belong to a stretch of its bytes."""
    return range(*(rows * at // max(source.size, 1) for at in (stretch.start, stretch.stop)))


def _parquet_batches(
    source: Source, start: int, keys: Sequence[str], stretch: range
) -> Iterator[tuple[Any, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source.path) as file:
            _check_columns(source.path, keys, file.schema_arrow.names)
            total = file.metadata.num_rows
            own = _rows(source, total, stretch)
            first = 0
            for group in range(file.num_row_groups):
                meta = file.metadata.row_group(group)
                if first + meta.num_rows <= max(start, own.start) or first >= own.stop:
                    yield meta.num_rows, total
                else:
                    rows = _rows_per_chunk(meta.total_byte_size, meta.num_rows)
                    for batch in file.iter_batches(
                        batch_size=rows, row_groups=[group], columns=list(keys)
                    ):
                        yield batch, total
                first += meta.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{source.path}: not a readable Parquet file: {error}") from None


def _dataset_batches(
    source: Source, start: int, keys: Sequence[str], stretch: range
) -> Iterator[tuple[Any, int]]:
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "train", f"reading {source.path}") from None
    try:
        opened = datasets.load_from_disk(source.path)
    except Exception as error:
        raise DataError(f"{source.path}: not a readable data set: {error}") from None
    _check_columns(source.path, keys, opened.column_names)
    arrow = opened.select_columns(list(keys)).with_format("arrow")
    total = len(arrow)
    rows = _rows_per_chunk(arrow[: min(total, 100)].nbytes, min(total, 100)) if total else 1
    own = _rows(source, total, stretch)
    skipped = max(start, own.start) // rows * rows
    yield skipped, total
    for first in range(skipped, own.stop, rows):
        yield arrow[first : min(first + rows, total)].combine_chunks(), total


def _rows_per_chunk(size: int, rows: int) -> int:
    """Return how many rows are about one chunk; a function of the file alone."""
    return max(_FEWEST_ROWS, min(_MOST_ROWS, CHUNK_BYTES * max(rows, 1) // max(size, 1)))


def _check_columns(path: str, keys: Sequence[str], columns: Sequence[str]) -> None:
    for key in keys:
        if key not in columns:
            raise DataError(
                f"{path}: no column '{key}'{did_you_mean(key, columns)} (it has: "
                f"{', '.join(columns)}); name the right one with --jsonl-keys"
            )


def import_arrow(path: str) -> None:
    """Make sure that Arrow is there.

    Raises:
        MissingExtraError: it is not.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise MissingExtraError("pyarrow", "train", f"reading {path}") from None


def line_of(chunk: Chunk, number: int) -> int:
    """Return the line or row, from 1, of a chunk's record ``number``."""
    if chunk.first_line is not None:
        return chunk.first_line + number
    lines = 0
    left = chunk.start
    with open(chunk.path, "rb") as file:
        while left > 0 and (block := file.read(min(left, CHUNK_BYTES))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines + number + 1
