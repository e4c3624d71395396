"""Raw text to ``.bin/.idx``: resumable, atomic, in bounded memory, the same for any workers."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.index_format import token_dtype
from megatron.data.ingest.chunks import read_chunks
from megatron.data.ingest.journal import (
    Journal,
    KeyProgress,
    journal_path,
    output_lock,
    read_journal,
    settings_difference,
    write_journal,
)
from megatron.data.ingest.progress import Progress
from megatron.data.ingest.records import Chunk
from megatron.data.ingest.settings import Outcome, PreprocessSettings, dataset_prefix
from megatron.data.ingest.sources import Source, find_sources
from megatron.data.ingest.stamps import stamp
from megatron.data.ingest.worker import ChunkEncoder, Encoded, EncodeSettings, encode_in_order
from megatron.data.reader import TokenReader
from megatron.data.shards import stretches
from megatron.data.sidecar import Sidecar, sidecar_path, write_sidecar
from megatron.data.writer import TokenWriter
from megatron.errors import DataError
from megatron.tokenizer import Tokenizer, build_tokenizer

__all__ = ["Outcome", "PreprocessSettings", "dataset_prefix", "preprocess"]

# Documents encoded by both encoders before the faster one is trusted with the rest.
_COMPARED_DOCUMENTS, _COMPARED_CHARACTERS = 64, 1 << 18


def preprocess(
    settings: PreprocessSettings, say: Callable[[str], None] = lambda line: None
) -> Outcome:
    """Tokenise the inputs; go on where an interrupted run of the same command stopped.

    Args:
        settings: what to do.
        say: takes lines for the user.

    Raises:
        NeomixError: bad input, missing files or libraries, a full disk: see ``megatron.errors``.
    """
    sources = find_sources(settings.inputs, text_documents=settings.text_documents)
    _check_keys(settings, sources)
    tokenizer = build_tokenizer(
        settings.tokenizer_type, settings.vocab_file, settings.merge_file, fast=settings.fast
    )
    with output_lock(settings.own_prefix):
        return _Run(settings, sources, tokenizer, say).run()


@dataclass(kw_only=True)
class _Meter:
    """What this run has encoded."""

    started: float = field(default_factory=time.monotonic)
    documents: int = 0
    text_bytes: int = 0
    saved_at: float = field(default_factory=time.monotonic)


class _Run:
    """One run of the pipeline."""

    def __init__(
        self,
        settings: PreprocessSettings,
        sources: Sequence[Source],
        tokenizer: Tokenizer,
        say: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._sources = sources
        self._tokenizer = tokenizer
        self._say = say
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._eod = tokenizer.eod if settings.append_eod else None
        self._prefixes = {key: dataset_prefix(settings.own_prefix, key) for key in settings.keys}
        self._wanted = self._identity()
        self._first_bad: str | None = None
        self._stretches = stretches(settings.shard, [source.size for source in sources])

    def run(self) -> Outcome:
        journal = self._take_up()
        if journal is not None and journal.state == "done":
            return Outcome(prefixes=self._prefixes, journal=journal, already_done=True)
        resumed = journal is not None
        if journal is None:
            journal = Journal(
                settings=self._wanted, keys={key: KeyProgress() for key in self._prefixes}
            )
        meter = _Meter()
        encoder = ""
        if journal.state == "running":
            encode = self._encode_settings()
            if resumed:
                self._say(self._resume_line(journal))
                if not journal.fast:
                    self._tokenizer = build_tokenizer(
                        encode.tokenizer_type, encode.vocab_file, encode.merge_file, fast=False
                    )
            else:
                self._compare_encoders(encode)
                journal.fast = self._is_fast()
            encoder = self._tokenizer.encoder
            self._say(f"encoder: {encoder}")
            self._encode_all(journal, encode, meter, resumed=resumed)
        self._finish(journal)
        seconds = time.monotonic() - meter.started
        return Outcome(
            prefixes=self._prefixes,
            journal=journal,
            encoder=encoder,
            seconds=seconds,
            text_bytes=meter.text_bytes,
        )

    # -- where to start ---------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """Return everything that decides the output's bytes, JSON-able."""
        settings = self._settings
        return {
            "inputs": [source.identity() for source in self._sources],
            "jsonl_keys": list(settings.keys),
            "tokenizer_type": self._tokenizer.name,
            "tokenizer_sha256": self._tokenizer.sha256,
            "append_eod": settings.append_eod,
            "ftfy": settings.ftfy,
            "shard": None if settings.shard.count == 1 else str(settings.shard),
        }

    def _take_up(self) -> Journal | None:
        """Return the journal to go on from; None to start afresh.

        Raises:
            DataError: the prefix holds something else.
        """
        if self._settings.overwrite:
            self._forget()
            return None
        output = self._settings.own_prefix
        journal = read_journal(output)
        existing = [p for p in self._prefixes.values() if os.path.exists(p + ".idx")]
        if journal is None:
            if existing:
                raise DataError(
                    f"{existing[0]}.idx exists, and nothing says how it was made; give --overwrite "
                    "to replace it, or another --output-prefix"
                )
            return None
        if journal.state == "done" and not existing:
            return None  # the datasets were moved away
        difference = settings_difference(self._wanted, journal.settings)
        if difference is not None:
            what = "a finished" if journal.state == "done" else "an interrupted"
            raise DataError(
                f"--output-prefix {output}: holds {what} run with other settings ({difference}); "
                "give --overwrite to start again, or another --output-prefix"
            )
        if journal.state == "done":
            self._check_finished(journal)
        return journal

    def _check_finished(self, journal: Journal) -> None:
        for key, prefix in self._prefixes.items():
            with TokenReader(prefix) as reader:
                if reader.num_tokens != journal.keys[key].tokens:
                    raise DataError(
                        f"{prefix}: {reader.num_tokens} tokens, the run that made it wrote "
                        f"{journal.keys[key].tokens}; give --overwrite to make it again"
                    )

    def _forget(self) -> None:
        for prefix in self._prefixes.values():
            for suffix in (".bin.tmp", ".idx.tmp"):
                Path(prefix + suffix).unlink(missing_ok=True)
        journal_path(self._settings.own_prefix).unlink(missing_ok=True)

    def _resume_line(self, journal: Journal) -> str:
        path = self._sources[min(journal.source, len(self._sources) - 1)].path
        documents = max(progress.documents for progress in journal.keys.values())
        return f"continuing an interrupted run after {documents:,} documents, in {path}"

    # -- encoding ---------------------------------------------------------------------------

    def _encode_settings(self) -> EncodeSettings:
        settings = self._settings
        return EncodeSettings(
            tokenizer_type=settings.tokenizer_type,
            vocab_file=settings.vocab_file,
            merge_file=settings.merge_file,
            fast=settings.fast,
            dtype=self._dtype.str,
            keys=settings.keys,
            append_eod=settings.append_eod,
            ftfy=settings.ftfy,
            skip_bad=settings.bad_records == "skip",
        )

    def _is_fast(self) -> bool:
        return self._tokenizer.encoder.startswith("fast")

    def _compare_encoders(self, encode: EncodeSettings) -> None:
        """Encode the first documents both ways; fall back for the whole run on a difference."""
        reference = getattr(self._tokenizer, "encode_raw_by_library", None)
        first = next(self._chunks(0, 0), None)
        if reference is None or first is None or not self._is_fast():
            return
        found = Encoded(chunk=first, keys=[])
        texts: list[str] = []
        characters = 0
        for text in itertools.chain(*ChunkEncoder(encode, self._tokenizer).texts(first, found)):
            if len(texts) >= _COMPARED_DOCUMENTS or characters > _COMPARED_CHARACTERS:
                break
            texts.append(text[:_COMPARED_CHARACTERS])
            characters += len(text)
        if self._tokenizer.encode_raw(texts, self._dtype) != reference(texts, self._dtype):
            self._tokenizer = build_tokenizer(
                encode.tokenizer_type, encode.vocab_file, encode.merge_file, fast=False
            )
            self._say("the fast encoder differs on the first documents: not used")

    def _chunks(self, source: int, position: int) -> Iterator[Chunk]:
        for index in range(source, len(self._sources)):
            start = position if index == source else 0
            yield from read_chunks(
                self._sources[index], index, start, self._settings.keys, self._stretches[index]
            )

    def _encode_all(
        self, journal: Journal, encode: EncodeSettings, meter: _Meter, *, resumed: bool
    ) -> None:
        before = list(itertools.accumulate((s.size for s in self._sources), initial=0))
        own = self._settings.shard.range(before[-1])
        encode = replace(encode, fast=journal.fast)
        progress = Progress(
            total_bytes=len(own),
            total_documents=self._settings.num_documents,
            log_interval=self._settings.log_interval,
            done_bytes=max(0, before[journal.source] - own.start),
        )
        with ExitStack() as stack:
            writers = {
                key: stack.enter_context(self._writer(key, journal if resumed else None))
                for key in self._prefixes
            }
            stack.callback(progress.close)
            chunks = self._chunks(journal.source, journal.position)
            encoder = ChunkEncoder(encode, self._tokenizer)
            try:
                # Libraries that read tables have threads, of which a copied process has none.
                forks = not any(source.kind in ("parquet", "dataset") for source in self._sources)
                results = encode_in_order(
                    chunks, encode, self._settings.workers, encoder, forks=forks
                )
                for done in stack.enter_context(closing(results)):
                    if done.error:
                        raise DataError(self._stop_message(done.error))
                    self._write(done, writers, journal, meter)
                    progress.update(
                        documents=meter.documents,
                        text_bytes=meter.text_bytes,
                        input_bytes=before[done.chunk.source] + done.chunk.consumed - own.start,
                    )
                    if time.monotonic() - meter.saved_at >= self._settings.save_seconds:
                        self._save(writers, journal, meter)
                self._check_not_empty(journal)
                journal.state = "closing"
            except DataError:
                # What is good so far is kept: the run may go on once the user has decided.
                if any(writer.num_documents for writer in writers.values()):
                    self._save(writers, journal, meter)
                else:
                    self._abandon(writers)
                raise
            self._save(writers, journal, meter)
            for writer in writers.values():
                writer.close()

    def _writer(self, key: str, journal: Journal | None) -> TokenWriter:
        resume = None
        if journal is not None:
            progress = journal.keys[key]
            resume = (progress.documents, progress.tokens)
        return TokenWriter(self._prefixes[key], self._dtype, resume=resume, keep_partial=True)

    def _write(
        self, done: Encoded, writers: dict[str, TokenWriter], journal: Journal, meter: _Meter
    ) -> None:
        for (key, writer), part in zip(writers.items(), done.keys, strict=True):
            writer.add_many(np.frombuffer(part.tokens, dtype=self._dtype), part.lengths)
            progress = journal.keys[key]
            progress.documents += len(part.lengths)
            progress.tokens += len(part.tokens) // self._dtype.itemsize
            progress.text_bytes += part.text_bytes
            progress.empty += part.empty
            meter.text_bytes += part.text_bytes
        meter.documents += max(len(part.lengths) for part in done.keys)
        journal.source, journal.position = done.chunk.source, done.chunk.stop
        journal.bad += done.bad
        if done.first_bad and self._first_bad is None:
            self._first_bad = done.first_bad
            self._say(f"left out: {done.first_bad} (others like it are only counted)")

    def _save(self, writers: dict[str, TokenWriter], journal: Journal, meter: _Meter) -> None:
        """Make everything so far durable: first the data, then the journal that tells of it."""
        for writer in writers.values():
            writer.flush()
        write_journal(self._settings.own_prefix, journal)
        now = time.monotonic()
        journal.seconds += now - meter.saved_at
        meter.saved_at = now

    def _abandon(self, writers: dict[str, TokenWriter]) -> None:
        for writer in writers.values():
            writer.abort()
        self._forget()

    def _stop_message(self, error: str) -> str:
        if "surrogate" in error:
            return f"{error}; --ftfy replaces such characters, --bad-records skip leaves them out"
        return f"{error} (--bad-records skip leaves such records out and counts them)"

    def _check_not_empty(self, journal: Journal) -> None:
        if self._settings.shard.count > 1:
            return  # there may be more shards than documents; their merging looks at all of them
        for key, progress in journal.keys.items():
            if progress.documents:
                continue
            paths = [source.path for source in self._sources]
            shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" * (len(paths) > 3))
            seen = f"{progress.empty} empty" if progress.empty else "none"
            bad = f", {journal.bad} unusable" if journal.bad else ""
            raise DataError(
                f"{shown}: no documents to tokenise for the key '{key}' ({seen}{bad}); "
                "give an input that holds text"
            )

    # -- the end ----------------------------------------------------------------------------

    def _finish(self, journal: Journal) -> None:
        """Give the files their names and write the sidecars; may be repeated after a crash."""
        for key, prefix in self._prefixes.items():
            progress = journal.keys[key]
            if os.path.exists(prefix + ".bin.tmp"):
                point = (progress.documents, progress.tokens)
                TokenWriter(prefix, self._dtype, resume=point, keep_partial=True).close()
            elif os.path.exists(prefix + ".idx.tmp"):
                # The writer renames the .bin first, after both were durable.
                os.replace(prefix + ".idx.tmp", prefix + ".idx")
            with TokenReader(prefix):
                pass
            if not sidecar_path(prefix).exists():
                write_sidecar(prefix, self._sidecar(prefix, progress))
        journal.state = "done"
        write_journal(self._settings.own_prefix, journal)

    def _sidecar(self, prefix: str, progress: KeyProgress) -> Sidecar:
        return Sidecar(
            documents=progress.documents,
            tokens=progress.tokens,
            bytes=progress.text_bytes,
            dtype=self._dtype.name,
            vocab_size=self._tokenizer.vocab_size,
            append_eod=self._settings.append_eod,
            eod_id=self._eod if self._eod is not None else _eod_or_none(self._tokenizer),
            tokenizer={"type": self._tokenizer.name, "sha256": self._tokenizer.sha256},
            bin=stamp(prefix + ".bin"),
            idx=stamp(prefix + ".idx"),
        )


def _check_keys(settings: PreprocessSettings, sources: Sequence[Source]) -> None:
    if len(set(settings.keys)) != len(settings.keys):
        raise DataError(f"--jsonl-keys {' '.join(settings.keys)}: a key is named twice")
    if not settings.keys or any(not key or "/" in key for key in settings.keys):
        raise DataError("--jsonl-keys: a key names an output file: it is not empty and has no '/'")
    if len(settings.keys) > 1:
        for source in sources:
            if source.kind in ("text", "lines"):
                raise DataError(
                    f"{source.path}: plain text has no fields; give one key in --jsonl-keys"
                )


def _eod_or_none(tokenizer: Tokenizer) -> int | None:
    try:
        return tokenizer.eod
    except DataError:
        return None
