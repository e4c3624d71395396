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

from megatron.data.infilling import Infilling
from megatron.data.packing import DocumentWindows, PackImpl, document_windows
from megatron.data.permutation import derive, hash_key, permute_one
from megatron.data.reader import TokenReader
from megatron.data.samples import Place, read_samples
from megatron.data.sources import Source, open_source
from megatron.data.windows import EpochWindows, WindowGrid
from megatron.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One pass over a domain: its windows and the key of their order."""

    windows: EpochWindows | DocumentWindows
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
        pack_impl: PackImpl = "packed",
        allow_chopped: bool = True,
        infilling: Infilling | None = None,
    ) -> None:
        """Make a domain of opened sources.

        Args:
            name: the domain's name, part of its shuffling key.
            sources: ranges of documents, in order.
            seq_length: S; a sample has S+1 tokens.
            seed: of the run.
            epoch_offset: move the cuts from epoch to epoch; ``False`` keeps them.
            pack_impl: ``packed`` cuts the stream into full windows, whatever documents they
                hold; the others keep documents whole (see :mod:`megatron.data.packing`).
            allow_chopped: under those, cut documents off that are longer than a window.
            infilling: rearranges the samples; None leaves them as they are.

        Raises:
            DataError: no source holds a window.
        """
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}; it must be at least 1")
        self.name = name
        self.sources = tuple(sources)
        self.seq_length = seq_length
        self.seed = seed
        self.epoch_offset = epoch_offset and pack_impl == "packed"
        self.pack_impl, self.allow_chopped = pack_impl, allow_chopped
        self.infilling = infilling
        ranges = [source.documents for source in self.sources]
        self.num_tokens: int = sum(part.stop - part.start for part in ranges)
        self.num_documents: int = sum(part.last - part.first for part in ranges)
        lengths = tuple(part.stop - part.start for part in ranges)
        self._grid = WindowGrid(lengths=lengths, seq_length=seq_length)
        self._whole = None if pack_impl == "packed" else self._document_windows(pack_impl)
        if not (self._whole or self._grid.epoch(0)).count:
            raise DataError(self._too_short(max(lengths, default=0)))
        self._key = hash_key("domain", seed, name)
        self.epoch = lru_cache(maxsize=8)(self._build_epoch)
        fixed = self._grid.fixed_count if self._whole is None else self._whole.count
        #: Windows per epoch if every epoch has the same number, else ``None``.
        self.fixed_windows: int | None = (
            fixed if fixed is not None or self.epoch_offset else self._grid.epoch(0).count
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

    @property
    def masks(self) -> bool:
        """Whether some tokens of a sample may be left out of the loss."""
        labelled = any(source.labels is not None for source in self.sources)
        pads = self.infilling is not None and self.infilling.pads
        return labelled or pads or self._whole is not None

    def locate(self, epoch: int, index: int) -> tuple[TokenReader, int]:
        """Return the reader and the token at which the ``index``-th sample of an epoch starts."""
        place = self._sample_place(epoch, index)
        return place.reader, place.start

    def window_at(self, epoch: int, window: int) -> tuple[TokenReader, int]:
        """Return the reader and the token at which a window (in order of the stream) starts."""
        place = self.place(epoch, window)
        return place.reader, place.start

    def place(self, epoch: int, window: int, sample: int = 0) -> Place:
        """Return where a window lies, and what becomes of it.

        Args:
            epoch: pass over the domain.
            window: its number in the order of the stream.
            sample: its place in the order of the epoch, which infilling goes by.
        """
        windows = self.epoch(epoch).windows
        segment, start = windows.locate(window)
        source = self.sources[segment]
        start += source.documents.start
        length = self.seq_length + 1
        if isinstance(windows, DocumentWindows):
            length = windows.length(window)
        if self.infilling is None:
            return Place(source.reader, start, start + length, source.labels)
        return Place(
            source.reader, start, start + length, None, self.infilling, self.name, epoch, sample
        )

    def stream_windows(self, epoch: int) -> EpochWindows:
        """Return an epoch's windows as cuts through the stream, for what is stored by place in it.

        Raises:
            DataError: they are none, or are not trained on as they stand there.
        """
        windows = self.epoch(epoch).windows
        if isinstance(windows, DocumentWindows) or self.infilling is not None:
            what = "fim_rate" if self.infilling is not None else f"pack_impl: {self.pack_impl}"
            raise DataError(
                f"domain '{self.name}': losses are stored by the place of a token in the stream, "
                f"which says nothing under {what}; use mixing: {{reference: RUN}}, a model that "
                "runs beside the trained one"
            )
        return windows

    def _sample_place(self, epoch: int, index: int) -> Place:
        this = self.epoch(epoch)
        return self.place(epoch, permute_one(index, this.windows.count, this.key), index)

    def sample(self, epoch: int, index: int) -> NDArray[Any]:
        """Return tokens [S+1] of the ``index``-th sample of an epoch, in the type of the file.

        Raises:
            DataError: the file cannot be read any more.
        """
        tokens: NDArray[Any] = read_samples(
            [self._sample_place(epoch, index)], self.seq_length
        ).tokens[0]
        return tokens

    def document_starts(self, epoch: int, index: int) -> NDArray[np.int64]:
        """Return where documents start in a sample: ascending positions in [0, S].

        Position 0 is among them only if a document really starts there.
        """
        place = self._sample_place(epoch, index)
        starts: NDArray[np.int64] = (
            place.reader.document_starts(place.start, place.stop) - place.start
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

        That is: contents and order of the sources and their labels, the ranges of documents, S,
        the seed, the name, how windows are made and what becomes of them; not where the files
        lie.
        """
        digest = hashlib.sha256()
        facts: list[object] = [self.name, self.seq_length, self.seed, self.epoch_offset]
        for source in self.sources:
            part = source.documents
            facts += [source.reader.fingerprint(), part.first, part.last, part.start, part.stop]
            if source.labels is not None:
                facts += ["labels", source.labels.fingerprint()]
        if self.pack_impl != "packed":
            facts += [self.pack_impl, self.allow_chopped]
        if self.infilling is not None:
            facts += self.infilling.facts()
        for fact in facts:
            digest.update(repr(fact).encode() + b"\x1f")
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files."""
        for source in self.sources:
            source.close()

    def _document_windows(self, pack_impl: PackImpl) -> DocumentWindows:
        sizes = [
            source.reader.document_sizes(source.documents.first, source.documents.last)
            for source in self.sources
        ]
        return document_windows(
            sizes,
            seq_length=self.seq_length,
            pack_impl=pack_impl,
            allow_chopped=self.allow_chopped,
        )

    def _build_epoch(self, epoch: int) -> Epoch:
        if epoch < 0:
            raise IndexError(f"epoch {epoch}")
        if self._whole is not None:
            return Epoch(windows=self._whole, key=derive(self._key, 2 * epoch + 1))
        offset = derive(self._key, 2 * epoch) % self.seq_length if self.epoch_offset else 0
        return Epoch(windows=self._grid.epoch(offset), key=derive(self._key, 2 * epoch + 1))

    def _too_short(self, longest: int) -> str:
        where = ", ".join(source.reader.prefix for source in self.sources) or "no file"
        if self._whole is not None:
            return (
                f"domain '{self.name}' has no window: no document of {where} has 2 tokens"
                + ("" if self.allow_chopped else f" to {self.seq_length + 1}")
                + ("; give it more data" if self.allow_chopped else "; set allow_chopped: true")
            )
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
    labels: Sequence[str | os.PathLike[str]] | None = None,
    pack_impl: PackImpl = "packed",
    allow_chopped: bool = True,
    infilling: Infilling | None = None,
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
        labels: for each prefix one of labels: the same documents, with the token itself where it
            is trained on, and -100 elsewhere.
        pack_impl: see :class:`Domain`.
        allow_chopped: see :class:`Domain`.
        infilling: see :class:`Domain`.

    Raises:
        DataError: a file is missing or unsound, a prefix is named twice, labels are not of the
            same documents, or there are not enough tokens for one window.
        ConfigError: ``split`` is not understood.
    """
    paths = [os.fspath(prefix) for prefix in prefixes]
    beside: list[str | None] = [os.fspath(path) for path in labels] if labels else []
    twice = [path for path, count in Counter(map(os.path.realpath, paths)).items() if count > 1]
    if twice:
        raise DataError(
            f"domain '{name}' names {twice[0]} twice: its samples would repeat within an epoch; "
            "raise the domain's weight instead"
        )
    if beside and len(beside) != len(paths):
        raise DataError(
            f"domain '{name}' has {len(beside)} paths of labels for {len(paths)} of tokens; give "
            "one for each"
        )
    sources: list[Source] = []
    try:
        for path, own in zip(paths, beside or [None] * len(paths), strict=True):
            sources.append(open_source(path, own, split))
        return Domain(
            name,
            sources,
            seq_length=seq_length,
            seed=seed,
            epoch_offset=epoch_offset,
            pack_impl=pack_impl,
            allow_chopped=allow_chopped,
            infilling=infilling,
        )
    except BaseException as error:
        for source in sources:
            source.close()
        if isinstance(error, DataError) and f"domain '{name}'" not in str(error):
            raise DataError(f"domain '{name}': {error}") from None
        raise
