"""Held-out loss of every domain, the same number on any layout.

All domains are measured in one pass: their micro-batches run one after the other, their
sums meet in one ledger, and a single reduction ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from megatron.data.batch import MicroBatch
from megatron.data.validation import ValidationSet
from megatron.engine.transfer import all_to_device
from megatron.signals.ledger import Ledger

FloatArray = npt.NDArray[np.float64]


class Evaluator(Protocol):
    """The call of an engine that an evaluation needs."""

    def evaluate(self, micro_batches: Iterable[tuple[torch.Tensor, Any]], count: int) -> None:
        """Run the model on ``count`` micro-batches of tokens and labels."""
        ...


class LossObserver:
    """Sends the per-sample sums of every forward pass to the ledger of the moment."""

    def __init__(self, ledger: Ledger) -> None:
        """Start with the training ledger."""
        self.ledger = ledger

    def __call__(
        self, loss_sum: torch.Tensor, token_count: torch.Tensor, domain_ids: torch.Tensor
    ) -> None:
        """Take one micro-batch's sums; see :meth:`Ledger.add`."""
        self.ledger.add(loss_sum, token_count, domain_ids)


class Validation:
    """One set of windows per domain, measured on demand.

    Args:
        sets: the domains' validation sets in the order of the domains; None for a domain
            without held-out data.
        ledger: a ledger of its own, of K domains.
        observer: where the model's loss function reports; lent to this ledger meanwhile.
        batches: yields this rank's micro-batches of a set.
        count: how many those are, the same on every rank.
        device: the model's device.
    """

    def __init__(
        self,
        sets: Sequence[ValidationSet | None],
        *,
        ledger: Ledger,
        observer: LossObserver,
        batches: Callable[[ValidationSet], Iterable[MicroBatch]],
        count: Callable[[ValidationSet], int],
        device: torch.device,
    ) -> None:
        """Keep the parts; nothing is read before :meth:`measure`."""
        self._sets = sets
        self._ledger = ledger
        self._observer = observer
        self._batches = batches
        self._count = count
        self._device = device

    @property
    def empty(self) -> bool:
        """Whether no domain has held-out data."""
        return all(part is None for part in self._sets)

    def measure(self, evaluator: Evaluator) -> FloatArray:
        """Return every domain's mean loss [K] in nats per token; NaN without held-out data.

        Collective: every rank calls it at the same step.
        """
        training = self._observer.ledger
        self._observer.ledger = self._ledger
        self._ledger.reset()
        try:
            count = sum(self._count(part) for part in self._sets if part is not None)
            evaluator.evaluate(all_to_device(self._micro_batches(), self._device), count)
            return self._ledger.reduce().domain_loss
        finally:
            self._observer.ledger = training

    def _micro_batches(self) -> Iterator[MicroBatch]:
        for part in self._sets:
            if part is not None:
                yield from self._batches(part)
