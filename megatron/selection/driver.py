"""Scoring a corpus: prepared once, then chunk by chunk, by one process or many, past any kill.

The corpus is cut into chunks at the same documents whatever the number of processes.  A chunk's
scores are a file that is whole or not there; the table is these files one after the other.  So a
killed scoring loses at most a chunk for each process, and the table is the same to the byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.errors import ConfigError, DataError
from megatron.selection.base import Say
from megatron.selection.chunk_scoring import score_shard
from megatron.selection.corpus import DocumentCorpus
from megatron.selection.inputs import open_corpus
from megatron.selection.merging import finished, join_chunks
from megatron.selection.settings import ScoreRequest, chunk_count, named_words, settings_of
from megatron.selection.table import ScoreTable, TableFacts
from megatron.selection.work import WorkFolder, difference, work_folder


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What a call has done.

    Attributes:
        table: what the table says of itself, if it is there now.
        scored: documents that this call has scored.
        left: chunks that other shards have not scored yet.
    """

    table: TableFacts | None
    scored: int
    left: int = 0


def score(request: ScoreRequest, say: Say = lambda line: None) -> Scored:
    """Score a corpus or a shard of it; go on where a killed call stopped.

    Raises:
        NeomixError: bad input, another scoring in the folder, a full disk.
    """
    _check(request)
    work = work_folder(request.out, request.work)
    alone = request.shard.count == 1
    shard = f"shard-{request.shard.index}-of-{request.shard.count}"
    with work.lock("use", shared=not alone), work.lock(shard):
        if request.overwrite:
            _forget(work, request.out)
        with work.lock("prepare", wait=say):
            corpus = _open(request, work, say)
            settings = settings_of(request, corpus)
            done = finished(request.out, settings)
            if done is not None:
                corpus.close()
                return Scored(table=done, scored=0)
            _take_up(work, settings, named_words(request.inputs))
            _prepare(request, corpus, work, say)
        try:
            scored = score_shard(request, corpus, work, settings, say)
        finally:
            corpus.close()
        if alone:
            return Scored(table=join_chunks(work, request.out, settings), scored=scored)
        left = sum(not work.chunk(n).exists() for n in range(chunk_count(settings)))
        return Scored(table=None, scored=scored, left=left)


# -- what is asked --------------------------------------------------------------------------


def _check(request: ScoreRequest) -> None:
    if request.selector.needs_targets and not request.subtasks:
        raise ConfigError(
            f"--method {request.selector.method} compares documents with targets; give --target"
        )
    if request.overwrite and request.shard.count > 1:
        raise ConfigError(
            "--overwrite would throw away what other shards have done; delete the table and its "
            ".work folder, and start the shards without it"
        )
    if request.chunk_documents < 1:
        raise ConfigError(f"--chunk-documents {request.chunk_documents}: at least 1")


def _open(request: ScoreRequest, work: WorkFolder, say: Say) -> DocumentCorpus:
    return open_corpus(request.inputs, tokenizer=request.tokenizer, folder=work.index, say=say)


def _take_up(work: WorkFolder, settings: Mapping[str, Any], words: Sequence[str]) -> None:
    """Write down what is asked, or make sure that it is what was begun.

    Raises:
        DataError: it is not.
    """
    begun = work.settings()
    if begun is None:
        work.begin(settings, words)
        return
    other = difference(settings, begun)
    if other is not None:
        raise DataError(
            f"{work.path}: holds another scoring that was begun ({other}); give --overwrite to "
            "start again, or another --out"
        )


def _forget(work: WorkFolder, out: Path) -> None:
    """Remove what is there; the indexes stay, which know what they are of."""
    for folder in (work.chunks, work.prepared):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (work.path / "prepared.json", work.path / "journal.json"):
        file.unlink(missing_ok=True)
    if out.exists():
        ScoreTable(out).close()  # what is no table is not ours to delete
        out.unlink()


def _prepare(request: ScoreRequest, corpus: DocumentCorpus, work: WorkFolder, say: Say) -> None:
    if work.preparation() is not None:
        return
    work.prepared.mkdir(parents=True, exist_ok=True)
    work.chunks.mkdir(parents=True, exist_ok=True)
    cost = request.selector.prepare(corpus, request.subtasks, work.prepared, say)
    work.end_preparation(asdict(cost))
