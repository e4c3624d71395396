"""The uses of held-out data: for the controller, for reports, and for the final test."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megatron.config import Config
from megatron.data.domain import Domain
from megatron.data.validation import ValidationSet
from megatron.engine.runtime import Runtime
from megatron.parallel.topology import Topology
from megatron.signals.validation import LossObserver, Validation
from megatron.signals.windows import WindowSums
from megatron.training.domains import OpenDomains
from megatron.training.engines import Batch


def contributes(topology: Topology) -> bool:
    """Whether this rank is the one of its data-parallel place that adds its losses to sums."""
    return topology.is_last_stage and topology.tensor_rank == 0


class HeldOutUses:
    """The three uses of held-out data, each with its own windows."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        topology: Topology,
        batch: Batch,
        domains: OpenDomains,
        observer: LossObserver,
        eod_id: int | None,
    ) -> None:
        def use(parts: Sequence[Domain | None], samples: int) -> Validation:
            sets = [
                ValidationSet(
                    domain,
                    samples,
                    seed=config.training.seed,
                    masked_token=eod_id,
                    vocab_size=config.model.vocab_size,
                )
                if domain is not None and samples > 0
                else None
                for domain in parts
            ]
            return Validation(
                sets,
                sums=partial(WindowSums, device=runtime.device, contributes=contributes(topology)),
                observer=observer,
                micro_batch=batch.micro,
                data_rank=topology.data_rank,
                data_size=topology.data_size,
                device=runtime.device,
            )

        training = config.training
        self.controller = use(domains.valid, config.mixing.validation_samples)
        self.reported = use(domains.valid, training.validation_samples(batch.total))
        self.test = use(domains.test, training.validation_samples(batch.total, "test"))
