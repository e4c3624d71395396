"""A file of JSON lines that is only appended to, and cut at its end on resume."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron.errors import RunError

BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Tail:
    """What a file held at its end when it was opened.

    Attributes:
        last_step: step of the last record kept, ``None`` in an empty file.
        at_last: the records kept that carry ``last_step``, oldest first.
        dropped: number of lines that were cut, a torn one included.
    """

    last_step: int | None
    at_last: tuple[dict[str, object], ...]
    dropped: int


class AppendFile:
    """Appends whole lines, several at a time.

    Lines collect in memory and reach the operating system when ``buffer_bytes``
    have come together, when the oldest is ``max_delay`` seconds old, or at
    :meth:`flush`.  What has reached the operating system survives ``kill -9``.
    """

    def __init__(
        self,
        path: Path,
        *,
        buffer_bytes: int = 1 << 20,
        max_delay: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Name the file; :meth:`open` opens it."""
        self.path = path
        self._buffer_bytes = buffer_bytes
        self._max_delay = max_delay
        self._clock = clock
        self._lines: list[bytes] = []
        self._size = 0
        self._since = 0.0
        self._descriptor = -1

    def open(self, resume_step: int | None) -> Tail:
        """Open for appending after ``resume_step`` (``None``: a new run).

        For a new run an earlier file steps aside as ``NAME.previous``.  Otherwise
        every record after ``resume_step`` and a torn last line are cut off by one
        truncation, which happens entirely or not at all.

        Raises:
            RunError: the file cannot be opened or cut.
        """
        try:
            if resume_step is None and self.path.exists() and self.path.stat().st_size:
                os.replace(self.path, self.path.with_name(self.path.name + ".previous"))
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            tail = Tail(last_step=None, at_last=(), dropped=0)
            if resume_step is not None:
                end, tail = find_end(self._descriptor, resume_step)
                if end != os.fstat(self._descriptor).st_size:
                    os.ftruncate(self._descriptor, end)
                    os.fsync(self._descriptor)
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be opened for writing: {error.strerror}"
            ) from error
        return tail

    def write(self, line: str) -> None:
        """Append ``line`` (without its end)."""
        if self._descriptor < 0:
            raise ValueError(f"{self.path.name} is not open")
        data = line.encode() + b"\n"
        if not self._lines:
            self._since = self._clock()
        self._lines.append(data)
        self._size += len(data)
        if self._size >= self._buffer_bytes or self._clock() - self._since >= self._max_delay:
            self._push()

    def flush(self, *, sync: bool = False) -> None:
        """Hand every line to the operating system, and to the disk if ``sync``."""
        if self._descriptor < 0:
            return
        self._push()
        if sync:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                raise self._failure(error, 0) from error

    def close(self) -> None:
        """Flush and close; harmless when closed already."""
        if self._descriptor < 0:
            return
        try:
            self.flush(sync=True)
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def _push(self) -> None:
        if not self._lines:
            return
        data = memoryview(b"".join(self._lines))
        start = os.fstat(self._descriptor).st_size
        done = 0
        try:
            while done < len(data):
                done += os.write(self._descriptor, data[done:])
        except OSError as error:
            # Half a line must not stay behind: the next process would have to guess.
            os.ftruncate(self._descriptor, start)
            raise self._failure(error, len(data)) from error
        self._lines.clear()
        self._size = 0

    def _failure(self, error: OSError, size: int) -> RunError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return RunError(
                f"{self.path}: no space left for {size} bytes; free some space and start the "
                "same command again, it goes on from the newest checkpoint"
            )
        return RunError(f"{self.path}: cannot write {size} bytes: {error.strerror}")


def find_end(descriptor: int, resume_step: int) -> tuple[int, Tail]:
    """Find where the records up to ``resume_step`` end, reading from the end backwards.

    Steps never fall from one line to the next, so only the tail that goes is read.
    What follows the last newline is torn; a line that is no record (a block of
    zeros after a power cut) goes as well.

    Returns:
        The offset after the last record to keep, and what lies before it.
    """
    end = 0
    dropped = 0
    last_step: int | None = None
    kept: list[dict[str, object]] = []
    for number, (start, line) in enumerate(lines_backwards(descriptor)):
        record = parse(line) if number else None
        step = record["step"] if record is not None else None
        if record is None or not isinstance(step, int) or step > resume_step:
            if last_step is not None:
                break
            dropped += bool(line) or number > 0
            continue
        if last_step is None:
            last_step, end = step, start + len(line) + 1
        elif step != last_step:
            break
        kept.insert(0, record)
    return end, Tail(last_step=last_step, at_last=tuple(kept), dropped=dropped)


def lines_backwards(descriptor: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) from the end; the first is what follows the last newline."""
    position = os.fstat(descriptor).st_size
    rest = b""
    while position > 0:
        size = min(BLOCK, position)
        position -= size
        data = _read(descriptor, size, position) + rest
        rest, *lines = data.split(b"\n")
        offset = position + len(data) + 1
        for line in reversed(lines):
            offset -= len(line) + 1
            yield offset, line
    yield 0, rest


def _read(descriptor: int, size: int, offset: int) -> bytes:
    data = b""
    while len(data) < size:
        block = os.pread(descriptor, size - len(data), offset + len(data))
        if not block:
            raise OSError(errno.EIO, "the file became shorter while it was read")
        data += block
    return data


def parse(line: bytes) -> dict[str, object] | None:
    """Return the record on ``line``, or ``None`` if it holds none."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record
