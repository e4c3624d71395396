"""Scoring the chunks of a shard, each into a file that is whole or not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from megatron.selection.base import Cost, Document, FloatArray, Say
from megatron.selection.corpus import DocumentCorpus
from megatron.selection.progress import Progress
from megatron.selection.settings import ScoreRequest, chunk_count, facts_of, ranges_of
from megatron.selection.table import Scores, TableFacts, TableWriter, aggregate
from megatron.selection.token_counts import Counts, Encoder, count_words
from megatron.selection.work import WorkFolder

# Text that a selector is given at once, in characters: bounds memory where documents are long.
_BATCH_CHARACTERS: Final = 1 << 24


def score_shard(
    request: ScoreRequest,
    corpus: DocumentCorpus,
    work: WorkFolder,
    settings: Mapping[str, Any],
    say: Say,
) -> int:
    """Score the chunks of a shard that are not there; return how many documents they have."""
    size = request.chunk_documents
    own = request.shard.range(chunk_count(settings))
    todo = [number for number in own if not work.chunk(number).exists()]
    if not todo:
        return 0
    total = min(own.stop * size, len(corpus)) - own.start * size
    left = sum(min((n + 1) * size, len(corpus)) - n * size for n in todo)
    if left < total:
        say(f"continuing after {total - left:,} of {total:,} documents")
    request.selector.open(work.prepared, request.subtasks)
    progress = Progress(total=total, done=total - left, what="scored")
    try:
        for run in ranges_of(todo):
            documents = corpus.read(run.start * size, run.stop * size)
            for number in run:
                rows, cost = _score_chunk(request, _take(documents, size))
                _write_chunk(work.chunk(number), rows, facts_of(settings, cost))
                progress.add(len(rows))
    finally:
        progress.close()
    return left


def _take(documents: Iterator[Document], count: int) -> Iterator[list[Document]]:
    """Yield the next ``count`` documents in batches whose text is not too long."""
    batch: list[Document] = []
    characters = 0
    for _ in range(count):
        document = next(documents, None)
        if document is None:
            break
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _score_chunk(request: ScoreRequest, batches: Iterator[list[Document]]) -> tuple[Scores, Cost]:
    parts: list[FloatArray] = []
    ids: list[str] = []
    sources: list[str] = []
    numbers: list[int] = []
    tokens: list[Counts] = []
    words: list[Counts] = []
    cost = Cost()
    for batch in batches:
        found, spent = request.selector.score(batch)
        width = max(len(request.subtasks), 1)
        if found.shape != (len(batch), width):
            raise ValueError(f"{request.selector.method}: scores {found.shape}")
        parts.append(np.asarray(found, dtype=np.float64))
        cost = cost + spent
        ids += [one.id for one in batch]
        sources += [one.source for one in batch]
        numbers += [one.number for one in batch]
        tokens.append(_count(request.encoder, batch))
        words.append(count_words(batch))
    scores = np.concatenate(parts)
    rows = Scores(
        ids=ids,
        sources=sources,
        numbers=np.array(numbers, dtype=np.int64),
        tokens=np.concatenate(tokens),
        words=np.concatenate(words),
        subtasks=scores if request.subtasks else scores[:, :0],
        score=aggregate(scores, request.selector.aggregate),
    )
    return rows, cost


def _count(encoder: Encoder | None, documents: Sequence[Document]) -> Counts:
    if encoder is not None:
        return encoder.count(documents)
    counts = [-1 if one.tokens is None else len(one.tokens) for one in documents]
    return np.array(counts, dtype=np.int64)


def _write_chunk(path: Path, rows: Scores, facts: TableFacts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TableWriter(path, facts)
    try:
        writer.add(rows)
        writer.close()
    except BaseException:
        writer.abort()
        raise
