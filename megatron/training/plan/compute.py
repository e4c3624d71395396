"""Puts the parts of a plan together: every stage's memory and traffic, and the run's sums."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from megatron.config import Config, deepspeed_config, resolve_batch
from megatron.model.accounting import (
    active_parameter_count,
    active_parameters,
    flops_per_token,
    held_parameters,
    mixed_numbers,
    parameter_count,
)
from megatron.model.inventory import is_trained, stage_inventory
from megatron.parallel.layout import Layout
from megatron.training.layout import layer_bounds
from megatron.training.plan.activations import Setting, StageActivations, stage_activations
from megatron.training.plan.communication import StageShape, step_volume
from megatron.training.plan.states import States, states
from megatron.training.plan.zero import ZeroSettings, zero_settings


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One rank of a pipeline stage: all its data and tensor ranks hold as much.

    Attributes:
        stage: which it is.
        first: number of its first layer.
        last: number of the layer after its last.
        parameters: that one tensor rank holds.
        states: weights, gradients and optimizer, in bytes.
        activations: in bytes.
        sent: bytes sent in a step, by kind.
        flops: of its layers, for one token.
    """

    stage: int
    first: int
    last: int
    parameters: int
    states: States
    activations: StageActivations
    sent: dict[str, float]
    flops: float

    @property
    def phases(self) -> dict[str, float]:
        """Bytes at the worst moment of the passes, the reduction and the update."""
        held = self.states.weights + self.states.optimizer
        gradients = self.states.gradients + self.states.bucket
        return {
            "forward and backward": held
            + gradients
            + self.states.arriving
            + self.states.gathered
            + self.activations.total,
            "reduction": held + gradients + self.states.reducing,
            "update": held + self.states.updating,
        }

    @property
    def peak(self) -> float:
        """Bytes of device memory at the worst moment."""
        return max(self.phases.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration on a layout.

    Attributes:
        config: the configuration, with ``model.vocab_size`` filled in.
        layout: how ranks are arranged.
        micro: samples per data rank and pass.
        accumulation: micro-batches per step.
        total: samples per step.
        zero: DeepSpeed's settings.
        stages: one entry per pipeline stage.
        on_cpu: ranks run on CPUs.
    """

    config: Config
    layout: Layout
    micro: int
    accumulation: int
    total: int
    zero: ZeroSettings
    stages: tuple[StagePlan, ...]
    on_cpu: bool = False

    @cached_property
    def worst(self) -> StagePlan:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def parameters(self) -> int:
        """Of the whole model, each once."""
        return parameter_count(self.config.model, tensor_size=self.layout.tensor_size)

    @property
    def active_parameters(self) -> int:
        """Of those, the ones that a token passes through."""
        return active_parameter_count(self.config.model, tensor_size=self.layout.tensor_size)

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step trains on."""
        return self.total * self.config.model.context_length

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, without recomputation."""
        return flops_per_token(self.config.model, tensor_size=self.layout.tensor_size)

    def step_seconds(self, flops: float) -> float:
        """Return how long a step takes at ``flops`` operations a second and rank."""
        return self.tokens_per_step * self.flops_per_token / (self.layout.world_size * flops)

    @property
    def bubble(self) -> float:
        """Share of a step in which a stage has nothing to do: (p − 1) / (m + p − 1)."""
        stages = self.layout.pipe_size
        return (stages - 1) / (self.accumulation + stages - 1)

    @property
    def imbalance(self) -> float:
        """How much longer the slowest stage computes than the stages do on average."""
        flops = [stage.flops for stage in self.stages]
        return max(flops) * len(flops) / sum(flops)

    @property
    def checkpoint_bytes(self) -> int:
        """Size of one checkpoint, all ranks together."""
        return checkpoint_bytes(self.config)


def make_plan(config: Config, layout: Layout, *, on_cpu: bool = False) -> Plan:
    """Work out what a configuration needs on a layout.

    Args:
        config: the configuration, with ``model.vocab_size`` filled in.
        layout: how ranks are arranged.
        on_cpu: ranks run on CPUs.

    Raises:
        ConfigError: batch sizes or layers do not divide.
    """
    model = config.model
    micro, accumulation, total = resolve_batch(config.batch, layout.data_size)
    zero = zero_settings(
        deepspeed_config(config, micro=micro, accumulation=accumulation, data_size=layout.data_size)
    )
    setting = Setting(
        micro_batch=micro,
        width=zero.width,
        tensor_size=layout.tensor_size,
        sequence_parallel=config.parallel.sequence_parallel and layout.tensor_size > 1,
        on_cpu=on_cpu,
        inputs_on_host=config.model.checkpoint_in_cpu,
    )
    bounds = layer_bounds(config)
    stages = []
    for stage, (first, last) in enumerate(pairwise(bounds)):
        inventory = stage_inventory(
            model, first, last, tensor_size=layout.tensor_size, expert_size=layout.expert_size
        )
        trained = [one for one in inventory if is_trained(model, one)]
        held = states(
            trained,
            zero,
            data_size=layout.data_size,
            accumulation=accumulation,
            expert_size=layout.expert_size,
            state_bytes=state_bytes(config),
        )
        count = sum(one.count for one in inventory)
        # What is frozen is there, and that is all.
        frozen = count - sum(one.count for one in trained)
        held = replace(held, weights=held.weights + frozen * zero.width)
        shape = StageShape(
            first=first,
            last=last,
            stage=stage,
            stages=layout.pipe_size,
            parameters=count,
            weight_bytes=float(count * zero.width),
            experts=sum(one.count for one in inventory if one.expert)
            if layout.expert_size > 1
            else 0,
        )
        sent = step_volume(
            model,
            setting,
            zero,
            shape,
            data_size=layout.data_size,
            expert_size=layout.expert_size,
            accumulation=accumulation,
            domains=len(config.trained),
        )
        # One forward, one backward: a stage starts as many as there are stages from it on.
        in_flight = min(layout.pipe_size - stage, accumulation) if layout.pipe_size > 1 else 1
        stages.append(
            StagePlan(
                stage=stage,
                first=first,
                last=last,
                parameters=count,
                states=held,
                activations=stage_activations(model, setting, first, last, in_flight),
                sent=sent,
                flops=_stage_flops(config, layout, first, last),
            )
        )
    return Plan(
        config=config,
        layout=layout,
        micro=micro,
        accumulation=accumulation,
        total=total,
        zero=zero,
        stages=tuple(stages),
        on_cpu=on_cpu,
    )


def checkpoint_bytes(config: Config) -> int:
    """Estimate the size of a checkpoint: master weights, the optimizer's state, weights beside.

    ZeRO-3 writes no weights beside the master's.  Padding, headers and the run's own state
    are allowed for with 2 % and 128 KiB.
    """
    zero = zero_settings(deepspeed_config(config, micro=1, accumulation=1, data_size=1))
    ranks = config.parallel.model_parallel_size
    counts = sum(
        held_parameters(config.model, first, last, tensor_size=ranks)
        for first, last in pairwise(layer_bounds(config))
    )
    beside = 0 if zero.stage == 3 else zero.width
    return int(counts * ranks * (4 + state_bytes(config) + beside) * 1.02) + (1 << 17)


def state_bytes(config: Config) -> int:
    """Return what the optimizer keeps beside the fp32 weights, in bytes for each number.

    SM3's sums over rows and columns, and the scales of 8-bit blocks, are left out: they are
    thousandths of it.
    """
    return config.optimizer.kind.slot_bytes * len(config.optimizer.state)


def _stage_flops(config: Config, layout: Layout, first: int, last: int) -> float:
    """Return what a stage's layers cost for one token: its blocks, and the output's product."""
    model = config.model
    cost = sum(
        (active_parameters(model, layer) + mixed_numbers(model, layer))
        * (8.0 if model.checkpoint_activations else 6.0)
        for layer in range(max(first, 1) - 1, min(max(last - 1, 0), model.num_layers))
    )
    if last == model.num_layers + 3:
        cost += 6.0 * model.padded_vocab_size(layout.tensor_size) * model.hidden_size
    return cost
