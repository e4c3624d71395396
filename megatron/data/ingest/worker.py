"""Encoding chunks, in this process or in several, with results in the order of the input."""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron.data.ingest.chunks import line_of
from megatron.data.ingest.records import Chunk, Record, read_records
from megatron.errors import DataError, MissingExtraError, NeomixError, RunError
from megatron.tokenizer import Tokenizer, build_tokenizer

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

# Chunks handed out beyond the one being written; with chunks of about 1 MiB this bounds memory.
_AHEAD_PER_WORKER = 3
# Chunks that lie in a worker's pipe, so that it need not wait for the next.  One that brings its
# content with it would fill the pipe, and this process wait for a worker that waits for it.
_SMALL_WAITING = 2


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """All that decides a chunk's tokens; picklable.

    Attributes:
        tokenizer_type, vocab_file, merge_file: the tokenizer.
        fast: whether its fast path may be used.
        dtype: of the ``.bin``, as ``numpy.dtype.str``.
        keys: fields to tokenise, each into a dataset of its own.
        append_eod: whether each document ends with the end-of-document token.
        ftfy: whether text is repaired by ftfy first.
        skip_bad: whether a bad record is left out and counted instead of an error.
    """

    tokenizer_type: str
    vocab_file: str | None
    merge_file: str | None
    fast: bool
    dtype: str
    keys: tuple[str, ...]
    append_eod: bool
    ftfy: bool
    skip_bad: bool


@dataclass(kw_only=True)
class KeyTokens:
    """One key's part of an encoded chunk."""

    tokens: bytes = b""
    lengths: list[int] = field(default_factory=list)
    text_bytes: int = 0
    empty: int = 0


@dataclass(kw_only=True)
class Encoded:
    """A chunk's result.

    Attributes:
        chunk: the chunk, without its payload.
        keys: tokens per key, in the order of the keys.
        bad: records left out as unusable.
        first_bad: the first of them, as a message.
        error: what stops the run, if anything.
    """

    chunk: Chunk
    keys: list[KeyTokens]
    bad: int = 0
    first_bad: str | None = None
    error: str | None = None


class ChunkEncoder:
    """Tokenises chunks."""

    def __init__(self, settings: EncodeSettings, tokenizer: Tokenizer | None = None) -> None:
        """Build the tokenizer, unless one is given that is built already."""
        self._settings = settings
        self._tokenizer = tokenizer or build_tokenizer(
            settings.tokenizer_type, settings.vocab_file, settings.merge_file, fast=settings.fast
        )
        self._dtype: np.dtype[Any] = np.dtype(settings.dtype)
        eod = np.asarray([self._tokenizer.eod], self._dtype) if settings.append_eod else None
        self._eod = b"" if eod is None else eod.tobytes()
        self._fix = _fixer() if settings.ftfy else None

    def texts(self, chunk: Chunk, result: Encoded) -> list[list[str]]:
        """Read the chunk's texts by key, noting bad records in ``result``."""
        texts: list[list[str]] = [[] for _ in self._settings.keys]
        for record in read_records(chunk, self._settings.keys, self._fix):
            if record.problem is not None:
                self._note_bad(chunk, record, result)
                if result.error:
                    break
            for of_key, text in zip(texts, record.texts, strict=False):
                of_key.append(text)
        return texts

    def __call__(self, chunk: Chunk) -> Encoded:
        """Encode a chunk."""
        result = Encoded(chunk=_without_payload(chunk), keys=[])
        for texts in self.texts(chunk, result):
            result.keys.append(self._encode(texts))
        if result.error:
            result.keys = []
        return result

    def _encode(self, texts: Sequence[str]) -> KeyTokens:
        out = KeyTokens()
        parts: list[bytes] = []
        itemsize = self._dtype.itemsize
        for text, raw in zip(texts, self._tokenizer.encode_raw(texts, self._dtype), strict=True):
            if not raw:
                out.empty += 1
                continue
            out.text_bytes += len(text) if text.isascii() else len(text.encode())
            out.lengths.append((len(raw) + len(self._eod)) // itemsize)
            parts.append(raw)
            if self._eod:
                parts.append(self._eod)
        out.tokens = b"".join(parts)
        return out

    def _note_bad(self, chunk: Chunk, record: Record, result: Encoded) -> None:
        what = "row" if chunk.kind == "table" else "line"
        message = f"{chunk.path}, {what} {line_of(chunk, record.number)}: {record.problem}"
        if not self._settings.skip_bad:
            result.error = message
            return
        result.bad += 1
        result.first_bad = result.first_bad or message


def encode_in_order(
    chunks: Iterator[Chunk],
    settings: EncodeSettings,
    workers: int,
    encoder: ChunkEncoder,
    *,
    forks: bool = False,
) -> Generator[Encoded, None, None]:
    """Encode chunks by ``workers`` processes (1: this one) and yield in the chunks' order.

    Args:
        chunks: what is encoded.
        settings: of the encoder.
        workers: how many.
        encoder: that of this process.
        forks: whether workers may be copies of this process, which has no threads then: they
            begin at once and share its vocabulary.  Otherwise each builds an encoder of its own.

    Raises:
        RunError: a worker died.
    """
    if workers <= 1:
        yield from map(encoder, chunks)
        return
    forks = forks and "fork" in multiprocessing.get_all_start_methods()
    pool = _Pool(encoder if forks else settings, workers)
    try:
        yield from pool.run(chunks)
    finally:
        pool.close()


class _Pool:
    """Worker processes, each on a pipe.

    A worker ends when its pipe does, so none outlives this process, however that ends.
    """

    def __init__(self, work: ChunkEncoder | EncodeSettings, workers: int) -> None:
        context: Any = multiprocessing.get_context(
            "fork" if isinstance(work, ChunkEncoder) else "spawn"
        )
        self._processes: dict[Connection, BaseProcess] = {}
        for _ in range(workers):
            ours, theirs = context.Pipe()
            # A copy of this process has its ends of the pipes too: open there, none would end.
            ends = [*self._processes, ours] if isinstance(work, ChunkEncoder) else []
            process = context.Process(target=_serve, args=(theirs, work, ends), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process

    def run(self, chunks: Iterator[Chunk]) -> Iterator[Encoded]:
        from multiprocessing.connection import wait

        order: deque[int] = deque()
        done: dict[int, Encoded] = {}
        busy: dict[Connection, deque[int]] = {one: deque() for one in self._processes}
        limit = len(self._processes) * _AHEAD_PER_WORKER
        number = 0
        chunk = next(chunks, None)
        while chunk is not None or order:
            while chunk is not None and len(order) < limit:
                connection = min(busy, key=lambda one: len(busy[one]))
                if len(busy[connection]) >= (_SMALL_WAITING if chunk.payload is None else 1):
                    break
                self._guard(connection, partial(connection.send, chunk))
                busy[connection].append(number)
                order.append(number)
                number += 1
                chunk = next(chunks, None)
            while order and order[0] in done:
                yield done.pop(order.popleft())
            working = [connection for connection, numbers in busy.items() if numbers]
            for ready in wait(working) if working else ():
                connection = ready  # type: ignore[assignment]
                answer = self._guard(connection, connection.recv)
                if isinstance(answer, NeomixError):
                    raise answer
                done[busy[connection].popleft()] = answer

    def close(self) -> None:
        """End the workers."""
        for connection in self._processes:
            connection.close()
        for process in self._processes.values():
            process.terminate()
            process.join()

    def _guard(self, connection: Connection, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (EOFError, OSError):
            process = self._processes[connection]
            process.join(timeout=5)
            code = process.exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
            raise RunError(
                f"a worker process died ({how}), perhaps for want of memory; run the same command "
                "again to go on, with fewer --workers if memory is short"
            ) from None


def _serve(
    connection: Connection, work: ChunkEncoder | EncodeSettings, ends: Sequence[Connection]
) -> None:
    """Serve chunks until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in ends:
        end.close()
    try:
        encoder: ChunkEncoder | NeomixError = (
            work if isinstance(work, ChunkEncoder) else ChunkEncoder(work)
        )
    except NeomixError as error:
        encoder = DataError(str(error))  # not every error survives a pipe
    try:
        while True:
            chunk = connection.recv()
            connection.send(encoder if isinstance(encoder, NeomixError) else encoder(chunk))
    except (EOFError, OSError):
        return


def _without_payload(chunk: Chunk) -> Chunk:
    return replace(chunk, payload=None) if chunk.payload is not None else chunk


def _fixer() -> Callable[[str], str]:
    try:
        import ftfy
    except ImportError:
        raise MissingExtraError("ftfy", "train", "--ftfy") from None
    fix: Callable[[str], str] = ftfy.fix_text
    return fix
