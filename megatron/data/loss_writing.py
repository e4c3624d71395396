"""Making a loss store: created or taken up by one process, filled by many, in any order of ranks.

    header = prepare_store(folder, facts, domains)      rank 0; others wait
    writer = BlockWriter(folder, header)                every rank that has losses
    writer.write(name, array, starts, losses)           its part of a block of windows
    writer.sync()                                       … on the disk
    header = mark_scored(folder, header, name, array, n)  rank 0, when all have synced

Whatever ends the work in between, the header calls scored only what is on the disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from megatron.data.loss_header import (
    HEADER_NAME,
    LARGEST_LOSS,
    LOSS_TYPE,
    DomainScores,
    StoreHeader,
    differences,
    read_header,
    write_header,
)
from megatron.errors import DataError, RunError

_FILL_BYTES = 1 << 24


def prepare_store(folder: Path, facts: StoreHeader) -> StoreHeader:
    """Make a store, or take up the one that is there, with room for what is asked.

    What another run has scored of the same model and data stays; domains and epochs are added.

    Args:
        folder: of the store.
        facts: what the store shall hold, nothing scored yet.

    Returns:
        The header, with what is scored already.

    Raises:
        DataError: the store that is there is of another model, other data or other windows.
        RunError: the disk is full or refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        header = facts
        if (folder / HEADER_NAME).exists():
            header = _merge(folder, read_header(folder, "remove what is in the folder"), facts)
        for name in facts.domains:
            _make_room(folder, header.domains[name])
        write_header(folder, header)
        return header
    except OSError as error:
        raise _refused(folder, error) from error


def _merge(folder: Path, found: StoreHeader, facts: StoreHeader) -> StoreHeader:
    names = ("seq_length", "epoch_offset", "seed", "vocab_size", "precision", "model_hash")
    phrases = differences(found, {name: getattr(facts, name) for name in names}, facts.domains)
    if phrases:
        raise DataError(
            f"{folder} holds a store of something else: {', '.join(phrases)}; give another --out, "
            "or remove the folder"
        )
    domains = dict(found.domains)
    for name, wanted in facts.domains.items():
        held = domains.get(name)
        if held is None:
            domains[name] = wanted
        elif len(held.windows) < len(wanted.windows):
            more = wanted.scored[len(held.scored) :]
            domains[name] = replace(wanted, scored=(*held.scored, *more))
    return replace(found, domains=domains)


def _make_room(folder: Path, scores: DomainScores) -> None:
    """Extend a file with NaN up to its size; what is in it stays.

    A file from before a crash may be longer than the header says: cut off, since the header
    does not call it scored.
    """
    blank = np.full(_FILL_BYTES // LOSS_TYPE.itemsize, np.nan, dtype=LOSS_TYPE).tobytes()
    with open(folder / scores.file, "ab") as out:
        size = out.tell()
        if size > scores.file_bytes or size % LOSS_TYPE.itemsize:
            size = min(scores.file_bytes, size - size % LOSS_TYPE.itemsize)
            out.truncate(size)
        missing = scores.file_bytes - size
        while missing:
            missing -= out.write(blank[: min(missing, len(blank))])
        out.flush()
        os.fsync(out.fileno())


def mark_scored(
    folder: Path, header: StoreHeader, name: str, array: int, windows: int
) -> StoreHeader:
    """Write down that the first ``windows`` windows of a domain's array are on the disk.

    Raises:
        RunError: the disk is full or refuses.
    """
    scores = header.domains[name]
    scored = tuple(windows if number == array else n for number, n in enumerate(scores.scored))
    header = replace(header, domains={**header.domains, name: replace(scores, scored=scored)})
    try:
        write_header(folder, header)
    except OSError as error:
        raise _refused(folder, error) from error
    return header


class BlockWriter:
    """Writes losses to where they belong; several processes may write to one file."""

    def __init__(self, folder: Path, domains: Mapping[str, DomainScores]) -> None:
        """Open the files of ``domains``, which :func:`prepare_store` made."""
        self._folder, self._domains = folder, dict(domains)
        self._open: dict[str, int] = {}

    def __enter__(self) -> BlockWriter:
        """Return the writer."""
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def write(
        self, name: str, array: int, starts: NDArray[np.int64], losses: NDArray[np.floating]
    ) -> None:
        """Write the losses of windows that follow each other in the stream.

        Args:
            name: of the domain.
            array: 0, or the epoch where the cuts move.
            starts: [n] positions of the windows' first tokens.
            losses: [n, S] nats.

        Raises:
            DataError: a loss is not a number.
            RunError: the disk refuses.
        """
        if np.isnan(losses).any():
            row, column = np.argwhere(np.isnan(losses))[0].tolist()
            raise DataError(
                f"the model's loss at position {starts[row] + 1 + column:,} of domain '{name}' is "
                "not a number; it cannot serve as a reference"
            )
        values = np.minimum(losses, LARGEST_LOSS).astype(LOSS_TYPE)
        length = values.shape[1]
        offset = array * self._domains[name].tokens + 1
        # Neighbours touch: of a segment's windows one piece is written.
        cuts = np.flatnonzero(np.diff(starts) != length) + 1
        try:
            for piece, first in zip(
                np.split(values, cuts), starts[np.concatenate([[0], cuts])].tolist(), strict=True
            ):
                self._write_at(name, piece.tobytes(), (offset + first) * LOSS_TYPE.itemsize)
        except OSError as error:
            raise _refused(self._folder, error) from error

    def sync(self) -> None:
        """Wait until everything that this process has written is on the disk.

        Raises:
            RunError: the disk refuses.
        """
        try:
            for descriptor in self._open.values():
                os.fsync(descriptor)
        except OSError as error:
            raise _refused(self._folder, error) from error

    def _write_at(self, name: str, content: bytes, position: int) -> None:
        if name not in self._open:
            path = self._folder / self._domains[name].file
            self._open[name] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        view = memoryview(content)
        while view:
            written = os.pwrite(self._open[name], view, position)
            view, position = view[written:], position + written


def _refused(folder: Path, error: OSError) -> RunError:
    free = ""
    with contextlib.suppress(OSError):
        status = os.statvfs(folder)
        free = f" ({status.f_bavail * status.f_frsize:,} bytes free)"
    return RunError(
        f"cannot write the loss store {folder}: {error.strerror or error}{free}; free some space "
        "or give another --out, and run the command again: it goes on where it stopped"
    )
