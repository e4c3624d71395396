"""The composition root: from a configuration to a loop with everything in its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from megatron.config import Config, deepspeed_config, resolve_batch
from megatron.data.domain import Domain
from megatron.data.loader import Loader
from megatron.data.sampler import Sampler
from megatron.data.validation import ValidationSet
from megatron.engine.engine import TrainEngine
from megatron.engine.optimizer import build_optimizer
from megatron.engine.runtime import Runtime, sum_on_host
from megatron.engine.schedule import learning_rate
from megatron.engine.sequential import SequentialEngine
from megatron.errors import DataError
from megatron.mixing.controller import Controller
from megatron.model.accounting import flops_per_token
from megatron.model.domain_loss import DomainLoss
from megatron.model.gpt import GPT, layers, param_groups
from megatron.model.layer_run import recomputed_blocks
from megatron.monitor.build import build_sinks
from megatron.monitor.overhead import Overhead
from megatron.monitor.sink import SinkGroup
from megatron.monitor.throughput import Throughput
from megatron.parallel.rng import DropoutRng
from megatron.parallel.topology import Topology
from megatron.signals.ledger import Ledger
from megatron.signals.validation import LossObserver, Validation
from megatron.signals.windows import WindowSums
from megatron.training.compatible import model_facts
from megatron.training.domains import OpenDomains
from megatron.training.guard import NonFiniteGuard
from megatron.training.layout import layer_bounds, run_layout
from megatron.training.planner import Planner
from megatron.training.reading import PlanReader
from megatron.training.recorder import RunRecorder
from megatron.training.token_costs import TokenCosts


class Batch(NamedTuple):
    """Batch sizes of a run on its layout, as ``resolve_batch`` gives them."""

    micro: int
    accumulation: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that a run is made of, before it is tied into a loop."""

    topology: Topology
    engine: TrainEngine
    planner: Planner
    loader: Loader
    reader: PlanReader
    ledger: Ledger
    guard: NonFiniteGuard
    sinks: SinkGroup
    recorder: RunRecorder
    throughput: Throughput
    overhead: Overhead
    validation: Validation
    test: Validation
    learning_rate: Callable[[int], float]
    samples_seen: Callable[[], npt.NDArray[np.int64]]


def run_facts(config: Config) -> dict[str, object]:
    """Return what the manifest says beside the layout; some of it can move the last bits."""
    return {
        "model": model_facts(config),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "numpy": np.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processors": os.cpu_count(),
    }


def build(
    config: Config,
    runtime: Runtime,
    domains: OpenDomains,
    mixer: Controller,
) -> Parts:
    """Build the parts of a run; collective (DeepSpeed spreads the model here).

    Args:
        config: the run's configuration, with ``model.vocab_size`` filled in.
        runtime: ranks and device.
        domains: opened data.
        mixer: the controller, before its first step.
    """
    layout = run_layout(config, runtime.world_size)
    topology = Topology.create(
        layout, runtime.rank, sequence_parallel=config.parallel.sequence_parallel
    )
    batch = Batch(*resolve_batch(config.batch, layout.data_size))
    overhead = Overhead()
    ledger = Ledger(
        len(domains.names),
        runtime.device,
        contributes=contributes(topology),
        overhead=overhead,
    )
    observer = LossObserver(ledger)
    engine = _build_engine(config, topology, batch, observer)
    eod_id = _eod_id(config, domains)
    held_out = _HeldOut(config, runtime, topology, batch, domains, observer, eod_id)
    sampler = Sampler(
        domains.names,
        domains.train,
        seed=config.training.seed,
        global_batch=batch.total,
        micro_batch=batch.micro,
        unit=config.mixing.unit,
        draw=config.mixing.draw,
        on_exhausted=config.mixing.on_exhausted,
    )
    planner = Planner(
        mixer=mixer,
        sampler=sampler,
        lag=config.mixing.lag,
        measure=lambda: held_out.controller.measure(engine).loss,
        overhead=overhead,
    )
    loader = Loader(
        domains.train,
        seq_length=config.model.context_length,
        micro_batch=batch.micro,
        accumulation=batch.accumulation,
        data_rank=topology.data_rank,
        data_size=topology.data_size,
        eod_mask_loss=config.training.eod_mask_loss,
        eod_id=eod_id,
        reduce_counts=partial(sum_on_host, group=topology.host_data_group),
        vocab_size=config.model.vocab_size,
        pin_memory=runtime.device.type == "cuda",
    )
    sinks = build_sinks(
        config.logging,
        config.checkpoint.run_dir,
        rank=runtime.rank,
        total_steps=config.training.train_iters,
        audit_samples=config.training.audit_samples,
    )
    throughput = _throughput(config, runtime)
    return Parts(
        topology=topology,
        engine=engine,
        planner=planner,
        loader=loader,
        reader=PlanReader(loader, sampler, reads=topology.is_first_stage or topology.is_last_stage),
        ledger=ledger,
        guard=NonFiniteGuard(
            limit=config.training.nonfinite_limit,
            loss_scaling=config.precision == "fp16",
            domains=domains.names,
        ),
        sinks=sinks,
        recorder=RunRecorder(
            sinks,
            domains=domains.names,
            targets=domains.targets,
            throughput=throughput,
            epochs=lambda: sampler.epochs,
            describe=planner.describe,
            loss_scale=(lambda: engine.loss_scale) if config.precision == "fp16" else None,
            log_interval=config.logging.log_interval,
            total_steps=config.training.train_iters,
            bytes_per_token=domains.bytes_per_token,
            audit=config.training.audit_samples,
            overhead=overhead,
            token_costs=TokenCosts(
                seq_length=config.model.context_length,
                validation=held_out.controller.windows * config.model.context_length,
            ),
        ),
        throughput=throughput,
        overhead=overhead,
        validation=held_out.reported,
        test=held_out.test,
        learning_rate=_learning_rate(config),
        samples_seen=lambda: sampler.samples_seen,
    )


def _build_engine(
    config: Config,
    topology: Topology,
    batch: Batch,
    observer: LossObserver,
) -> TrainEngine:
    settings: dict[str, Any] = deepspeed_config(
        config, micro=batch.micro, accumulation=batch.accumulation, data_size=topology.data_size
    )
    assert config.model.vocab_size is not None
    loss_fn = DomainLoss(topology=topology, vocab_size=config.model.vocab_size, observe=observer)
    dropout = DropoutRng(seed=config.training.seed, topology=topology)

    def before_micro_batch(step: int, micro: int) -> None:
        dropout.begin(step=step, micro_batch=micro)

    if topology.pipe_size == 1:
        model = GPT(
            config.model, topology, seed=config.training.seed, loss_fn=loss_fn, dropout=dropout
        )
        return SequentialEngine(
            model=model,
            topology=topology,
            optimizer=_optimizer(config, model),
            config=settings,
            before_micro_batch=before_micro_batch,
        )
    # DeepSpeed chooses its device when it is imported, which start_runtime has prepared.
    from megatron.engine.pipeline import PipelineEngine, Stage

    stage = Stage(
        layers(config.model, topology, seed=config.training.seed, dropout=dropout),
        topology=topology,
        bounds=layer_bounds(config),
        loss_fn=loss_fn,
        dropout=dropout,
        recomputed=recomputed_blocks(config.model),
    )
    return PipelineEngine(
        stage=stage,
        optimizer=_optimizer(config, stage),
        config=settings,
        before_micro_batch=before_micro_batch,
    )


def _optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(
        param_groups(model, config.optimizer.weight_decay),
        kind=config.optimizer.type,
        lr=config.optimizer.lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
    )


def contributes(topology: Topology) -> bool:
    """Whether this rank is the one of its data-parallel place that adds its losses to sums."""
    return topology.is_last_stage and topology.tensor_rank == 0


class _HeldOut:
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


def _learning_rate(config: Config) -> Callable[[int], float]:
    schedule, iters = config.schedule, config.training.train_iters

    def rate(step: int) -> float:
        return learning_rate(
            step,
            lr=config.optimizer.lr,
            min_lr=schedule.min_lr,
            style=schedule.lr_decay_style,
            warmup_steps=schedule.warmup_steps(iters),
            decay_steps=schedule.decay_steps(iters),
        )

    return rate


def _throughput(config: Config, runtime: Runtime) -> Throughput:
    peak = config.logging.peak_theoretical_tflops
    return Throughput(
        flops_per_token=flops_per_token(config.model),
        peak_flops=peak * 1e12 * runtime.world_size if peak else None,
    )


def _eod_id(config: Config, domains: OpenDomains) -> int | None:
    """Return the end-of-document token as the data's sidecars state it."""
    if not config.training.eod_mask_loss:
        return None
    for domain in domains.train:
        for source in domain.sources:
            sidecar = source.reader.sidecar
            if sidecar is not None and sidecar.eod_id is not None:
                return sidecar.eod_id
    raise DataError(
        "eod_mask_loss is on, but no domain's .meta.json names the end-of-document token; "
        "preprocess the data again with --append-eod, or switch eod_mask_loss off"
    )
