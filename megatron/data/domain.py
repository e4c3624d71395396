"""A domain: a name and a stream of tokens, cut into shuffled windows without any index built."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.permutation import derive, hash_key, permute_one
from megatron.data.reader import TokenReader
from megatron.data.splits import DocumentRange, document_range, split_documents
from megatron.data.windows import EpochWindows, WindowGrid
from megatron.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Source:
    """A range of whole documents of one prefix."""

    reader: TokenReader
    documents: DocumentRange


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over a domain: its windows and the key of their order."""

    windows: EpochWindows
    key: int


class Domain:
    """Samples of one domain, by epoch and position in the epoch's order.

    The stream is the sources' streams one after the other; no window crosses from one to the
    next.  In epoch e the cuts are moved by an offset in [0, S), and the windows come in the
    order of a permutation; both are keyed by (seed, name, e), so neither other domains nor the
    number of ranks matter.  Opening costs a few reads whatever the size.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        *,
        seq_length: int,
        seed: int,
        epoch_offset: bool = True,
    ) -> None:
        """Make a domain of opened sources.

        Args:
            name: the domain's name, part of its shuffling key.
            sources: ranges of documents, in order.
            seq_length: S; a sample has S+1 tokens.
            seed: of the run.
            epoch_offset: move the cuts from epoch to epoch; ``False`` keeps them.

        Raises:
            DataError: no source holds S+1 tokens.
        """
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}; it must be at least 1")
        self.name = name
        self.sources = tuple(sources)
        self.seq_length = seq_length
        self.seed = seed
        self.epoch_offset = epoch_offset
        ranges = [source.documents for source in self.sources]
        self.num_tokens: int = sum(part.stop - part.start for part in ranges)
        self.num_documents: int = sum(part.last - part.first for part in ranges)
        lengths = tuple(part.stop - part.start for part in ranges)
        self._grid = WindowGrid(lengths=lengths, seq_length=seq_length)
        if not self._grid.epoch(0).count:
            raise DataError(self._too_short(max(lengths, default=0)))
        self._key = hash_key("domain", seed, name)
        self.epoch = lru_cache(maxsize=8)(self._build_epoch)
        fixed = self._grid.fixed_count
        #: Windows per epoch if every epoch has the same number, else ``None``.
        self.fixed_windows: int | None = (
            fixed if fixed is not None or epoch_offset else self._grid.epoch(0).count
        )

    def __repr__(self) -> str:
        return (
            f"Domain({self.name!r}, {len(self.sources)} sources, {self.num_documents} documents, "
            f"{self.num_tokens} tokens)"
        )

    def num_windows(self, epoch: int) -> int:
        """Return the number of samples in an epoch (offsets may cost one per source)."""
        if self.fixed_windows is not None:
            return self.fixed_windows
        return self.epoch(epoch).windows.count

    def locate(self, epoch: int, index: int) -> tuple[TokenReader, int]:
        """Return the reader and the token at which the ``index``-th sample of an epoch starts."""
        this = self.epoch(epoch)
        return self._place(this, permute_one(index, this.windows.count, this.key))

    def window_at(self, epoch: int, window: int) -> tuple[TokenReader, int]:
        """Return the reader and the token at which a window (in order of the stream) starts."""
        return self._place(self.epoch(epoch), window)

    def _place(self, epoch: Epoch, window: int) -> tuple[TokenReader, int]:
        segment, start = epoch.windows.locate(window)
        source = self.sources[segment]
        return source.reader, source.documents.start + start

    def sample(self, epoch: int, index: int) -> NDArray[Any]:
        """Return tokens [S+1] of the ``index``-th sample of an epoch, in the type of the file.

        Raises:
            DataError: the file cannot be read any more.
        """
        reader, start = self.locate(epoch, index)
        return reader.read(start, start + self.seq_length + 1)

    def document_starts(self, epoch: int, index: int) -> NDArray[np.int64]:
        """Return where documents start in a sample: ascending positions in [0, S].

        Position 0 is among them only if a document really starts there.
        """
        reader, start = self.locate(epoch, index)
        starts: NDArray[np.int64] = (
            reader.document_starts(start, start + self.seq_length + 1) - start
        )
        return starts

    @property
    def bytes_per_token(self) -> float | None:
        """Mean bytes of text per token over the sources; ``None`` if a sidecar is missing."""
        total, tokens = 0.0, 0
        for source in self.sources:
            ratio, count = (
                source.reader.bytes_per_token,
                source.documents.stop - source.documents.start,
            )
            if ratio is None and count:
                return None
            total, tokens = total + (ratio or 0.0) * count, tokens + count
        return total / tokens if tokens else None

    def fingerprint(self) -> str:
        """Return a hash of everything that decides this domain's samples.

        That is: contents and order of the sources, the ranges of documents, S, the seed, the
        name and ``epoch_offset``; not where the files lie.
        """
        digest = hashlib.sha256()
        facts: list[object] = [self.name, self.seq_length, self.seed, self.epoch_offset]
        for source in self.sources:
            part = source.documents
            facts += [source.reader.fingerprint(), part.first, part.last, part.start, part.stop]
        for fact in facts:
            digest.update(repr(fact).encode() + b"\x1f")
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files."""
        for source in self.sources:
            source.reader.close()

    def _build_epoch(self, epoch: int) -> Epoch:
        if epoch < 0:
            raise IndexError(f"epoch {epoch}")
        offset = derive(self._key, 2 * epoch) % self.seq_length if self.epoch_offset else 0
        return Epoch(windows=self._grid.epoch(offset), key=derive(self._key, 2 * epoch + 1))

    def _too_short(self, longest: int) -> str:
        where = ", ".join(source.reader.prefix for source in self.sources) or "no file"
        return (
            f"domain '{self.name}' has no window of seq_length + 1 = {self.seq_length + 1} tokens: "
            f"the longest stretch is {longest} tokens ({where}); "
            "give it more data, another split, or a smaller seq_length"
        )


def open_domain(
    name: str,
    prefixes: Sequence[str | os.PathLike[str]],
    *,
    seq_length: int,
    seed: int,
    split: tuple[str, str] | None = None,
    epoch_offset: bool = True,
) -> Domain:
    """Open the files of a domain.

    Args:
        name: the domain's name.
        prefixes: one or more prefixes of ``.bin/.idx`` pairs.
        seq_length: S.
        seed: of the run.
        split: ``(shares, part)`` such as ``("969,30,1", "valid")`` to take one part of each
            prefix; ``None`` takes all of it.
        epoch_offset: see :class:`Domain`.

    Raises:
        DataError: a file is missing or unsound, a prefix is named twice, or there are not
            enough tokens for one window.
        ConfigError: ``split`` is not understood.
    """
    paths = [os.fspath(prefix) for prefix in prefixes]
    twice = [path for path, count in Counter(map(os.path.realpath, paths)).items() if count > 1]
    if twice:
        raise DataError(
            f"domain '{name}' names {twice[0]} twice: its samples would repeat within an epoch; "
            "raise the domain's weight instead"
        )
    sources: list[Source] = []
    try:
        for path in paths:
            reader = TokenReader(path)
            part = (
                document_range(reader, 0, reader.num_documents)
                if split is None
                else split_documents(reader, *split)
            )
            sources.append(Source(reader=reader, documents=part))
        return Domain(name, sources, seq_length=seq_length, seed=seed, epoch_offset=epoch_offset)
    except BaseException as error:
        for source in sources:
            source.reader.close()
        if isinstance(error, DataError) and f"domain '{name}'" not in str(error):
            raise DataError(f"domain '{name}': {error}") from None
        raise
