"""What is wrong with a plan, and which change would put it right, tried by the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron.config import Config
from megatron.errors import ConfigError
from megatron.training.layout import run_layout
from megatron.training.plan.assumptions import Assumptions
from megatron.training.plan.communication import seconds
from megatron.training.plan.compute import Plan, make_plan
from megatron.training.plan.units import size

_MOST_BUBBLE = 0.2
_MOST_IMBALANCE = 1.15

Change = Callable[[Plan, Assumptions], Iterator[tuple[str, Config]]]


def warnings(plan: Plan, assumptions: Assumptions) -> list[str]:
    """Return a sentence for everything about the plan that a user should think about."""
    found = [
        *_fit(plan, assumptions),
        *_bubble(plan),
        *_nodes(plan, assumptions),
        *_balance(plan),
        *_bucket(plan, assumptions),
        *_traffic(plan, assumptions),
    ]
    return found


def _fit(plan: Plan, assumptions: Assumptions) -> Iterator[str]:
    need, usable = plan.worst.peak, assumptions.usable_memory
    if need <= usable:
        return
    where = f"stage {plan.worst.stage}" if plan.layout.pipe_size > 1 else "every rank"
    phase = max(plan.worst.phases, key=plan.worst.phases.__getitem__)
    yield (
        f"does not fit: {where} needs {size(need)} in {phase}, and {size(usable)} of a device's "
        f"{size(assumptions.device_memory)} can be used"
    )
    alone = [
        f"{label} ({size(other.worst.peak)})"
        for label, other in _alternatives(plan, assumptions)
        if other.worst.peak <= usable
    ]
    if alone:
        which = "this" if len(alone) == 1 else "any one of these"
        yield f"{which} would make it fit: {'; '.join(alone)}"
        return
    labels, best = _together(plan, assumptions)
    together = ", ".join(labels) if labels else "no change"
    if best.worst.peak <= usable:
        yield f"together these would make it fit: {together} ({size(best.worst.peak)})"
        return
    larger = _more_ranks(best, assumptions)
    yield f"the least that was found is {size(best.worst.peak)}, with {together}; " + (
        f"on {larger} ranks that would fit"
        if larger
        else "it takes larger devices or a smaller model"
    )


def _alternatives(plan: Plan, assumptions: Assumptions) -> Iterator[tuple[str, Plan]]:
    """Try every change by itself; of each kind the smallest that fits, else the largest."""
    for change in _CHANGES:
        last = None
        for label, config in change(plan, assumptions):
            other = _try(config, plan)
            if other is None:
                continue
            last = label, other
            if other.worst.peak <= assumptions.usable_memory:
                break
        if last is not None:
            yield last


def _together(plan: Plan, assumptions: Assumptions) -> tuple[list[str], Plan]:
    """Add up changes, as far as each helps, until the plan fits."""
    labels: list[str] = []
    for change in _CHANGES:
        if plan.worst.peak <= assumptions.usable_memory:
            break
        kept: tuple[str, Plan] | None = None
        for label, config in change(plan, assumptions):
            other = _try(config, plan)
            if other is not None and other.worst.peak < (kept or ("", plan))[1].worst.peak:
                kept = label, other
                if other.worst.peak <= assumptions.usable_memory:
                    break
        if kept is not None:
            labels.append(kept[0])
            plan = kept[1]
    return labels, plan


def _more_ranks(plan: Plan, assumptions: Assumptions) -> int | None:
    """Return the number of ranks, by doubling, on which the plan fits; None if none does."""
    for doubling in range(1, 11):
        world = plan.layout.world_size << doubling
        # More data ranks take more samples: as many micro-batches each as now.
        config = _updated(
            plan.config, "batch", train_batch_size=None, gradient_accumulation_steps=1
        )
        larger = _plan_or_none(config, world, plan.on_cpu)
        if larger is not None and larger.worst.peak <= assumptions.usable_memory:
            return world
    return None


def _try(config: Config, plan: Plan) -> Plan | None:
    return _plan_or_none(config, plan.layout.world_size, plan.on_cpu)


def _plan_or_none(config: Config, world_size: int, on_cpu: bool) -> Plan | None:
    try:
        return make_plan(config, run_layout(config, world_size), on_cpu=on_cpu)
    except ConfigError:
        return None  # it cannot be laid out so, which is no advice


def _updated(config: Config, group: str, **fields: Any) -> Config:
    changed = getattr(config, group).model_copy(update=fields)
    return config.model_copy(update={group: changed})


def _recomputation(plan: Plan, _: Assumptions) -> Iterator[tuple[str, Config]]:
    if not plan.config.model.checkpoint_activations:
        yield (
            "checkpoint_activations: true",
            _updated(plan.config, "model", checkpoint_activations=True, checkpoint_num_layers=1),
        )


def _micro_batch(plan: Plan, _: Assumptions) -> Iterator[tuple[str, Config]]:
    micro = plan.micro
    while micro % 2 == 0:
        micro //= 2
        accumulation = plan.total // (micro * plan.layout.data_size)
        yield (
            f"train_micro_batch_size_per_gpu: {micro} with gradient_accumulation_steps: "
            f"{accumulation}",
            _same_batch(plan, plan.config, micro),
        )


def _zero_stage(plan: Plan, _: Assumptions) -> Iterator[tuple[str, Config]]:
    if plan.layout.pipe_size > 1 or plan.layout.data_size == 1:
        return
    for stage in range(plan.zero.stage + 1, 4):
        yield (
            f"zero_optimization: {{stage: {stage}}}",
            _updated(_unforced(plan.config), "zero", stage=stage),
        )


def _unforced(config: Config) -> Config:
    """Return the configuration without a ZeRO stage forced by ``deepspeed_extra_args``."""
    zero = dict(config.deepspeed.get("zero_optimization") or {})
    zero.pop("stage", None)
    return config.model_copy(update={"deepspeed": {**config.deepspeed, "zero_optimization": zero}})


def _sequence_parallel(plan: Plan, _: Assumptions) -> Iterator[tuple[str, Config]]:
    if plan.layout.tensor_size > 1 and not plan.config.parallel.sequence_parallel:
        yield (
            "sequence_parallel: true",
            _updated(plan.config, "parallel", sequence_parallel=True),
        )


def _tensor_ranks(plan: Plan, assumptions: Assumptions) -> Iterator[tuple[str, Config]]:
    model, ranks = plan.config.model, plan.layout.tensor_size * 2
    divided = (model.num_attention_heads, model.num_kv_heads, model.intermediate_size)
    while ranks <= assumptions.ranks_per_node and not any((size or 0) % ranks for size in divided):
        changed = _updated(plan.config, "parallel", model_parallel_size=ranks)
        yield f"model_parallel_size: {ranks}", _same_batch(plan, changed, plan.micro)
        ranks *= 2


def _pipeline_stages(plan: Plan, _: Assumptions) -> Iterator[tuple[str, Config]]:
    stages = plan.layout.pipe_size * 2
    while plan.zero.stage <= 1 and stages <= plan.config.model.num_layers:
        changed = _updated(plan.config, "parallel", pipe_parallel_size=stages)
        yield f"pipe_parallel_size: {stages}", _same_batch(plan, changed, plan.micro)
        stages *= 2


def _offload(plan: Plan, _: Assumptions) -> Iterator[tuple[str, Config]]:
    if not plan.zero.optimizer_on_host and plan.zero.stage:
        options = {**plan.config.zero.options, "offload_optimizer": {"device": "cpu"}}
        yield (
            "zero_optimization: {offload_optimizer: {device: cpu}} (a slower step)",
            _updated(plan.config, "zero", options=options),
        )


def _same_batch(plan: Plan, config: Config, micro: int) -> Config:
    return _updated(
        config,
        "batch",
        train_batch_size=plan.total,
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=None,
    )


_CHANGES: tuple[Change, ...] = (
    _sequence_parallel,
    _micro_batch,
    _recomputation,
    _zero_stage,
    _tensor_ranks,
    _pipeline_stages,
    _offload,
)


def _bubble(plan: Plan) -> Iterator[str]:
    if plan.bubble > _MOST_BUBBLE:
        stages = plan.layout.pipe_size
        enough = -(-(stages - 1) * (1 - _MOST_BUBBLE) // _MOST_BUBBLE)
        yield (
            f"the pipeline stands still for {plan.bubble:.0%} of a step: {stages} stages and "
            f"{plan.accumulation} micro-batches; {enough:.0f} micro-batches "
            f"(gradient_accumulation_steps) would bring that to {_MOST_BUBBLE:.0%}"
        )


def _nodes(plan: Plan, assumptions: Assumptions) -> Iterator[str]:
    ranks, node = plan.layout.tensor_size, assumptions.ranks_per_node
    if ranks > 1 and plan.layout.world_size > node and node % ranks:
        yield (
            f"model_parallel_size {ranks} reaches across nodes of {node} ranks, whose links are "
            f"slow for sums in every layer; use a divisor of {node}, and pipeline stages between "
            "nodes (--ranks-per-node says otherwise)"
        )


def _balance(plan: Plan) -> Iterator[str]:
    if plan.imbalance <= _MOST_IMBALANCE:
        return
    slowest = max(plan.stages, key=lambda stage: stage.flops).stage
    text = (
        f"stages are unbalanced: stage {slowest} computes {plan.imbalance:.2f} times as much as "
        "the average, and the others wait for it"
    )
    others = [
        (other.imbalance, method)
        for method in ("type:transformer", "uniform", "parameters")
        if (other := _try(_updated(plan.config, "parallel", pipe_partition_method=method), plan))
    ]
    best, method = min(others, default=(plan.imbalance, ""))
    if best < plan.imbalance - 0.01:
        text += f"; pipe_partition_method: {method} makes it {best:.2f}"
    yield text


def _bucket(plan: Plan, assumptions: Assumptions) -> Iterator[str]:
    bucket, count = plan.worst.states.bucket, plan.worst.parameters
    if plan.zero.bucket > count and bucket > 0.05 * assumptions.device_memory:
        yield (
            f"reduce_bucket_size {plan.zero.bucket:,} makes a buffer of {size(bucket)} for a "
            f"rank's {count:,} parameters; "
            f"zero_optimization: {{reduce_bucket_size: {count}}} is enough"
        )


def _traffic(plan: Plan, assumptions: Assumptions) -> Iterator[str]:
    if assumptions.bandwidth is None or assumptions.peak_flops is None:
        return
    computing = plan.step_seconds(assumptions.peak_flops * assumptions.utilisation)
    sending = max(seconds(stage.sent, assumptions.bandwidth) for stage in plan.stages)
    if sending > computing:
        yield (
            f"a rank sends for {sending:.3g} s and computes for {computing:.3g} s of a step: even "
            "fully overlapped the step waits for the network"
        )
