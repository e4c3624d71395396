"""The composition root: from a configuration to a loop with everything in its place."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
import torch

from megatron.config import Config, deepspeed_config, resolve_batch
from megatron.data.loader import Loader
from megatron.data.sampler import Sampler
from megatron.engine.engine import TrainEngine
from megatron.engine.runtime import Runtime, sum_on_host
from megatron.errors import DataError
from megatron.mixing.base import Signal
from megatron.mixing.controller import Controller
from megatron.mixing.exhaustion import ExhaustionWatch
from megatron.model.accounting import flops_per_token
from megatron.monitor.build import build_sinks
from megatron.monitor.overhead import Overhead
from megatron.monitor.sink import SinkGroup
from megatron.monitor.throughput import Throughput
from megatron.parallel.topology import Topology
from megatron.signals.foresight import Foresight
from megatron.signals.ledger import Ledger
from megatron.signals.reference import ModelReference, ReferenceSource
from megatron.signals.validation import LossObserver, Validation
from megatron.training.characters import tokens_per_character
from megatron.training.compatible import model_facts
from megatron.training.domains import OpenDomains, average_weights
from megatron.training.engines import Batch, build_engine
from megatron.training.foresight import ForesightParts, build_foresight
from megatron.training.guard import RunGuard
from megatron.training.guards import build_guard
from megatron.training.held_out import HeldOutUses, contributes
from megatron.training.layout import run_layout
from megatron.training.loop import Reader
from megatron.training.planner import Planner
from megatron.training.profiling import attach_profiler, dump_state
from megatron.training.reading import PlanReader
from megatron.training.recorder import RunRecorder
from megatron.training.reference import ReferenceReader, reference_source
from megatron.training.schedule import run_schedule
from megatron.training.statistics import attach_statistics
from megatron.training.token_costs import TokenCosts, foresight_tokens


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that a run is made of, before it is tied into a loop."""

    topology: Topology
    engine: TrainEngine
    planner: Planner
    loader: Loader
    reader: Reader
    reference: ReferenceSource | None
    foresight: Foresight
    ledger: Ledger
    guard: RunGuard
    sinks: SinkGroup
    recorder: RunRecorder
    throughput: Throughput
    overhead: Overhead
    validation: Validation
    test: Validation
    learning_rate: Callable[[int], float]
    samples_seen: Callable[[], npt.NDArray[np.int64]]

    def close(self) -> None:
        """Stop what reads in the background."""
        self.loader.close()
        if self.reference is not None:
            self.reference.close()


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
    say: Callable[[str], None] = lambda text: None,
) -> Parts:
    """Build the parts of a run; collective (DeepSpeed spreads the model here).

    Args:
        config: the run's configuration, with ``model.vocab_size`` filled in.
        runtime: ranks and device.
        domains: opened data.
        mixer: the controller, before its first step.
        say: takes a line for the console.
    """
    layout = run_layout(config, runtime.world_size)
    topology = Topology.create(
        layout, runtime.rank, sequence_parallel=config.parallel.sequence_parallel
    )
    batch, training = Batch(*resolve_batch(config.batch, layout.data_size)), config.training
    overhead = Overhead()
    ledger = Ledger(
        len(domains.names),
        runtime.device,
        contributes=contributes(topology),
        compared=Signal.EXCESS_LOSS in mixer.needs,
        overhead=overhead,
    )
    observer = LossObserver(ledger)
    engine = build_engine(config, topology, batch, observer)
    attach_statistics(config, engine, topology, batch, runtime.device)
    attach_profiler(config, engine, runtime)
    if config.logging.dump_state and runtime.rank == 0:
        given = deepspeed_config(config, batch.micro, batch.accumulation, layout.data_size)
        dump_state(config, engine, given)
    eod_id = masked_token(config, domains)
    held_out = HeldOutUses(config, runtime, topology, batch, domains, observer, eod_id)
    sampler = _sampler(config, domains, batch)
    loader = _loader(config, runtime, topology, batch, domains, eod_id)
    reads = topology.is_first_stage or topology.is_last_stage
    reader: Reader = PlanReader(loader, sampler, reads=reads)
    reference = None
    if Signal.EXCESS_LOSS in mixer.needs:
        reference = reference_source(
            config,
            runtime,
            topology,
            domains,
            micro=batch.micro,
            accumulation=batch.accumulation,
            overhead=overhead,
            say=say,
        )
        reader = ReferenceReader(reader, reference)
    planner = Planner(
        mixer=mixer,
        sampler=sampler,
        lag=config.mixing.lag,
        measure=lambda: held_out.controller.measure(engine).loss,
        overhead=overhead,
    )
    foresight = build_foresight(
        ForesightParts(
            config=config,
            topology=topology,
            engine=engine,
            observer=observer,
            domains=domains,
            read=reader.read,
            micro=batch.micro,
            accumulation=batch.accumulation,
            eod_id=eod_id,
            contributes=contributes(topology),
            device=runtime.device,
        ),
        mixer,
    )
    throughput = _throughput(config, runtime)
    sinks = build_sinks(
        config.logging,
        config.checkpoint.run_dir,
        rank=runtime.rank,
        total_steps=config.training.train_iters,
        audit_samples=config.training.audit_samples,
    )
    schedule = run_schedule(config)
    engine.follow_betas(schedule.betas)
    length = config.model.context_length
    costs = TokenCosts(
        seq_length=length,
        validation=held_out.controller.windows * length,
        reference=isinstance(reference, ModelReference),
        foresight=foresight_tokens(mixer, batch.total * length),
        row_length=partial(config.data.row_length, seq_length=length),
    )
    return Parts(
        topology=topology,
        engine=engine,
        planner=planner,
        loader=loader,
        reader=reader,
        reference=reference,
        foresight=foresight,
        ledger=ledger,
        guard=build_guard(config, domains.names, engine, ledger, say),
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
            token_costs=costs,
            exhaustion=_exhaustion(config, domains, batch),
            average_weights=average_weights(config.domains),
            tokens_per_character=tokens_per_character(
                config, domains, training.validation_samples(batch.total)
            )
            if runtime.rank == 0
            else None,
            say=say,
        ),
        throughput=throughput,
        overhead=overhead,
        validation=held_out.reported,
        test=held_out.test,
        learning_rate=schedule.rate,
        samples_seen=lambda: sampler.samples_seen,
    )


def _sampler(config: Config, domains: OpenDomains, batch: Batch) -> Sampler:
    return Sampler(
        domains.names,
        domains.train,
        seed=config.training.seed,
        global_batch=batch.total,
        micro_batch=batch.micro,
        unit=config.mixing.unit,
        draw=config.mixing.draw,
        on_exhausted=config.mixing.on_exhausted,
    )


def _exhaustion(config: Config, domains: OpenDomains, batch: Batch) -> ExhaustionWatch:
    return ExhaustionWatch(
        domains=domains.names,
        unique=[float(domain.num_windows(0)) for domain in domains.train],
        samples_per_step=batch.total,
        total_steps=config.training.train_iters,
        on_exhausted=config.mixing.on_exhausted,
        unit={"sample": 1, "micro_batch": batch.micro, "step": batch.total}[config.mixing.unit],
    )


def _loader(
    config: Config,
    runtime: Runtime,
    topology: Topology,
    batch: Batch,
    domains: OpenDomains,
    eod_id: int | None,
) -> Loader:
    return Loader(
        domains.train,
        seq_length=config.model.context_length,
        micro_batch=batch.micro,
        accumulation=batch.accumulation,
        data_rank=topology.data_rank,
        data_size=topology.data_size,
        eod_mask_loss=config.training.eod_mask_loss,
        eod_id=eod_id,
        reduce_counts=partial(sum_on_host, group=topology.host_data_group),
        lengths=partial(config.data.row_length, seq_length=config.model.context_length),
        vocab_size=config.model.vocab_size,
        pin_memory=runtime.device.type == "cuda",
    )


def _throughput(config: Config, runtime: Runtime) -> Throughput:
    peak = config.logging.peak_theoretical_tflops
    return Throughput(
        flops_per_token=flops_per_token(config.model),
        peak_flops=peak * 1e12 * runtime.world_size if peak else None,
    )


def masked_token(config: Config, domains: OpenDomains) -> int | None:
    """Return the end-of-document token: the configuration's, or as the data's sidecars state it."""
    if not config.training.eod_mask_loss:
        return None
    for known in (config.model.eod_token_id, domains.eod_id):
        if known is not None:
            return known
    raise DataError(
        "eod_mask_loss is on, but no domain's .meta.json names the end-of-document token; set "
        "eod_token_id, preprocess the data again with --append-eod, or switch eod_mask_loss off"
    )
