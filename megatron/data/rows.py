"""Chosen samples of chosen domains as micro-batches, outside a step's own reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron.data.batch import MicroBatch, make_micro_batch
from megatron.data.domain import Domain
from megatron.data.loader import locate
from megatron.data.samples import check_samples, read_samples


class RowReader:
    """Reads samples that a caller names, a few rows at a time.

    Args:
        domains: N domains; None for one that is never asked for.
        seq_length: S.
        rows: the most rows of a micro-batch.
        masked_token: as :func:`~megatron.data.batch.make_micro_batch` has it.
        vocab_size: ids at or above it raise DataError.
    """

    def __init__(
        self,
        domains: Sequence[Domain | None],
        *,
        seq_length: int,
        rows: int,
        masked_token: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Keep the parts; nothing is read yet."""
        self.domains = tuple(domains)
        self._seq_length, self._rows = seq_length, rows
        self._masked_token, self._vocab_size = masked_token, vocab_size

    def read(
        self, domain: NDArray[Any], epoch: NDArray[np.int64], sample: NDArray[np.int64]
    ) -> Iterator[MicroBatch]:
        """Yield micro-batches of the samples in their order; the last may be shorter.

        ``sample_weight`` is 1.

        Args:
            domain: [n] indices of domains.
            epoch: [n] passes over them.
            sample: [n] positions in the order of those passes.

        Raises:
            DataError: a file cannot be read, or holds foreign ids.
        """
        for first in range(0, len(domain), self._rows):
            part = slice(first, first + self._rows)
            yield self._micro_batch(domain[part], epoch[part], sample[part])

    def wrapped(
        self, domain: NDArray[Any], position: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Turn positions in an endless run of passes into passes and samples.

        Args:
            domain: [n] indices of domains with the same number of windows in every pass.
            position: [n] samples that lie before each, from the first pass on.

        Returns:
            Epochs [n] and samples [n].
        """
        windows = np.ones(len(self.domains), dtype=np.int64)
        for index in set(domain.tolist()):
            windows[index] = self._domain(index).num_windows(0)
        return position // windows[domain], position % windows[domain]

    def _micro_batch(
        self, domain: NDArray[Any], epoch: NDArray[np.int64], sample: NDArray[np.int64]
    ) -> MicroBatch:
        asked, place = np.unique(domain, return_inverse=True)
        places = locate([self._domain(index) for index in asked.tolist()], place, epoch, sample)
        samples = read_samples(places, self._seq_length)
        names = [self._domain(index).name for index in domain.tolist()]
        check_samples(samples, names, self._vocab_size)
        return make_micro_batch(
            samples.tokens,
            labels=samples.labels,
            seq_length=self._seq_length,
            domain_ids=domain.astype(np.int64),
            sample_weight=np.ones(len(domain)),
            masked_token=self._masked_token,
        )

    def _domain(self, index: int) -> Domain:
        found = self.domains[index]
        if found is None:
            raise ValueError(f"domain {index} has no data here")
        return found
