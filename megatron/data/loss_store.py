"""Reading per-token losses that were computed beforehand, by place in each domain's stream.

:mod:`megatron.data.loss_header` says what a store is; :mod:`megatron.data.loss_writing` makes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.domain import Domain
from megatron.data.loss_header import (
    LOSS_TYPE,
    DomainScores,
    StoreHeader,
    describe_domain,
    differences,
    read_header,
)
from megatron.data.permutation import permute
from megatron.data.windows import EpochWindows
from megatron.errors import DataError

Remedy = Callable[[int | None], str]
"""Returns the command that makes a store, of so many epochs if that is given."""


class LossStore:
    """The losses of a model on the training streams of a run's domains.

    Attributes:
        folder: of the store.
        header: what it says of itself.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        domains: Sequence[Domain],
        *,
        splits: Mapping[str, str | None],
        vocab_size: int,
        remedy: Remedy,
    ) -> None:
        """Open a store and compare everything that it says of itself with the run.

        Args:
            folder: of the store.
            domains: of the run, opened on their training parts; the store may hold others too.
            splits: by name, the shares of documents that a domain is the training part of; None
                where it has files of its own.
            vocab_size: token ids of the run.
            remedy: returns the command that makes the store.

        Raises:
            DataError: there is no store; it is unfinished or damaged; or it is of other data, cut
                in another way: each difference with both values.
        """
        self.folder = Path(folder)
        self.header: StoreHeader = read_header(self.folder, remedy(None))
        self._domains = tuple(domains)
        self._remedy = remedy
        self._check(splits, vocab_size)
        self._losses = [self._map(self.header.domains[domain.name]) for domain in domains]

    @property
    def seq_length(self) -> int:
        """S, losses of a window."""
        return self.header.seq_length

    def epochs(self, domain: str) -> int | None:
        """Return how many passes over a domain are scored; None: all there can be."""
        return len(self.header.domains[domain].windows) if self.header.epoch_offset else None

    def windows(self, domain: str) -> int | None:
        """Return how many windows a domain can be read for; None: any number."""
        return sum(self.header.domains[domain].windows) if self.header.epoch_offset else None

    def check_forecast(self, samples: Mapping[str, float]) -> None:
        """Refuse what would be read beyond the store.

        Args:
            samples: windows that the run will surely read of each domain, by name.

        Raises:
            DataError: naming the domain, what it needs and what there is.
        """
        for name, wanted in samples.items():
            there = self.windows(name)
            if there is None or wanted <= there:
                continue
            per_epoch = self.header.domains[name].windows
            need = len(per_epoch) + int(np.ceil((wanted - there) / min(per_epoch)))
            raise DataError(
                f"the run will read about {wanted:,.0f} windows of domain '{name}', more than the "
                f"{there:,} of the {len(per_epoch)} epochs that {self.folder} holds; score "
                f"{need} epochs: {self._remedy(need)}"
            )

    def read(
        self, domain: NDArray[Any], epoch: NDArray[np.int64], sample: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return the losses of many windows.

        Args:
            domain: [n] indices into the run's domains.
            epoch: [n] passes over them, from 0.
            sample: [n] positions in the shuffled order of the passes.

        Returns:
            [n, S] nats; column s is the loss of the window's token s + 1.

        Raises:
            DataError: naming the domain and the place, if it was not scored.
        """
        losses = np.empty((domain.size, self.seq_length), dtype=np.float32)
        keys = np.stack([domain.astype(np.int64), epoch], axis=1)
        for number, this in np.unique(keys, axis=0).tolist():
            rows = np.flatnonzero((keys[:, 0] == number) & (keys[:, 1] == this))
            losses[rows] = self._of_epoch(number, this, sample[rows])
        return losses

    def _of_epoch(self, number: int, epoch: int, sample: NDArray[np.int64]) -> NDArray[Any]:
        domain, losses = self._domains[number], self._losses[number]
        array = epoch if self.header.epoch_offset else 0
        if array >= len(losses):
            raise DataError(
                f"domain '{domain.name}' has come to epoch {epoch + 1}, and {self.folder} holds "
                f"the losses of {len(losses)}; {self._remedy(epoch + 1)}"
            )
        this = domain.epoch(epoch)
        count = np.full(sample.size, this.windows.count, dtype=np.int64)
        windows = permute(sample, count, np.full(sample.size, this.key, dtype=np.uint64))
        first = stream_starts(domain, domain.stream_windows(epoch), windows) + 1
        found: NDArray[Any] = losses[array][first[:, None] + np.arange(self.seq_length)]
        if np.isnan(found).any():
            row, column = np.argwhere(np.isnan(found))[0].tolist()
            raise DataError(
                f"{self.folder}: domain '{domain.name}' has no loss at position "
                f"{first[row] + column:,} of its stream (epoch {epoch}), though its header calls "
                f"it scored: the file is damaged; remove the store and {self._remedy(None)}"
            )
        return found

    def _check(self, splits: Mapping[str, str | None], vocab_size: int) -> None:
        header, domains = self.header, self._domains
        for domain in domains:
            domain.stream_windows(0)
        missing = [domain.name for domain in domains if domain.name not in header.domains]
        if missing:
            raise DataError(
                f"{self.folder} holds no losses of {', '.join(map(repr, missing))} (it has "
                f"{', '.join(sorted(header.domains)) or 'none'}); add them: {self._remedy(None)}"
            )
        offset = domains[0].epoch_offset
        wanted: dict[str, Any] = {
            "seq_length": domains[0].seq_length,
            "epoch_offset": offset,
            "vocab_size": vocab_size,
        }
        if offset and header.epoch_offset:
            wanted["seed"] = domains[0].seed
        run = {
            domain.name: describe_domain(
                domain,
                split=splits[domain.name],
                epochs=len(header.domains[domain.name].windows),
            )
            for domain in domains
        }
        if phrases := differences(header, wanted, run):
            raise DataError(
                f"{self.folder} is not a store of this run's windows: {', '.join(phrases)}; set "
                f"the run to the store's values, or make another: {self._remedy(None)}"
            )
        for domain in domains:
            self._check_complete(domain.name, header.domains[domain.name])

    def _check_complete(self, name: str, scores: DomainScores) -> None:
        if not scores.complete:
            raise DataError(
                f"{self.folder} is unfinished: of domain '{name}' {sum(scores.scored):,} of "
                f"{sum(scores.windows):,} windows are scored; go on with: {self._remedy(None)}"
            )

    def _map(self, scores: DomainScores) -> NDArray[Any]:
        path = self.folder / scores.file
        try:
            size = path.stat().st_size
            if size != scores.file_bytes:
                raise DataError(
                    f"{path}: {size:,} bytes, the header of the store asks for "
                    f"{scores.file_bytes:,}; copy it again, or remove the store and "
                    f"{self._remedy(None)}"
                )
            shape = (len(scores.windows), scores.tokens)
            return np.memmap(path, dtype=LOSS_TYPE, mode="r", shape=shape)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror or error}); copy the store again, or "
                f"remove it and {self._remedy(None)}"
            ) from None


def stream_starts(
    domain: Domain, windows: EpochWindows, numbers: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return where windows start in a domain's stream, its sources one after the other.

    Args:
        domain: whose windows they are.
        windows: of one epoch.
        numbers: [n] of them, in the order of the stream.

    Returns:
        [n] positions of the windows' first tokens.
    """
    ends = np.array(windows.ends, dtype=np.int64)
    lengths = [source.documents.stop - source.documents.start for source in domain.sources]
    # Per segment: where its window 0 would start, were the segments' windows numbered on.
    before = np.concatenate([[0], ends[:-1]])
    origins = np.concatenate([[0], np.cumsum(lengths[:-1])]).astype(np.int64)
    origins = origins + np.array(windows.firsts, dtype=np.int64) - before * windows.seq_length
    segments = np.searchsorted(ends, numbers, side="right")
    starts: NDArray[np.int64] = origins[segments] + numbers * windows.seq_length
    return starts
