"""Chosen documents as JSON lines: their records as they were, with id and score, in the order."""

from __future__ import annotations

import base64
import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from megatron.checkpoint.files import replacing
from megatron.errors import RunError
from megatron.selection.base import FloatArray
from megatron.selection.choose import Places
from megatron.selection.corpus import DocumentCorpus
from megatron.selection.progress import Progress
from megatron.selection.records import ID

SCORE: Final = "score"
# Beside a score or an id that a record brings along.
OWN_SCORE: Final = "selection_score"
OWN_ID: Final = "selection_id"
_NOT_CHOSEN: Final = -1
# Records between two chosen ones that are cheaper to read past than to look up.
_GAP: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a file of chosen documents holds.

    Attributes:
        documents: how many.
        conversations: how many of them have turns.
    """

    documents: int
    conversations: int


def write_records(
    corpus: DocumentCorpus, chosen: Places, scores: FloatArray, path: Path
) -> Written:
    """Write the chosen documents' records in their order, atomically.

    The corpus is read once, in its own order, into a file beside; memory holds a place for each
    document and no text.

    Args:
        corpus: that was scored.
        chosen: [k] places in it, in order.
        scores: [n] of all its documents.
        path: of the file.

    Raises:
        DataError: a file of the corpus cannot be read any more.
        RunError: the disk is full.
    """
    ranks = np.full(len(corpus), _NOT_CHOSEN, dtype=np.int64)
    ranks[chosen] = np.arange(len(chosen))
    offsets = np.zeros((len(chosen), 2), dtype=np.int64)
    spool = path.with_name(f".{path.name}.spool")
    try:
        with spool.open("w+b") as beside:
            talks = _spool(corpus, ranks, scores, offsets, beside)
            _in_order(beside, offsets, path)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}; free disk space or choose "
            "another --out"
        ) from None
    finally:
        spool.unlink(missing_ok=True)
    return Written(documents=len(chosen), conversations=talks)


def _spool(
    corpus: DocumentCorpus, ranks: Places, scores: FloatArray, offsets: Places, out: IO[bytes]
) -> int:
    """Write the chosen records in the corpus's order; fill in where each stands."""
    progress = Progress(total=len(offsets), done=0, what="written")
    talks = position = 0
    try:
        for start, stop in _stretches(np.flatnonzero(ranks >= 0)):
            for place, row in enumerate(corpus.rows(start, stop), start=start):
                rank = int(ranks[place])
                if rank == _NOT_CHOSEN:
                    continue
                record = with_score(row.record, row.document.id, float(scores[place]))
                line = json.dumps(record, ensure_ascii=False, default=_plain).encode() + b"\n"
                out.write(line)
                offsets[rank] = position, len(line)
                position += len(line)
                talks += bool(row.document.turns)
                progress.add(1)
    finally:
        progress.close()
    return talks


def _stretches(places: Places) -> list[tuple[int, int]]:
    """Return the stretches [start, stop) of the corpus that are worth reading."""
    cuts = np.flatnonzero(np.diff(places) > _GAP) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(places, cuts)]


def _in_order(spool: IO[bytes], offsets: Places, path: Path) -> None:
    spool.flush()
    descriptor = spool.fileno()
    with replacing(path) as out:
        for position, length in offsets.tolist():
            out.write(os.pread(descriptor, length, position))


def with_score(record: Mapping[str, Any], name: str, score: float) -> dict[str, Any]:
    """Return a record with its document's id and score; what it has of its own stays."""
    found = dict(record)
    if found.get(ID) is None:
        found = {ID: name, **{key: value for key, value in found.items() if key != ID}}
    elif str(found[ID]) != name:
        found[OWN_ID] = name
    found[OWN_SCORE if SCORE in found else SCORE] = score
    return found


def _plain(value: Any) -> Any:
    """Return a table's value as JSON has it."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value)
