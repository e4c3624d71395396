"""Writing a checkpoint's files: hashed while they are written, synced while the next is begun."""

from __future__ import annotations

import hashlib
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import numpy as np
import torch

from megatron.checkpoint.files import disk_errors
from megatron.engine.host_copy import Span, compact, host_spans

_BESIDE = 1 << 18
"""Bytes from which a piece is hashed by another thread than the one that writes it."""

_ON_ITS_WAY = 1 << 26
"""Bytes after which the disk is set to work, instead of waiting for the last of them."""


def _within(view: memoryview, spans: Sequence[Span]) -> bool:
    start: int = np.frombuffer(view, dtype=np.uint8).ctypes.data
    place = bisect_right(spans, (start, sys.maxsize)) - 1
    return place >= 0 and start + len(view) <= sum(spans[place])


class Helpers:
    """Threads for what can be done beside the writing.

    Attributes:
        hash: hashes what is being written.
        sync: waits for the disk.
    """

    def __init__(self) -> None:
        """Start none before there is work."""
        self.hash = ThreadPoolExecutor(1, "checkpoint hash")
        self.sync = ThreadPoolExecutor(4, "checkpoint sync")

    def end(self) -> None:
        """Wait for the work that there is."""
        self.hash.shutdown()
        self.sync.shutdown()


class HashedFile:
    """A file for ``torch.save`` that knows its SHA-256 when it has been written.

    Reading it again to hash it would cost as much as writing it.  What is hashed is what was to
    be written, so a file that the disk has changed since does not agree with its manifest.
    """

    def __init__(self, path: Path, helpers: Helpers, lasting: Sequence[Span] = ()) -> None:
        """Open the file, emptied.

        Args:
            path: of the file.
            helpers: threads.
            lasting: memory that stays as it is until :meth:`settle`, sorted: it is hashed while
                more is written.  What lies elsewhere is torch's, and gone after :meth:`write`.
        """
        self.size = 0
        self._lasting = lasting
        self._hashing: Future[None] | None = None
        self.error: OSError | None = None
        self._helpers = helpers
        self._digest = hashlib.sha256()
        self._early: list[Future[None]] = []
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    @property
    def sha256(self) -> str:
        """Return the digest of what was written, in hexadecimal."""
        return self._digest.hexdigest()

    def write(self, content: Any) -> int:
        """Write all of ``content``, or nothing once the disk has refused (see ``error``).

        torch's writer is C++, which an exception would not pass: it takes 0 bytes for a failure.
        """
        if self.error is not None:
            return 0
        view = memoryview(content).cast("B")
        gone_soon = self._hash(view)
        try:
            rest = view
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self.error = error
            return 0
        finally:
            if gone_soon:
                self.settle()
        self.size += len(view)
        due = self.size >= (len(self._early) + 1) * _ON_ITS_WAY
        if due and (not self._early or self._early[-1].done()):
            self._early.append(self._helpers.sync.submit(os.fdatasync, self._descriptor))
        return len(view)

    def _hash(self, view: memoryview) -> bool:
        """Hash a piece or have it hashed; return whether that must end before the piece is gone."""
        if len(view) >= _BESIDE:  # the interpreter is free meanwhile, in either thread
            self._hashing = self._helpers.hash.submit(self._digest.update, view)
            return not _within(view, self._lasting)
        if self._hashing is None or self._hashing.done():
            self._digest.update(view)
        else:
            self._hashing = self._helpers.hash.submit(self._digest.update, bytes(view))
        return False

    def settle(self) -> None:
        """Wait until all that was written is hashed."""
        if self._hashing is not None:
            self._hashing.result()

    def flush(self) -> None:
        """Do nothing: nothing is held back."""

    def sync(self) -> None:
        """Wait until the content is on the disk, and close the file."""
        try:
            for early in self._early:
                early.result()  # the system tells of an error once
            os.fsync(self._descriptor)
        finally:
            self.close()

    def close(self) -> None:
        """Close the file if it is open."""
        self.settle()
        wait(self._early)
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class FileWriter:
    """Writes one process's files of a checkpoint.

    The first refusal of the disk is kept for :meth:`finish`, and nothing more is written: whoever
    asks for the files may have something to do with other ranks first.
    """

    def __init__(self, *, needed: int | None = None) -> None:
        """Start threads to hash and to sync; :meth:`finish` ends them.

        Args:
            needed: bytes that the checkpoint takes in all, if known or estimated.
        """
        self._needed = needed
        self._helpers = Helpers()
        self._written: list[tuple[Path, HashedFile, Future[None]]] = []
        self._failure: Exception | None = None

    def write_state(self, state: Any, path: Path) -> None:
        """Write ``state`` as ``torch.save`` does."""
        state = compact(state)

        def write(file: HashedFile) -> None:
            torch.save(state, cast(IO[bytes], file))

        self._write(path, write, host_spans(state))

    def write_bytes(self, content: bytes | None, path: Path) -> None:
        """Write ``content``; nothing where it is None."""
        if content is not None:
            self._write(path, lambda file: file.write(content))

    def finish(self) -> dict[Path, tuple[int, str]]:
        """Wait until all is on the disk; return size and SHA-256 of each file.

        Raises:
            RunError: the disk has refused.
        """
        try:
            for path, _, synced in self._written:
                with disk_errors(path, needed=self._needed):
                    synced.result()
        except Exception as error:
            self._failure = self._failure or error
        finally:
            self._helpers.end()
        if self._failure is not None:
            raise self._failure
        return {path: (file.size, file.sha256) for path, file, _ in self._written}

    def _write(
        self, path: Path, write: Callable[[HashedFile], object], lasting: Sequence[Span] = ()
    ) -> None:
        if self._failure is not None:
            return
        try:
            with disk_errors(path, needed=self._needed):
                self._written.append(self._open_and_write(path, write, lasting))
        except Exception as error:
            self._failure = error

    def _open_and_write(
        self, path: Path, write: Callable[[HashedFile], object], lasting: Sequence[Span]
    ) -> tuple[Path, HashedFile, Future[None]]:
        file = HashedFile(path, self._helpers, lasting)
        try:
            write(file)
        except BaseException:
            file.close()
            if file.error is not None:
                raise file.error from None
            raise
        if file.error is not None:
            file.close()
            raise file.error
        synced = self._helpers.sync.submit(file.sync)
        file.settle()  # the state need not be there any longer
        return path, file, synced

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._helpers.end()
