"""A plan in lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from megatron.monitor.throughput import short
from megatron.training.plan.advice import warnings
from megatron.training.plan.assumptions import Assumptions
from megatron.training.plan.communication import seconds
from megatron.training.plan.compute import Plan, StagePlan
from megatron.training.plan.units import size

_DAY = 86_400.0


def report(plan: Plan, assumptions: Assumptions) -> list[str]:
    """Return the lines: layout, model, memory of every stage, traffic, time, warnings."""
    return [
        *_layout(plan),
        *_memory(plan, assumptions),
        *_pipeline(plan),
        *_traffic(plan, assumptions),
        *_time(plan, assumptions),
        *(f"warning: {text}" for text in warnings(plan, assumptions)),
    ]


def _layout(plan: Plan) -> Iterator[str]:
    layout, model = plan.layout, plan.config.model
    recomputed = (
        f"every {model.checkpoint_num_layers} blocks recomputed"
        if model.checkpoint_activations
        else "nothing recomputed"
    )
    sequence = ", sequence divided too" if plan.config.parallel.sequence_parallel else ""
    shared = plan.layout.expert_size
    experts = f", experts divided among {shared} data ranks" if shared > 1 else ""
    offloaded = ", optimizer on the host" if plan.zero.optimizer_on_host else ""
    yield (
        f"plan: {layout.world_size:,} ranks = pipeline {layout.pipe_size} × data "
        f"{layout.data_size} × tensor {layout.tensor_size}{sequence}{experts}; "
        f"{plan.config.precision}, ZeRO stage {plan.zero.stage}{offloaded}, {recomputed}"
    )
    yield (
        f"model: {plan.parameters:,} parameters{active(plan)} (vocabulary padded to "
        f"{model.padded_vocab_size(layout.tensor_size):,}), "
        f"{plan.flops_per_token / 1e9:.4g} GFLOP per token, forward and backward"
    )
    yield (
        f"batch: {plan.micro} per rank × {plan.accumulation} accumulated × {layout.data_size} data "
        f"ranks = {plan.total:,} samples of {model.context_length:,} tokens = "
        f"{plan.tokens_per_step:,} tokens per step"
    )


def active(plan: Plan) -> str:
    """Say how many parameters a token passes through, where those are not all."""
    if plan.active_parameters == plan.parameters:
        return ""
    return f", {plan.active_parameters:,} of them active"


_COLUMNS = ("weights", "gradients", "optimizer", "buffers", "activations", "in flight", "peak")


def _memory(plan: Plan, assumptions: Assumptions) -> Iterator[str]:
    yield "memory of one rank, by stage (layers are embedding, blocks, final norm, output):"
    yield f"{'stage':>7} {'layers':>9} {'parameters':>14} " + " ".join(
        f"{name:>11}" for name in _COLUMNS
    )
    for alike in _alike(plan):
        yield _row(plan, alike)
    worst = plan.worst
    phase = max(worst.phases, key=worst.phases.__getitem__)
    where = f"stage {worst.stage}" if plan.layout.pipe_size > 1 else "every rank alike"
    share = worst.peak / assumptions.usable_memory
    yield (
        f"most memory: {where}, {size(worst.peak)} in {phase} = {share:.0%} of the "
        f"{size(assumptions.usable_memory)} usable of {size(assumptions.device_memory)} "
        f"({assumptions.headroom:.0%} left to driver, collectives and gaps)"
    )
    if worst.states.host:
        yield f"host memory: {size(worst.states.host)} for each rank"
    copied = ", and as much host memory for async_save" if plan.config.checkpoint.async_save else ""
    yield f"checkpoint: about {size(plan.checkpoint_bytes)}{copied}, all ranks together"


def _alike(plan: Plan) -> list[list[StagePlan]]:
    """Put neighbouring stages together that need the same."""
    groups: list[list[StagePlan]] = []
    for stage in plan.stages:
        last = groups[-1][-1] if groups else None
        same = (
            last is not None
            and last.states == stage.states
            and last.activations == stage.activations
            and last.last - last.first == stage.last - stage.first
        )
        if same:
            groups[-1].append(stage)
        else:
            groups.append([stage])
    return groups


def _row(plan: Plan, alike: list[StagePlan]) -> str:
    first, last = alike[0], alike[-1]
    held, activations = first.states, first.activations
    stages = f"{first.stage}" if first is last else f"{first.stage}-{last.stage}"
    layers = f"{first.first}-{last.last - 1}"
    cells = (
        size(held.weights),
        size(held.gradients),
        size(held.optimizer),
        size(held.bucket + held.gathered + held.arriving),
        size(activations.total),
        f"{activations.in_flight}",
        size(first.peak),
    )
    return f"{stages:>7} {layers:>9} {first.parameters:>14,} " + " ".join(
        f"{cell:>11}" for cell in cells
    )


def _pipeline(plan: Plan) -> Iterator[str]:
    if plan.layout.pipe_size > 1:
        yield (
            f"pipeline: idle for {plan.bubble:.1%} of a step ({plan.layout.pipe_size} stages, "
            f"{plan.accumulation} micro-batches); the slowest stage computes "
            f"{plan.imbalance:.2f} times the average"
        )


def _traffic(plan: Plan, assumptions: Assumptions) -> Iterator[str]:
    busiest = max(plan.stages, key=lambda stage: sum(stage.sent.values()))
    if not busiest.sent:
        yield "communication: none"
        return
    kinds = ", ".join(f"{kind} {size(sent)}" for kind, sent in busiest.sent.items())
    where = f" (stage {busiest.stage})" if plan.layout.pipe_size > 1 else ""
    line = (
        f"communication: a rank{where} sends {size(sum(busiest.sent.values()))} per step: {kinds}"
    )
    if assumptions.bandwidth is not None:
        line += f"; {seconds(busiest.sent, assumptions.bandwidth):.3g} s at " + (
            f"{assumptions.bandwidth / 1e9:g} GB/s, if not overlapped"
        )
    yield line


def _time(plan: Plan, assumptions: Assumptions) -> Iterator[str]:
    if plan.config.training.counts_epochs and not assumptions.tokens:
        yield "budget: train_epochs needs the data to be counted: see --check, or give --tokens"
        return
    steps, data = plan.config.training.train_iters, plan.config.data
    rows = data.tokens_per_row(steps, plan.config.model.context_length)
    tokens = assumptions.tokens or float(plan.total * rows)
    if assumptions.tokens:
        steps = -(-int(tokens) // plan.tokens_per_step)
    total = plan.flops_per_token * tokens
    yield f"budget: {short(tokens)} tokens = {steps:,} steps, {total:.3g} FLOP"
    if assumptions.peak_flops is None:
        yield "time: not known without --peak-tflops (or peak_theoretical_tflops)"
        return
    step = plan.step_seconds(assumptions.peak_flops * assumptions.utilisation)
    days = step * tokens / plan.tokens_per_step / _DAY
    yield (
        f"time: {days:.3g} days ({days * plan.layout.world_size:,.4g} device-days), {step:.3g} s "
        f"per step, {short(plan.tokens_per_step / step)} tokens/s, at "
        f"{assumptions.utilisation:.0%} of {assumptions.peak_flops / 1e12:g} TFLOP/s per device"
    )
