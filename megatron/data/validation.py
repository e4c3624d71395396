"""Validation sets: the same windows every time, and the same number on every layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron.data.batch import MicroBatch, make_micro_batch
from megatron.data.domain import Domain
from megatron.data.permutation import hash_key, permute
from megatron.data.samples import check_samples, read_samples


class ValidationSet:
    """The first n of a seeded permutation of a domain's windows.

    A loss over it is token-weighted: Σ loss ÷ Σ unmasked tokens, both summed over all
    micro-batches and ranks.  Rows beyond n are masked and have weight 0, so the number of
    ranks and the micro-batch change nothing.
    """

    def __init__(
        self,
        domain: Domain,
        samples: int,
        seed: int,
        *,
        masked_token: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Choose the windows; nothing is read yet.

        Args:
            domain: opened on the validation part.
            samples: windows wanted; all there are if the domain has fewer.
            seed: chooses the windows, and nothing else does beside the domain's name.
            masked_token: as :func:`~megatron.data.batch.make_micro_batch` has it.
            vocab_size: ids at or above it raise DataError.
        """
        if samples < 1:
            raise ValueError(f"a validation set of {samples} samples")
        self.domain = domain
        self._masked_token, self._vocab_size = masked_token, vocab_size
        windows = domain.num_windows(0)
        self.samples: int = min(samples, windows)
        key = hash_key("validation", seed, domain.name)
        #: [n] windows of the domain's epoch 0, in order of use.
        self.windows: NDArray[np.int64] = permute(
            np.arange(self.samples, dtype=np.int64),
            np.full(self.samples, windows, dtype=np.int64),
            np.full(self.samples, key, dtype=np.uint64),
        )

    def num_micro_batches(self, micro_batch: int, data_size: int) -> int:
        """Return how many micro-batches every rank gets."""
        return -(-self.samples // (micro_batch * data_size))

    def micro_batches(
        self, micro_batch: int, data_rank: int, data_size: int, *, first_id: int = 0
    ) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches, as many on every rank.

        ``domain_ids`` are the windows' numbers in the set, from ``first_id`` on;
        ``sample_weight`` is 1 for windows and 0 for padding, whose number is any.

        Raises:
            DataError: a file cannot be read, or holds foreign ids.
        """
        for micro in range(self.num_micro_batches(micro_batch, data_size)):
            first = (micro * data_size + data_rank) * micro_batch
            numbers = np.minimum(np.arange(first, first + micro_batch), self.samples - 1)
            windows = self.windows[first : first + micro_batch].tolist()
            yield self._micro_batch(windows, first_id + numbers)

    def _micro_batch(self, windows: Sequence[int], ids: NDArray[np.int64]) -> MicroBatch:
        length = self.domain.seq_length
        places = [self.domain.place(0, window) for window in windows]
        read = read_samples(places, length)
        if places:
            check_samples(read, [self.domain.name] * len(places), self._vocab_size)
        return make_micro_batch(
            read.tokens,
            labels=read.labels,
            seq_length=length,
            domain_ids=ids,
            sample_weight=np.ones(ids.size),
            masked_token=self._masked_token,
        )
