"""Who measures what a mixing method may ask of a step before it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron.config import Config
from megatron.data.batch import MicroBatch
from megatron.data.rows import RowReader
from megatron.engine.engine import TrainEngine
from megatron.mixing.base import Signal
from megatron.mixing.controller import Controller
from megatron.parallel.topology import Topology
from megatron.signals.foresight import BatchLosses, Foresight, Measurer
from megatron.signals.gradients import GradientAlignment
from megatron.signals.held_out_batch import HeldOutBatch
from megatron.signals.ledger import Ledger
from megatron.signals.validation import LossObserver
from megatron.training.domains import OpenDomains
from megatron.training.planner import Planned


@dataclass(frozen=True, kw_only=True)
class ForesightParts:
    """What measuring ahead is made of.

    Attributes:
        config: of the run.
        topology: this rank's place.
        engine: holds the model.
        observer: where the model's loss function reports.
        domains: opened data.
        read: returns this rank's micro-batches of a planned step, as training gets them.
        micro: rows of a micro-batch.
        accumulation: micro-batches per step.
        eod_id: the token behind which the loss is masked, or None.
        contributes: whether this rank adds its losses to sums.
        device: the model's device.
    """

    config: Config
    topology: Topology
    engine: TrainEngine
    observer: LossObserver
    domains: OpenDomains
    read: Callable[[Planned], Iterator[MicroBatch]]
    micro: int
    accumulation: int
    eod_id: int | None
    contributes: bool
    device: torch.device


def build_foresight(parts: ForesightParts, mixer: Controller) -> Foresight:
    """Return the measurers of the signals that ``mixer`` reads."""
    measurers: dict[Signal, Measurer] = {}
    if mixer.needs & {Signal.LOSS, Signal.EXCESS_LOSS}:
        losses = _batch_losses(parts, compared=Signal.EXCESS_LOSS in mixer.needs)
        measurers |= {Signal.LOSS: losses, Signal.EXCESS_LOSS: losses}
    if Signal.BATCH_VALID_LOSS in mixer.needs:
        measurers[Signal.BATCH_VALID_LOSS] = _held_out_batch(parts)
    if Signal.GRADIENT_ALIGNMENT in mixer.needs:
        measurers[Signal.GRADIENT_ALIGNMENT] = _gradients(parts, mixer)
    return Foresight(measurers)


def _ledger(parts: ForesightParts, *, compared: bool = False) -> Ledger:
    return Ledger(
        len(parts.domains.names), parts.device, contributes=parts.contributes, compared=compared
    )


def _reader(parts: ForesightParts, *, held_out: bool) -> RowReader:
    return RowReader(
        parts.domains.valid if held_out else parts.domains.train,
        seq_length=parts.config.model.context_length,
        rows=parts.micro,
        masked_token=parts.eod_id,
        vocab_size=parts.config.model.vocab_size,
    )


def _batch_losses(parts: ForesightParts, *, compared: bool) -> BatchLosses:
    return BatchLosses(
        evaluator=parts.engine,
        observer=parts.observer,
        ledger=_ledger(parts, compared=compared),
        read=parts.read,
        accumulation=parts.accumulation,
        device=parts.device,
    )


def _held_out_batch(parts: ForesightParts) -> HeldOutBatch:
    return HeldOutBatch(
        evaluator=parts.engine,
        topology=parts.topology,
        observer=parts.observer,
        ledger=_ledger(parts),
        held_out=_reader(parts, held_out=True),
        micro_batch=parts.micro,
        accumulation=parts.accumulation,
        device=parts.device,
    )


def _gradients(parts: ForesightParts, mixer: Controller) -> GradientAlignment:
    aim = mixer.gradient_aim
    assert aim is not None, "a method that reads gradients says what they are compared with"
    return GradientAlignment(
        engine=parts.engine,
        topology=parts.topology,
        observer=parts.observer,
        ledger=_ledger(parts),
        training=_reader(parts, held_out=False),
        held_out=_reader(parts, held_out=True),
        aim=aim,
        slots=mixer.slots,
        max_norm=parts.config.gradient_clipping,
        micro_batch=parts.micro,
        accumulation=parts.accumulation,
        device=parts.device,
    )
