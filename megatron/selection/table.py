"""Scores as a Parquet file: one row per document, and what the scores are in its metadata.

Columns: ``id``, ``source``, ``number``, ``tokens`` (-1 = not counted), ``words``, one
``score:SUBTASK`` for each subtask, and ``score``, their aggregate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from megatron.errors import DataError, RunError
from megatron.selection.base import Cost, FloatArray
from megatron.selection.libraries import load

VERSION: Final = 1
METADATA_KEY: Final = b"neomix.selection"
SUBTASK_PREFIX: Final = "score:"
_PURPOSE: Final = "a table of scores"


@dataclass(frozen=True, kw_only=True)
class TableFacts:
    """What a table says of its scores.

    Attributes:
        method: that made them.
        parameters: of the method, JSON-able.
        aggregate: ``mean`` or ``max`` over the subtasks, or ``none``.
        task: name of the targets together; "" without.
        subtasks: names of the columns, in order.
        documents: how many rows.
        data: fingerprint of the corpus.
        parts: of each part of the corpus its name, documents and SHA-256.
        targets: hash of each subtask's examples.
        inputs: how its records were read (field, text_documents).
        chunk_documents: that were scored at a time.
        tokenizer: what counted the tokens; None = nothing did.
        cost: of scoring, preparation included.
    """

    method: str
    parameters: Mapping[str, Any]
    aggregate: str
    task: str
    subtasks: tuple[str, ...]
    documents: int
    data: str
    parts: tuple[Mapping[str, Any], ...]
    targets: Mapping[str, str]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    chunk_documents: int = 0
    tokenizer: Mapping[str, Any] | None = None
    cost: Cost = field(default_factory=Cost)

    def packed(self) -> bytes:
        """Return it as JSON."""
        content = {"version": VERSION, **asdict(self)}
        return json.dumps(content, ensure_ascii=False, sort_keys=True).encode()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Rows of a table.

    Attributes:
        ids: names of the documents.
        sources: of each.
        numbers: [n] places in the sources.
        tokens: [n] counts, -1 where nothing counted.
        words: [n] counts.
        subtasks: [n, subtasks] scores; [n, 0] without targets.
        score: [n] aggregates.
    """

    ids: Sequence[str]
    sources: Sequence[str]
    numbers: NDArray[np.int64]
    tokens: NDArray[np.int64]
    words: NDArray[np.int64]
    subtasks: FloatArray
    score: FloatArray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)


def join_rows(parts: Sequence[Scores]) -> Scores:
    """Return rows one after the other."""
    return Scores(
        ids=[name for part in parts for name in part.ids],
        sources=[name for part in parts for name in part.sources],
        numbers=np.concatenate([part.numbers for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        words=np.concatenate([part.words for part in parts]),
        subtasks=np.concatenate([part.subtasks for part in parts]),
        score=np.concatenate([part.score for part in parts]),
    )


def aggregate(scores: FloatArray, how: str) -> FloatArray:
    """Return one score per document [n] of its subtasks' [n, subtasks]; NaN where one is NaN.

    Args:
        scores: by document and subtask.
        how: ``mean``, ``max`` or ``none`` (there is one column).
    """
    found: FloatArray
    if how == "none":
        found = scores[:, 0]
    elif how == "mean":
        found = scores.mean(axis=1)
    elif how == "max":
        found = scores.max(axis=1)
    else:
        raise ValueError(f"aggregate '{how}'")
    return np.asarray(found, dtype=np.float64)


class TableWriter:
    """Writes a table under a temporary name and renames it when it is whole and durable."""

    def __init__(self, path: Path, facts: TableFacts) -> None:
        """Start the file.

        Raises:
            RunError: it cannot be written.
        """
        pyarrow = load("pyarrow", _PURPOSE)
        parquet = load("pyarrow.parquet", _PURPOSE)
        self._pa, self._path, self._facts = pyarrow, path, facts
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._schema = _schema(pyarrow, facts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise _unwritable(path, error) from None
        self._writer = parquet.ParquetWriter(
            self._file,
            self._schema,
            compression="zstd",
            use_dictionary=["source"],
            write_page_checksum=True,
        )

    def add(self, rows: Scores) -> None:
        """Write rows as one row group."""
        columns = [rows.ids, rows.sources, rows.numbers, rows.tokens, rows.words]
        columns += [rows.subtasks[:, place] for place in range(rows.subtasks.shape[1])]
        columns.append(rows.score)
        arrays = [
            self._pa.array(column, type=kind)
            for column, kind in zip(columns, self._schema.types, strict=True)
        ]
        try:
            self._writer.write_table(self._pa.Table.from_arrays(arrays, schema=self._schema))
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def close(self) -> None:
        """Finish the file and give it its name.

        Raises:
            RunError: it cannot be written.
        """
        try:
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._path)
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def abort(self) -> None:
        """Give the file up."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)


class ScoreTable:
    """A table that is there, read by row group."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open a table.

        Raises:
            DataError: there is none, or the file is something else.
        """
        self.path = Path(path)
        pyarrow = load("pyarrow", _PURPOSE)
        self._unreadable = (pyarrow.ArrowException, OSError)
        try:
            self._file = load("pyarrow.parquet", _PURPOSE).ParquetFile(
                self.path, page_checksum_verification=True
            )
        except FileNotFoundError:
            raise DataError(
                f"{self.path}: no such table; make one with tools/select_data.py score"
            ) from None
        except self._unreadable as error:
            raise DataError(f"{self.path}: not a readable Parquet file: {error}") from None
        try:
            self.facts = read_facts(self.path, self._file.schema_arrow.metadata or {})
            if not self._file.schema_arrow.equals(_schema(pyarrow, self.facts)):
                raise self._changed("columns are missing, or of another kind")
        except DataError:
            self._file.close()
            raise

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._file.metadata.num_rows)

    def read(self) -> Iterator[Scores]:
        """Yield the rows, one row group at a time."""
        for group in range(self._file.num_row_groups):
            yield _scores(self._group(group), self.facts.subtasks)

    def columns(self, *names: str) -> dict[str, NDArray[Any]]:
        """Return whole columns of numbers, and of ``source`` the number of each row's part.

        Raises:
            DataError: the rows are damaged, or not those of the corpus in its order.
        """
        found: dict[str, list[NDArray[Any]]] = {name: [] for name in ("source", "number", *names)}
        codes = {str(part["name"]): code for code, part in enumerate(self.facts.parts)}
        for group in range(self._file.num_row_groups):
            table = self._group(group, list(found))
            for name in found:
                column = table.column(name)
                if name == "source":
                    values = [codes.get(one, -1) for one in column.to_pylist()]
                    found[name].append(np.array(values, dtype=np.int32))
                else:
                    found[name].append(column.to_numpy(zero_copy_only=False))
        whole = {name: np.concatenate(parts) for name, parts in found.items() if parts}
        self._check_places(whole)
        return {name: whole[name] for name in names}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _group(self, number: int, names: list[str] | None = None) -> Any:
        try:
            return self._file.read_row_group(number, columns=names)
        except self._unreadable as error:
            raise self._changed(str(error).splitlines()[0]) from None

    def _check_places(self, columns: Mapping[str, NDArray[Any]]) -> None:
        """Raise DataError unless there is a row for each document, in the corpus's order."""
        sizes = [int(part["documents"]) for part in self.facts.parts]
        if len(self) != sum(sizes) or not len(self):
            raise self._changed(f"{len(self):,} rows for {sum(sizes):,} documents")
        sources = np.repeat(np.arange(len(sizes)), sizes)
        numbers = np.concatenate([np.arange(size) for size in sizes])
        same = np.array_equal(columns["source"], sources)
        if not same or not np.array_equal(columns["number"], numbers):
            raise self._changed("its rows do not stand in the order of the documents")

    def _changed(self, what: str) -> DataError:
        return DataError(f"{self.path}: damaged or changed since it was made ({what}); score again")


def read_facts(path: Path, metadata: Mapping[bytes, bytes]) -> TableFacts:
    """Read what a table says of itself.

    Raises:
        DataError: it is not one of ours, or of a later version.
    """
    packed = metadata.get(METADATA_KEY)
    if packed is None:
        raise DataError(
            f"{path}: not a table of scores; name one that tools/select_data.py score has made"
        )
    try:
        content = json.loads(packed)
        version = content.pop("version")
        if version != VERSION:
            raise DataError(
                f"{path}: a table of version {version}, and this program reads {VERSION}; score "
                "the documents again"
            )
        cost = Cost(**content.pop("cost"))
        subtasks, parts = tuple(content.pop("subtasks")), tuple(content.pop("parts"))
        return TableFacts(**content, subtasks=subtasks, parts=parts, cost=cost)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: its metadata is damaged: {error}; score again") from None


def remove_left_over(path: Path) -> None:
    """Remove what killed writers of a table have left beside it."""
    prefix, suffix = f".{path.name}.", ".tmp"
    if not path.parent.is_dir():
        return
    for file in path.parent.iterdir():
        if file.name.startswith(prefix) and file.name.endswith(suffix):
            file.unlink(missing_ok=True)


def _schema(pa: Any, facts: TableFacts) -> Any:
    fields = [
        ("id", pa.string()),
        ("source", pa.string()),
        ("number", pa.int64()),
        ("tokens", pa.int64()),
        ("words", pa.int64()),
        *((SUBTASK_PREFIX + name, pa.float64()) for name in facts.subtasks),
        ("score", pa.float64()),
    ]
    return pa.schema(fields, metadata={METADATA_KEY: facts.packed()})


def _scores(table: Any, subtasks: Sequence[str]) -> Scores:
    def numbers(name: str) -> NDArray[Any]:
        found: NDArray[Any] = table.column(name).to_numpy()
        return found

    columns = [numbers(SUBTASK_PREFIX + name) for name in subtasks]
    return Scores(
        ids=table.column("id").to_pylist(),
        sources=table.column("source").to_pylist(),
        numbers=numbers("number"),
        tokens=numbers("tokens"),
        words=numbers("words"),
        subtasks=np.stack(columns, axis=1) if columns else np.zeros((table.num_rows, 0)),
        score=numbers("score"),
    )


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"{path}: cannot be written: {error.strerror or error}; free disk space or choose another "
        "place"
    )
