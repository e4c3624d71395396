"""Gradient alignment: how far each domain's gradient points where another does.

Gradients are taken with ``torch.autograd.grad`` on the model itself, one domain at a time,
next to DeepSpeed and its hooks, which see nothing of it.  Dropout is off: an alignment is of
the data, not of masks, and so it is the same under every layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from megatron.data.batch import MicroBatch
from megatron.data.plan import Plan
from megatron.data.rows import RowReader
from megatron.engine.transfer import to_device
from megatron.mixing.gradient_aim import GradientAim
from megatron.parallel.collectives import reduce_in_place
from megatron.parallel.partition import Partition
from megatron.parallel.topology import Topology
from megatron.signals.ledger import Ledger
from megatron.signals.validation import LossObserver

FloatArray = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_CHUNK = 1 << 22
"""Numbers that are multiplied in float64 at a time."""


class Differentiable(Protocol):
    """What is needed of an engine (:class:`megatron.engine.engine.TrainEngine`)."""

    @property
    def module(self) -> nn.Module:
        """The model: called with tokens and labels, it returns the loss."""
        ...

    @property
    def partitions(self) -> Mapping[str, Partition | None]:
        """How tensor ranks divide each parameter, by name."""
        ...

    @property
    def loss_scale(self) -> float:
        """What a loss is multiplied by so that its gradient fits the number format."""
        ...


class GradientAlignment:
    """Measures <g_i, g_v> / mean_j |g_j| of every domain i on a planned batch.

    g_i is the gradient of the mean loss of the domain's tokens in the global batch, g_v that
    of the weighted held-out losses, or in the form with all other domains, the weighted sum
    of the others' g_j (which takes every gradient twice).  Each is clipped to a norm first.
    A domain that is absent has g_i = 0, and counts in the mean of the norms.

    In memory are two gradients in float32, and the one that a backward pass returns.

    Source: DoGE (arXiv 2310.15393), equation 6, as its released code normalises it.

    Args:
        engine: holds the model, whose parameters are whole (ZeRO at most 2, one stage).
        topology: this rank's place.
        observer: where the model's loss function reports; lent out meanwhile.
        ledger: a ledger of its own, of K domains.
        training: reads training samples.
        held_out: reads held-out samples of K + M domains; used unless ``aim.others``.
        aim: what the gradients are compared with.
        slots: which domains are one, [K]: those of a slot share one gradient.
        max_norm: the norm to which gradients are clipped; 0 = not at all.
        micro_batch: rows of a forward pass.
        accumulation: micro-batches per step.
        device: the model's device.
    """

    def __init__(
        self,
        *,
        engine: Differentiable,
        topology: Topology,
        observer: LossObserver,
        ledger: Ledger,
        training: RowReader,
        held_out: RowReader,
        aim: GradientAim,
        slots: Indices,
        max_norm: float,
        micro_batch: int,
        accumulation: int,
        device: torch.device,
    ) -> None:
        """Keep the parts."""
        self._engine, self._topology = engine, topology
        self._observer, self._ledger = observer, ledger
        self._training, self._held_out = training, held_out
        self._aim, self._slots = aim, slots
        self._max_norm = max_norm
        self._micro_batch, self._accumulation = micro_batch, accumulation
        self._device = device

    def measure(self, planned: Any) -> dict[str, FloatArray]:
        """Return ``gradient_alignment`` [K], and the batch's ``loss_sum`` and ``token_count``.

        Collective: every rank calls it with the same plan.
        """
        plan: Plan = planned.plan
        model = self._engine.module
        training = model.training
        model.eval()
        self._ledger.reset()
        try:
            with self._observer.lent_to(self._ledger):
                alignment = self._measure(plan)
                totals = self._ledger.reduce()
        finally:
            model.train(training)
        return {
            "gradient_alignment": alignment[self._slots],
            "loss_sum": totals.loss_sum,
            "token_count": totals.token_count,
        }

    def _measure(self, plan: Plan) -> FloatArray:
        """Return the alignment of every slot."""
        batch = self._batch(plan)
        vectors = Vectors(self._engine, self._topology, self._device)
        if self._aim.others:
            dots, norms = self._with_others(batch, vectors)
        else:
            dots, norms = self._with_held_out(batch, vectors, self._held_out_batch(plan))
        mean = norms.mean()
        alignment = dots / mean if mean > 0 else np.where(np.isfinite(norms), 0.0, np.nan)
        return self._agreed(alignment)

    def _with_held_out(
        self, batch: _Batch, vectors: Vectors, held_out: _Batch
    ) -> tuple[FloatArray, FloatArray]:
        """Return <g_i, g_v> and the norms of g_i, of every slot."""
        aim, own = vectors.new(), vectors.new()
        with self._observer.lent_to(_Nowhere()):
            shares = self._aim.weights / np.maximum(held_out.tokens, 1.0)
            self._accumulate(vectors, aim, held_out.of(range(len(shares))), shares)
        factor = self._clip(math.sqrt(vectors.dot(aim, aim)))
        dots, norms = np.zeros(batch.slots), np.zeros(batch.slots)
        for slot in batch.present:
            clip, norms[slot] = self._gradient(batch, vectors, own, slot)
            dots[slot] = clip * factor * vectors.dot(own, aim)
        return dots, norms

    def _with_others(self, batch: _Batch, vectors: Vectors) -> tuple[FloatArray, FloatArray]:
        """Return <g_i, sum of the other g_j> and the norms of g_i, of every slot."""
        weights = np.zeros(batch.slots)
        np.add.at(weights, self._slots, self._aim.weights[: len(self._slots)])
        weights *= batch.slots / weights.sum()
        total, own = vectors.new(), vectors.new()
        clips, norms, dots = np.zeros(batch.slots), np.zeros(batch.slots), np.zeros(batch.slots)
        for slot in batch.present:
            clips[slot], norms[slot] = self._gradient(batch, vectors, own, slot)
            total.add_(own, alpha=float(weights[slot] * clips[slot]))
        with self._observer.lent_to(_Nowhere()):
            for slot in batch.present:
                self._gradient(batch, vectors, own, slot)
                # What a domain has in common with itself is no help to others.
                own_share = weights[slot] * norms[slot] ** 2
                dots[slot] = clips[slot] * vectors.dot(own, total) - own_share
        return dots, norms

    def _gradient(
        self, batch: _Batch, vectors: Vectors, into: torch.Tensor, slot: int
    ) -> tuple[float, float]:
        """Write a slot's gradient; return the factor that clips it, and its clipped norm."""
        own = self._slots == slot
        shares = own / max(batch.tokens[own].sum(), 1.0)
        self._accumulate(vectors, into, batch.of([slot]), shares)
        norm = math.sqrt(vectors.dot(into, into))
        clip = self._clip(norm)
        return clip, clip * norm

    def _accumulate(
        self,
        vectors: Vectors,
        into: torch.Tensor,
        micro_batches: Iterable[MicroBatch],
        shares: FloatArray,
    ) -> None:
        """Write the gradient of the loss in which a token of domain k counts shares[k]."""
        into.zero_()
        for batch in micro_batches:
            weight = shares[np.asarray(batch.domain_ids)].astype(np.float32)
            weighted = dataclasses.replace(batch, sample_weight=weight)
            vectors.add_gradient(into, *to_device(weighted, self._device))
        if self._topology.data_size > 1:
            dist.all_reduce(into, group=self._topology.data_group)

    def _clip(self, norm: float) -> float:
        return min(1.0, self._max_norm / norm) if self._max_norm > 0 and norm > 0 else 1.0

    def _batch(self, plan: Plan) -> _Batch:
        """Read this rank's samples of the step."""
        mine = plan.slots(
            self._micro_batch,
            self._accumulation,
            self._topology.data_rank,
            self._topology.data_size,
        ).reshape(-1)
        return self._read(
            self._training, plan.domain[mine], plan.epoch[mine], plan.sample[mine], self._slots
        )

    def _held_out_batch(self, plan: Plan) -> _Batch:
        """Read this rank's part of as many held-out windows as the step has samples.

        They are shared out by the weights, and move on with every step.
        """
        counts = spread(self._aim.weights, plan.domain.size)
        domain = np.repeat(np.arange(len(counts)), counts)
        place = np.concatenate([np.arange(count) for count in counts])
        epoch, sample = self._held_out.wrapped(domain, (plan.step - 1) * counts[domain] + place)
        mine = slice(self._topology.data_rank, None, self._topology.data_size)
        slots = np.arange(len(counts))
        return self._read(self._held_out, domain[mine], epoch[mine], sample[mine], slots)

    def _read(
        self,
        reader: RowReader,
        domain: npt.NDArray[Any],
        epoch: Indices,
        sample: Indices,
        slots: Indices,
    ) -> _Batch:
        """Read samples by slot; tokens are counted over all data ranks."""
        read: list[list[MicroBatch]] = []
        for slot in range(int(slots.max()) + 1):
            own = np.flatnonzero(slots[domain] == slot)
            read.append(list(reader.read(domain[own], epoch[own], sample[own])))
        tokens = np.zeros(len(slots))
        for batch in (batch for batches in read for batch in batches):
            counts = np.asarray(batch.loss_mask, dtype=np.float64).sum(axis=1)
            np.add.at(tokens, np.asarray(batch.domain_ids), counts)
        if self._topology.data_size > 1:
            total = torch.from_numpy(tokens)
            dist.all_reduce(total, group=self._topology.host_data_group)
        by_slot = np.bincount(slots, weights=tokens, minlength=len(read))
        return _Batch(batches=read, tokens=tokens, present=np.flatnonzero(by_slot).tolist())

    def _agreed(self, alignment: FloatArray) -> FloatArray:
        """Return rank 0's numbers, so that not even rounding differs between ranks."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return alignment
        told = torch.from_numpy(alignment).to(self._device)
        dist.broadcast(told, src=0)
        agreed: FloatArray = told.cpu().numpy()
        return agreed


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """A rank's samples by slot, and all ranks' tokens by domain.

    Attributes:
        batches: of each slot.
        tokens: unmasked tokens of each domain in the whole batch.
        present: slots with any.
    """

    batches: Sequence[Sequence[MicroBatch]]
    tokens: FloatArray
    present: list[int]

    @property
    def slots(self) -> int:
        return len(self.batches)

    def of(self, slots: Iterable[int]) -> Iterable[MicroBatch]:
        return (batch for slot in slots for batch in self.batches[slot])


class Vectors:
    """Gradients as flat float32 vectors, and their products over all tensor ranks.

    A parameter that tensor ranks divide counts with each rank's part, one that they all hold
    counts once; tied weights are one parameter.

    Args:
        engine: holds the model.
        topology: this rank's place.
        device: the model's device.
    """

    def __init__(self, engine: Differentiable, topology: Topology, device: torch.device) -> None:
        self._engine, self._topology, self._device = engine, topology, device
        self._parameters: list[nn.Parameter] = []
        self._counted: list[tuple[int, int]] = []
        self._size = 0
        for name, parameter in engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            end = self._size + parameter.numel()
            divided = engine.partitions.get(name) is not None
            if divided or topology.tensor_rank == 0:
                self._count(self._size, end)
            self._parameters.append(parameter)
            self._size = end

    def _count(self, start: int, end: int) -> None:
        if self._counted and self._counted[-1][1] == start:
            start = self._counted.pop()[0]
        self._counted.append((start, end))

    def new(self) -> torch.Tensor:
        """Return a vector of zeros."""
        return torch.zeros(self._size, dtype=torch.float32, device=self._device)

    def add_gradient(self, into: torch.Tensor, tokens: torch.Tensor, labels: Any) -> None:
        """Add the gradient of the model's loss on a micro-batch; no ``.grad`` is touched."""
        scale = self._engine.loss_scale
        loss = self._engine.module(tokens, labels) * scale
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        place = 0
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None:
                part = into[place : place + parameter.numel()]
                part.add_(gradient.reshape(-1), alpha=1.0 / scale)
            place += parameter.numel()

    def dot(self, one: torch.Tensor, other: torch.Tensor) -> float:
        """Return the scalar product, added up in float64."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for start, end in self._counted:
            for first in range(start, end, _CHUNK):
                part = slice(first, min(first + _CHUNK, end))
                total += (one[part].double() * other[part].double()).sum()
        return float(reduce_in_place(total, self._topology))


class _Nowhere:
    """Takes sums that nobody asked for."""

    def add(self, *sums: torch.Tensor) -> None:
        """Take them."""


def spread(weights: FloatArray, samples: int) -> Indices:
    """Share out samples by weight, at least one to each that has any weight.

    Args:
        weights: [N], at least 0, not all 0.
        samples: to share out; where there are fewer than weights, each gets one.

    Returns:
        Counts [N].
    """
    positive = weights > 0
    spare = max(samples - int(positive.sum()), 0)
    owed = weights / weights.sum() * samples - positive
    owed = np.maximum(owed, 0.0)
    owed *= spare / owed.sum() if owed.sum() > 0 else 0.0
    counts = np.floor(owed).astype(np.int64)
    rest = np.argsort(counts - owed, kind="stable")[: spare - int(counts.sum())]
    counts[rest] += 1
    return np.asarray(counts + positive, dtype=np.int64)
