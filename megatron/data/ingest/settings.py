"""What a preprocessing run is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from megatron.data.ingest.journal import Journal
from megatron.data.shards import Shard

_ALONE: Final = Shard()


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    """What to tokenise, how, and where to.

    Attributes:
        inputs: paths, globs, folders, comma lists.
        output_prefix: datasets are ``{output_prefix}_{key}_document``.
        tokenizer_type, vocab_file, merge_file: see ``build_tokenizer``.
        keys: fields to tokenise, each into a dataset of its own.
        append_eod: end each document with the end-of-document token.
        ftfy: repair text with ftfy first.
        workers: processes that encode.
        text_documents: "file" or "line": what a document is in plain text.
        bad_records: "stop" or "skip".
        overwrite: start again over whatever the prefix holds.
        fast: allow the fast encoder.
        save_seconds: time between two durable points.
        num_documents: documents in the input if known, for the progress.
        log_interval: documents between two progress reports.
        shard: which part of the inputs; of several, each writes datasets of its own, see
            :func:`shard_prefix`.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer_type: str
    vocab_file: str | None = None
    merge_file: str | None = None
    keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    ftfy: bool = False
    workers: int = 1
    text_documents: str = "file"
    bad_records: str = "stop"
    overwrite: bool = False
    fast: bool = True
    save_seconds: float = 10.0
    num_documents: int | None = None
    log_interval: int = 100
    shard: Shard = _ALONE

    @property
    def own_prefix(self) -> str:
        """``output_prefix``, or what takes its place for a shard."""
        return shard_prefix(self.output_prefix, self.shard)


def shard_prefix(output_prefix: str, shard: Shard) -> str:
    """Return what a shard writes instead of ``output_prefix``: ``…-00003-of-00016``."""
    if shard.count == 1:
        return output_prefix
    return f"{output_prefix}-{shard.index:05d}-of-{shard.count:05d}"


def dataset_prefix(output_prefix: str, key: str) -> str:
    """Return GPT-NeoX's name for the dataset of a key."""
    return f"{output_prefix}_{key}_document"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run did.

    Attributes:
        prefixes: dataset prefix by key.
        journal: the final journal.
        already_done: nothing was left to do.
        encoder: which encoder was used, and why.
        seconds: wall time of this run's encoding.
        text_bytes: UTF-8 bytes of text encoded by this run.
    """

    prefixes: dict[str, str]
    journal: Journal
    already_done: bool = False
    encoder: str = ""
    seconds: float = 0.0
    text_bytes: int = 0
