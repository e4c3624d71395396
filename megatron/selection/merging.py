"""From the chunks of all shards to one table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from megatron.errors import DataError
from megatron.selection.base import Cost
from megatron.selection.libraries import load
from megatron.selection.settings import chunk_count, facts_of, ranges_of
from megatron.selection.table import (
    Scores,
    ScoreTable,
    TableFacts,
    TableWriter,
    join_rows,
    read_facts,
    remove_left_over,
)
from megatron.selection.work import WorkFolder, difference, work_folder

_GROUP_ROWS: Final = 1 << 14


def merge(out: Path, work: Path | None = None) -> TableFacts:
    """Make the table of what all shards have scored.

    Raises:
        DataError: nothing was begun, or shards are missing.
        RunError: a shard is at work, or the disk is full.
    """
    folder = work_folder(out, work)
    if not folder.path.exists():
        raise DataError(f"{out}: nothing was scored for it ({folder.path} does not exist)")
    with folder.lock("use"):
        settings = folder.settings()
        if settings is None:
            raise DataError(f"{folder.path}: nothing was begun here; score the shards first")
        done = finished(out, settings)
        return done if done is not None else join_chunks(folder, out, settings)


def finished(out: Path, settings: Mapping[str, Any]) -> TableFacts | None:
    """Return what a finished table says of itself; None if there is none.

    Raises:
        DataError: it is of other documents, targets or parameters.
    """
    if not out.exists():
        return None
    table = ScoreTable(out)
    table.close()
    found = table.facts
    # Files may have moved.
    wanted = json.loads(facts_of(settings, found.cost, found.inputs["words"]).packed())
    hashes = {"data": wanted.pop("data")}  # last: what else differs says more
    other = difference({**wanted, **hashes}, json.loads(found.packed()))
    if other is not None:
        raise DataError(
            f"{out}: holds another scoring ({other}); give --overwrite to replace it, or another "
            "--out"
        )
    return found


def join_chunks(work: WorkFolder, out: Path, settings: Mapping[str, Any]) -> TableFacts:
    """Put the chunks together, then let go of them.

    Raises:
        DataError: some are missing or damaged.
    """
    chunks = [work.chunk(number) for number in range(chunk_count(settings))]
    missing = [number for number, path in enumerate(chunks) if not path.exists()]
    prepared = work.preparation()
    if missing or prepared is None:
        size, last = settings["chunk_documents"], settings["documents"]
        ranges = [f"{r.start * size:,}-{min(r.stop * size, last):,}" for r in ranges_of(missing)]
        shown = ", ".join(ranges[:4]) + (", …" if len(ranges) > 4 else "")
        raise DataError(
            f"{out}: {len(missing)} of {len(chunks)} chunks are not scored (documents {shown}); "
            "give every shard's command again, then merge"
        )
    cost = Cost(**prepared)
    for path in chunks:
        cost = cost + _chunk_facts(path).cost
    facts = facts_of(settings, cost, work.words())
    remove_left_over(out)  # nobody else writes it: the folder of work is ours alone
    writer = TableWriter(out, facts)
    try:
        for rows in _in_groups(chunks):
            writer.add(rows)
        writer.close()
    except BaseException:
        writer.abort()
        raise
    shutil.rmtree(work.chunks, ignore_errors=True)
    return facts


def _chunk_facts(path: Path) -> TableFacts:
    try:
        metadata = load("pyarrow.parquet", "scoring").read_metadata(path).metadata
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    return read_facts(path, metadata or {})


def _damaged(path: Path, why: object) -> DataError:
    return DataError(f"{path}: damaged ({why}); delete it and give the scoring's command again")


def _in_groups(chunks: Sequence[Path]) -> Iterator[Scores]:
    """Yield the rows of chunks, of so many that row groups are not too small."""
    held: list[Scores] = []
    for path in chunks:
        table = ScoreTable(path)
        try:
            held += table.read()
        except DataError:
            raise _damaged(path, "its scores cannot be read") from None
        finally:
            table.close()
        if sum(map(len, held)) >= _GROUP_ROWS:
            yield join_rows(held)
            held = []
    if held:
        yield join_rows(held)
