"""Held-out loss on a batch that is mixed like a step's own, measured before the step trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron.data.batch import MicroBatch
from megatron.data.plan import Plan
from megatron.data.rows import RowReader
from megatron.engine.transfer import all_to_device
from megatron.parallel.topology import Topology
from megatron.signals.ledger import Ledger
from megatron.signals.validation import Evaluator, LossObserver

FloatArray = npt.NDArray[np.float64]


class HeldOutBatch:
    """Measures V, the mean held-out loss of every domain of a step.

    In place of each training sample of the step stands a held-out window of its domain: V
    and the step's training loss are of equally many samples.  A domain's windows come in
    their shuffled order and go on from step to step, and from the start again at the end;
    which ones a step has follows from the samples that were drawn before it, so that any
    layout and any resumed run measures the same.

    Args:
        evaluator: runs the model without gradients.
        topology: this rank's place.
        observer: where the model's loss function reports; lent out meanwhile.
        ledger: a ledger of its own, of K domains.
        held_out: reads held-out samples of K domains, ``micro_batch`` rows at a time.
        micro_batch: rows of a micro-batch.
        accumulation: micro-batches per step.
        device: the model's device.
    """

    def __init__(
        self,
        *,
        evaluator: Evaluator,
        topology: Topology,
        observer: LossObserver,
        ledger: Ledger,
        held_out: RowReader,
        micro_batch: int,
        accumulation: int,
        device: torch.device,
    ) -> None:
        """Keep the parts."""
        self._evaluator, self._topology = evaluator, topology
        self._observer, self._ledger, self._held_out = observer, ledger, held_out
        self._micro_batch, self._accumulation = micro_batch, accumulation
        self._device = device

    def measure(self, planned: Any) -> dict[str, FloatArray]:
        """Return ``batch_valid_loss`` [K] in nats per token; NaN for a domain not in the step.

        Collective: every rank calls it with the same plan.
        """
        self._ledger.reset()
        batches = self._micro_batches(planned.plan, np.asarray(planned.samples_seen))
        with self._observer.lent_to(self._ledger):
            self._evaluator.evaluate(all_to_device(batches, self._device), self._accumulation)
        return {"batch_valid_loss": self._ledger.reduce().domain_loss}

    def _micro_batches(
        self, plan: Plan, samples_seen: npt.NDArray[np.int64]
    ) -> Iterator[MicroBatch]:
        """Yield this rank's held-out windows in the places of its training samples."""
        position = (samples_seen - plan.counts())[plan.domain] + ordinals(plan.domain)
        mine = plan.slots(
            self._micro_batch,
            self._accumulation,
            self._topology.data_rank,
            self._topology.data_size,
        ).reshape(-1)
        domain = plan.domain[mine].astype(np.int64)
        epoch, sample = self._held_out.wrapped(domain, position[mine])
        yield from self._held_out.read(domain, epoch, sample)


def ordinals(values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return for each of n values how many equal ones stand before it, [n]."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    first = np.searchsorted(ranked, ranked, side="left")
    result = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - first
    return result
