"""Reference losses: what another model would lose on every token of a step.

Two sources give every micro-batch of a plan its ``reference`` [B, S]:

* :class:`StoreReference` looks up what was computed beforehand, in a background thread;
* :class:`ModelReference` runs a frozen model in the layout of the run.

Only ranks of the last pipeline stage compare losses, and only there the values are needed.
DoReMi (Xie et al. 2023, arXiv 2305.10429, algorithm 1) is the method that asks for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.data.batch import Array, MicroBatch
from megatron.data.loss_header import LARGEST_LOSS
from megatron.data.loss_store import LossStore
from megatron.data.plan import Plan
from megatron.engine.frozen import FrozenModel
from megatron.model.domain_loss import DomainLoss
from megatron.monitor.overhead import Overhead
from megatron.parallel.topology import Topology


class ReferenceSource(ABC):
    """Gives micro-batches their reference losses.

    Attributes:
        tokens: tokens of the global batches that a reference model was run on so far, the same
            on every rank: the method's extra cost in tokens.
    """

    def __init__(self) -> None:
        """Start with nothing run."""
        self.tokens = 0

    @property
    @abstractmethod
    def identity(self) -> str:
        """A hash of the model whose losses these are."""

    @abstractmethod
    def attach(self, plan: Plan, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Return a plan's micro-batches, each with its ``reference`` where it is needed.

        Collective where the source says so: every rank calls it for each step, in order.

        Args:
            plan: of the step.
            batches: this rank's micro-batches of it; none on a stage that reads nothing.
        """

    def prepare(self, plan: Plan) -> None:
        """Begin with a plan that :meth:`attach` will be called for next, where that helps."""
        return

    def close(self) -> None:
        """Let go of threads and files."""
        return


class StoreReference(ReferenceSource):
    """Losses that were computed beforehand; works in any layout and asks nothing of a device."""

    def __init__(
        self,
        store: LossStore,
        *,
        micro_batch: int,
        accumulation: int,
        topology: Topology,
        pin_memory: bool = False,
    ) -> None:
        """Read from ``store`` in a thread of its own.

        Args:
            store: opened for the run's domains.
            micro_batch: rows of a micro-batch.
            accumulation: micro-batches of a step.
            topology: this rank's place.
            pin_memory: give pinned tensors, which a device copies asynchronously.
        """
        super().__init__()
        self._store = store
        self._micro_batch, self._accumulation = micro_batch, accumulation
        self._topology, self._pin_memory = topology, pin_memory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="reference")
        self._ahead: tuple[int, list[Future[Array]]] | None = None

    @property
    def identity(self) -> str:
        """See :class:`ReferenceSource`."""
        return self._store.header.model_hash

    def prepare(self, plan: Plan) -> None:
        """Begin to read a plan's losses."""
        if self._topology.is_last_stage:
            self._ahead = (plan.step, self._begin(plan))

    def attach(self, plan: Plan, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """See :meth:`ReferenceSource.attach`; reading begins at once.

        Raises:
            DataError: on iteration, if a window was not scored.
        """
        if not self._topology.is_last_stage:
            return batches
        ahead, self._ahead = self._ahead, None
        found = ahead[1] if ahead is not None and ahead[0] == plan.step else self._begin(plan)
        return _joined(batches, (future.result() for future in found))

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, plan: Plan) -> list[Future[Array]]:
        slots = plan.slots(
            self._micro_batch,
            self._accumulation,
            self._topology.data_rank,
            self._topology.data_size,
        )
        return [self._pool.submit(self._read, plan, rows) for rows in slots]

    def _read(self, plan: Plan, rows: NDArray[np.int64]) -> Array:
        losses = self._store.read(plan.domain[rows], plan.epoch[rows], plan.sample[rows])
        return torch.from_numpy(losses).pin_memory() if self._pin_memory else losses


class ModelReference(ReferenceSource):
    """A frozen model, run on every micro-batch.

    Without a pipeline it runs when a micro-batch is asked for.  In a pipeline every stage has a
    part in it, also those that read nothing: a step's micro-batches go through at once, before
    the step, and are kept meanwhile.  A plan that is read again (before it trains, and to train)
    is not run again.
    """

    def __init__(
        self,
        model: FrozenModel,
        loss: DomainLoss,
        *,
        accumulation: int,
        seq_length: int,
        topology: Topology,
        device: torch.device,
        identity: str,
        overhead: Overhead | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            model: the reference.
            loss: computes losses by token.
            accumulation: micro-batches of a step.
            seq_length: S.
            topology: this rank's place.
            device: where the model is.
            identity: see :class:`ReferenceSource`.
            overhead: is told what the forward passes cost.
        """
        super().__init__()
        self._model, self._recorder = model, TokenLosses(loss)
        self._accumulation, self._seq_length = accumulation, seq_length
        self._topology, self._device = topology, device
        self._identity, self._overhead = identity, overhead
        self._kept: tuple[Plan, list[torch.Tensor]] | None = None

    @property
    def identity(self) -> str:
        """See :class:`ReferenceSource`."""
        return self._identity

    def attach(self, plan: Plan, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """See :meth:`ReferenceSource.attach`; collective at once in a pipeline."""
        if self._kept is not None and self._kept[0] is plan:
            losses = self._kept[1]
            return _joined(batches, iter(losses)) if self._topology.is_last_stage else batches
        self.tokens += plan.domain.size * self._seq_length
        if self._topology.pipe_size == 1:
            return self._one_by_one(plan, batches)
        held = list(batches)
        losses = self._run(held, self._accumulation)
        self._kept = (plan, losses)
        return _joined(iter(held), iter(losses)) if self._topology.is_last_stage else iter(held)

    def _one_by_one(self, plan: Plan, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        kept: list[torch.Tensor] = []
        for batch in batches:
            (losses,) = self._run([batch], 1)
            kept.append(losses)
            yield replace(batch, reference=losses)
        self._kept = (plan, kept)

    def _run(self, batches: Sequence[MicroBatch], count: int) -> list[torch.Tensor]:
        with self._time():
            self._model.evaluate(
                _tokens_and_targets(batches, self._device), count, loss_fn=self._recorder
            )
        return self._recorder.take()

    def _time(self) -> AbstractContextManager[None]:
        if self._overhead is None:
            return nullcontext()
        return self._overhead.time("reference", self._device)


class TokenLosses:
    """Stands in for the loss function and keeps every token's loss of each micro-batch."""

    def __init__(self, loss: DomainLoss) -> None:
        """Compute with ``loss``."""
        self._loss = loss
        self._taken: list[torch.Tensor] = []

    def __call__(self, output: Any, labels: Any) -> torch.Tensor:
        """Keep the losses [B, S] of ``labels[0]`` (targets); returns a scalar, as a loss would."""
        hidden, weight = output
        # As a store holds them: model and store are to give the same.
        losses = self._loss.token_losses(hidden, weight, labels[0]).clamp_(max=LARGEST_LOSS)
        self._taken.append(losses)
        return losses.new_zeros(())

    def take(self) -> list[torch.Tensor]:
        """Return what was kept, float32 [B, S] each, and start afresh."""
        taken, self._taken = self._taken, []
        return taken


def _tokens_and_targets(
    batches: Iterable[MicroBatch], device: torch.device
) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor]]]:
    for batch in batches:
        tokens, targets = (
            torch.as_tensor(part).to(device, non_blocking=True)
            for part in (batch.tokens, batch.targets)
        )
        yield tokens, (targets,)


def _joined(batches: Iterator[MicroBatch], losses: Iterator[Array]) -> Iterator[MicroBatch]:
    for batch, reference in zip(batches, losses, strict=True):
        # A step of a curriculum has shorter rows than what was stored.
        yield replace(batch, reference=reference[:, : batch.targets.shape[1]])
