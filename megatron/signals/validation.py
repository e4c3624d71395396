"""Held-out loss of every domain, the same number on any layout.

All domains are measured in one pass: their micro-batches run one after the other, the sums
of their windows meet in one buffer, and a single reduction ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron.data.batch import MicroBatch
from megatron.data.validation import ValidationSet
from megatron.engine.transfer import all_to_device
from megatron.signals.windows import HeldOut, WindowSums

FloatArray = npt.NDArray[np.float64]


class Evaluator(Protocol):
    """The call of an engine that an evaluation needs."""

    def evaluate(self, micro_batches: Iterable[tuple[torch.Tensor, Any]], count: int) -> None:
        """Run the model on ``count`` micro-batches of tokens and labels."""
        ...


class Sums(Protocol):
    """Takes per-sample sums, as :class:`~megatron.signals.ledger.Ledger` does."""

    def add(
        self,
        loss_sum: torch.Tensor,
        token_count: torch.Tensor,
        domain_ids: torch.Tensor,
        *compared: torch.Tensor,
    ) -> None:
        """Add one micro-batch."""
        ...


class LossObserver:
    """Sends the per-sample sums of every forward pass to the sums of the moment."""

    def __init__(self, ledger: Sums) -> None:
        """Start with the training ledger."""
        self.ledger = ledger

    def __call__(
        self,
        loss_sum: torch.Tensor,
        token_count: torch.Tensor,
        domain_ids: torch.Tensor,
        *compared: torch.Tensor,
    ) -> None:
        """Take one micro-batch's sums; see :meth:`Ledger.add`."""
        self.ledger.add(loss_sum, token_count, domain_ids, *compared)

    @contextmanager
    def lent_to(self, sums: Sums) -> Iterator[None]:
        """Send everything to ``sums`` meanwhile."""
        own, self.ledger = self.ledger, sums
        try:
            yield
        finally:
            self.ledger = own


class Validation:
    """One set of windows per domain, measured on demand.

    Args:
        sets: the domains' validation sets in the order of the domains; None for a domain
            without held-out data.
        sums: makes the sums of so many windows.
        observer: where the model's loss function reports; lent out meanwhile.
        micro_batch: rows of a micro-batch.
        data_rank: of this process among the data-parallel ranks.
        data_size: number of those.
        device: the model's device.
    """

    def __init__(
        self,
        sets: Sequence[ValidationSet | None],
        *,
        sums: Callable[[int], WindowSums],
        observer: LossObserver,
        micro_batch: int,
        data_rank: int,
        data_size: int,
        device: torch.device,
    ) -> None:
        """Keep the parts; nothing is read before :meth:`measure`."""
        self._sets = sets
        self._make_sums = sums
        self._observer = observer
        self._micro_batch = micro_batch
        self._data_rank, self._data_size = data_rank, data_size
        self._device = device
        windows = [0 if part is None else part.samples for part in sets]
        self._window_domain = np.repeat(np.arange(len(sets)), windows)
        self._first = np.cumsum([0, *windows])

    @property
    def empty(self) -> bool:
        """Whether no domain has held-out data."""
        return not self._window_domain.size

    @property
    def windows(self) -> int:
        """Windows of all domains together."""
        return int(self._window_domain.size)

    def measure(self, evaluator: Evaluator) -> HeldOut:
        """Return the loss of every window of every domain.

        Collective: every rank calls it at the same step.
        """
        sums = self._make_sums(self._window_domain.size)
        with self._observer.lent_to(sums):
            evaluator.evaluate(
                all_to_device(self._micro_batches(), self._device), self._num_micro_batches()
            )
        loss_sum, token_count = sums.reduce()
        return HeldOut(
            loss_sum=loss_sum,
            token_count=token_count,
            window_domain=self._window_domain,
            domains=len(self._sets),
        )

    def _num_micro_batches(self) -> int:
        return sum(
            part.num_micro_batches(self._micro_batch, self._data_size)
            for part in self._sets
            if part is not None
        )

    def _micro_batches(self) -> Iterator[MicroBatch]:
        for first, part in zip(self._first.tolist(), self._sets, strict=False):
            if part is not None:
                yield from part.micro_batches(
                    self._micro_batch, self._data_rank, self._data_size, first_id=first
                )
