"""What a scoring is asked, and what of it decides the table's bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron.data.shards import Shard
from megatron.selection.base import Cost, Selector, Target
from megatron.selection.corpus import DocumentCorpus
from megatron.selection.inputs import Inputs
from megatron.selection.table import TableFacts
from megatron.selection.targets import TargetSet
from megatron.selection.token_counts import Encoder
from megatron.tokenizer import Tokenizer

_ALONE: Final = Shard()


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What to score, how, and where to.

    Attributes:
        selector: the method.
        inputs: the corpus.
        targets: what to compare with, or, for a method that does not, what the task is called.
        out: the table.
        tokenizer: that turns tokenised documents into text; None = the data say.
        encoder: that counts tokens; None counts those of tokenised documents alone.
        shard: which part of the corpus.
        chunk_documents: documents of a chunk.
        overwrite: start again over what is there.
        work: the folder of work; None = beside the table.
    """

    selector: Selector
    inputs: Inputs
    targets: TargetSet | None
    out: Path
    tokenizer: Tokenizer | None = None
    encoder: Encoder | None = None
    shard: Shard = _ALONE
    chunk_documents: int = 4096
    overwrite: bool = False
    work: Path | None = None

    @property
    def subtasks(self) -> tuple[Target, ...]:
        """The targets; () for a method that reads none, which they only name the task of."""
        if self.targets is None or not self.selector.needs_targets:
            return ()
        return self.targets.targets


def settings_of(request: ScoreRequest, corpus: DocumentCorpus) -> dict[str, Any]:
    """Return everything that decides the table's bytes, as it comes back from JSON."""
    selector, inputs = request.selector, request.inputs
    settings = {
        "method": selector.method,
        "parameters": dict(selector.parameters()),
        "aggregate": selector.aggregate,
        "targets": request.targets.fingerprints() if request.targets and request.subtasks else {},
        "task": "" if request.targets is None else request.targets.name,
        "corpus": [part.as_json() for part in corpus.facts()],
        "documents": len(corpus),
        "data": corpus.fingerprint(),
        "field": inputs.field,
        "text_documents": inputs.text_documents,
        "tokenizer": None if request.encoder is None else dict(request.encoder.identity()),
        "chunk_documents": request.chunk_documents,
    }
    found: dict[str, Any] = json.loads(json.dumps(settings))
    return found


def named_words(inputs: Inputs) -> list[str]:
    """Return how the corpus was named, so that it is found again from another folder."""
    return [
        str(Path(word).absolute()) if word not in inputs.known and "," not in word else word
        for word in inputs.words
    ]


def facts_of(settings: Mapping[str, Any], cost: Cost, words: Sequence[str] = ()) -> TableFacts:
    """Return what a table says of itself.

    Args:
        settings: see :func:`settings_of`.
        cost: of what it holds.
        words: that named the corpus.
    """
    targets = settings["targets"]
    return TableFacts(
        method=settings["method"],
        parameters=settings["parameters"],
        aggregate=settings["aggregate"],
        task=settings["task"],
        subtasks=tuple(targets),
        documents=settings["documents"],
        data=settings["data"],
        parts=tuple(settings["corpus"]),
        targets=targets,
        inputs={
            "words": list(words),
            "field": settings["field"],
            "text_documents": settings["text_documents"],
        },
        chunk_documents=settings["chunk_documents"],
        tokenizer=settings["tokenizer"],
        cost=cost,
    )


def chunk_count(settings: Mapping[str, Any]) -> int:
    """Return how many chunks the corpus is cut into."""
    return -(-int(settings["documents"]) // int(settings["chunk_documents"]))


def ranges_of(numbers: Sequence[int]) -> Iterator[range]:
    """Yield ascending numbers as ranges without gaps."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield range(numbers[start], numbers[place - 1] + 1)
            start = place
