"""From a chunk of input to documents: what is a record, and what is wrong with one."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.errors import did_you_mean

# GPT-NeoX's reader joins a list of paragraphs so.
PARAGRAPH_JOIN = "\n\n"
_SHOWN_KEYS = 8

Repair = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A stretch of one input, small enough to hold in memory; picklable.

    Attributes:
        source: index of the input in the list of inputs.
        path: the input, for messages.
        kind: which reader understands it: "jsonl", "lines", "text" or "table".
        start: where it starts, in the reader's unit (bytes after decompression, or rows).
        stop: where it ends: the position to go on from.
        consumed: bytes of the input file read once this chunk is done, for the progress.
        payload: the content; None if it is to be read from the file at ``start``.
        first_line: number of the first line or row, from 1; None if it has to be counted.
    """

    source: int
    path: str
    kind: str
    start: int
    stop: int
    consumed: int
    payload: bytes | None = None
    first_line: int | None = None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of a chunk: a text for each key, or what is wrong with it.

    Attributes:
        number: line or row within the chunk, from 0.
        texts: one per key, in the order of the keys; empty if ``problem`` is set.
        problem: None, or a sentence for the user.
    """

    number: int
    texts: tuple[str, ...] = ()
    problem: str | None = None


class BadRecordError(ValueError):
    """A record that cannot be used; the message says why."""


def read_records(
    chunk: Chunk, keys: Sequence[str], repair: Repair | None = None
) -> Iterator[Record]:
    """Yield the records of a chunk, each text passed through ``repair`` first."""
    if chunk.kind == "table":
        yield from _table_records(chunk, keys, repair)
        return
    content = without_mark(chunk, chunk_bytes(chunk))
    if chunk.kind == "text":
        yield _text_record(content, repair)
        return
    for number, line in enumerate(_lines(content)):
        try:
            if isinstance(line, bytes):
                line = decode_line(line)
            if line and not line.isspace():
                if chunk.kind == "lines":
                    texts: tuple[str, ...] = (_checked(line, keys[0], repair),)
                else:
                    texts = parse_json_line(line, keys, repair)
                yield Record(number=number, texts=texts)
        except BadRecordError as error:
            yield Record(number=number, problem=str(error))


def chunk_bytes(chunk: Chunk) -> bytes:
    """Return the content of a chunk, as it is in the input."""
    if chunk.payload is not None:
        return chunk.payload
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start)
        return file.read(chunk.stop - chunk.start)


def without_mark(chunk: Chunk, content: bytes) -> bytes:
    """Return the content of a chunk of text without the mark that a file may begin with."""
    return content.removeprefix(codecs.BOM_UTF8) if chunk.start == 0 else content


def parse_json_line(
    line: str, keys: Sequence[str], repair: Repair | None = None
) -> tuple[str, ...]:
    """Return the texts of one line of JSON.

    A line that is a bare string is a document itself.

    Raises:
        BadRecordError: no JSON, no object, a key is missing or holds no text.
    """
    record = parse_json(line)
    if isinstance(record, str) and len(keys) == 1:
        return (_checked(record, keys[0], repair),)
    if not isinstance(record, dict):
        raise BadRecordError(
            f"{json_name(record)}, not a JSON object with the key{'s' * (len(keys) > 1)} "
            + ", ".join(f"'{key}'" for key in keys)
        )
    return tuple(_field(record, key, repair) for key in keys)


def parse_json(line: str) -> Any:
    """Return what a line of JSON says.

    Raises:
        BadRecordError: it is none.
    """
    try:
        return json.loads(line)
    except RecursionError:
        raise BadRecordError("not usable JSON: nested too deeply") from None
    except ValueError as error:
        raise BadRecordError(_json_problem(line, error)) from None


def as_text(value: Any, key: str, repair: Repair | None = None) -> str:
    """Return a field's value as one text; a list of paragraphs is joined by blank lines.

    Raises:
        BadRecordError: it is neither.
    """
    if isinstance(value, str):
        return _checked(value, key, repair)
    if isinstance(value, UnicodeDecodeError):
        raise BadRecordError(f"'{key}' is invalid UTF-8: {value.reason}")
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return _checked(PARAGRAPH_JOIN.join(value), key, repair)
    raise BadRecordError(f"'{key}' is {json_name(value)}, not text")


def _field(record: Mapping[str, Any], key: str, repair: Repair | None) -> str:
    if key not in record:
        raise BadRecordError(
            f"no key '{key}'{did_you_mean(key, record)} {shown_keys(record)}; name the right one "
            "with --jsonl-keys"
        )
    return as_text(record[key], key, repair)


def shown_keys(record: Mapping[str, Any]) -> str:
    """Return ``(the record has: 'id', 'body')``, for messages."""
    shown = ", ".join(f"'{name}'" for name in list(record)[:_SHOWN_KEYS])
    more = ", …" if len(record) > _SHOWN_KEYS else ""
    return f"(the record has: {shown or 'nothing'}{more})"


def _checked(text: str, key: str, repair: Repair | None) -> str:
    return sound_text(repair(text) if repair is not None and text else text, key)


def sound_text(text: str, key: str) -> str:
    """Return a field's text as it is.

    Raises:
        BadRecordError: it cannot be written as UTF-8.
    """
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRecordError(
                f"'{key}' holds half a surrogate pair (\\u{ord(text[error.start]):04x}), which is "
                "no character"
            ) from None
    return text


def _lines(content: bytes) -> Sequence[str | bytes]:
    """Split into lines at newlines only: a JSON text may hold every other line separator."""
    try:
        return content.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        return content.split(b"\n")


def decode_line(line: bytes) -> str:
    """Return a line's text.

    Raises:
        BadRecordError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecordError(_utf8_problem(line, error)) from None


def _text_record(content: bytes, repair: Repair | None) -> Record:
    try:
        text = content.decode("utf-8")
        return Record(number=0, texts=(repair(text) if repair else text,))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start)
        return Record(number=line, problem=_utf8_problem(content, error))


def _utf8_problem(content: bytes, error: UnicodeDecodeError) -> str:
    return (
        f"invalid UTF-8: byte 0x{content[error.start]:02x} ({error.reason}); convert the file "
        "to UTF-8 (iconv)"
    )


def _json_problem(line: str, error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        shown = line.strip()
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        return f"not JSON: {error.msg} at column {error.pos + 1}: {shown!r}"
    return f"not usable JSON: {error}"


def json_name(value: Any) -> str:
    """Return what kind of value JSON has here, for messages."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def _table_records(chunk: Chunk, keys: Sequence[str], repair: Repair | None) -> Iterator[Record]:
    import pyarrow as pa

    assert chunk.payload is not None
    table = pa.ipc.open_stream(chunk.payload).read_all()
    columns = [_values(table.column(key)) for key in keys]
    for number in range(table.num_rows):
        try:
            texts = tuple(
                as_text(column[number], key, repair)
                for column, key in zip(columns, keys, strict=True)
            )
            yield Record(number=number, texts=texts)
        except BadRecordError as error:
            yield Record(number=number, problem=str(error))


def _values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_cell(value) for value in column]


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error
