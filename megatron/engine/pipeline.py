"""Layers dealt out to the stages of a pipeline (DeepSpeed's schedule: one forward, one backward).

DeepSpeed moves activations, gradients and tied weights between stages; which layers a stage
holds, how they run and what is recomputed is decided here, from the same descriptions that
the whole model is built of.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils.timer import NoopTimer

from megatron.engine.engine import LossFunction, TrainEngine, tensor_partitions
from megatron.engine.experts import share_experts
from megatron.engine.mpu import forget_grid, process_topology
from megatron.model.gpt import LayerDescription
from megatron.model.layer_run import LayerRun
from megatron.parallel.rng import DropoutRng
from megatron.parallel.topology import Topology


class Stage(PipelineModule):  # type: ignore[misc]
    """The layers that this rank's stage holds."""

    def __init__(
        self,
        layers: Sequence[LayerDescription],
        *,
        topology: Topology,
        bounds: Sequence[int],
        loss_fn: LossFunction,
        dropout: DropoutRng,
        recomputed: int,
    ) -> None:
        """Build this stage's layers; collective.

        Args:
            layers: of the whole model.
            topology: this rank's place.
            bounds: stage s holds the layers from ``bounds[s]`` up to ``bounds[s + 1]``.
            loss_fn: applied to the last layer's output and the labels, on the last stage.
            dropout: the layers' source of dropout masks.
            recomputed: blocks that are recomputed together in backward; 0 = none.
        """
        self._bounds = list(bounds)
        self.topology = topology
        # DeepSpeed prints its settings and every stage's layers; ours is in the start-up report.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                [_specification(layer) for layer in layers],
                topology=process_topology(topology.layout),
                loss_fn=loss_fn,
            )
        stage = topology.stage
        held = layers[self._bounds[stage] : self._bounds[stage + 1]]
        recomputable = [layer.recomputable for layer in held]
        self._run = LayerRun(
            list(zip(self.forward_funcs, recomputable, strict=True)),
            dropout=dropout,
            recomputed=recomputed,
        )
        self.before_forward: Callable[[], None] = lambda: None

    def forward(self, value: Any) -> Any:
        """Run this stage's layers on what the stage before sent (tokens, on the first)."""
        self.before_forward()
        return self._run(value)

    def _partition_layers(self, method: str = "") -> None:
        """Take the bounds as given, instead of building every layer to count its parameters."""
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self._bounds
        self._set_bounds(start=self._bounds[stage], stop=self._bounds[stage + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        """Copy tied weights from their first stage, out of autograd's sight."""
        super()._synchronize_tied_weights()


class PipelineEngine(TrainEngine):
    """Micro-batches on their way through the stages, several at a time."""

    def __init__(
        self,
        *,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        before_micro_batch: Callable[[int, int], None] | None = None,
        row_length: Callable[[int], int] | None = None,
    ) -> None:
        """Hand the stage to DeepSpeed; collective.

        Args:
            stage: this rank's layers.
            optimizer: see :func:`megatron.engine.optimizer.build_optimizer`.
            config: DeepSpeed's configuration (ZeRO stage 1).
            before_micro_batch: see :class:`TrainEngine`.
            row_length: tokens of a step's rows, where they are not always as many.
        """
        forget_grid()
        partitions = tensor_partitions(stage)
        experts = share_experts(stage, stage.topology, optimizer)
        with contextlib.nullcontext() if experts is None else experts.announced(stage):
            engine, wrapped, _, _ = deepspeed.initialize(
                model=stage, optimizer=optimizer, config=dict(config), dist_init_required=False
            )
        super().__init__(engine, wrapped, partitions, before_micro_batch, experts)
        self._stage = stage
        self._row_length = row_length
        self._last_length: int | None = None

    def _train(self, step: int, micro_batches: Iterable[tuple[torch.Tensor, Any]]) -> None:
        micro = -1

        def announce() -> None:
            # Every stage runs its forward passes in the order of the micro-batches.
            nonlocal micro
            micro += 1
            self._before_micro_batch(step, micro)

        if self._row_length is not None and self._row_length(step) != self._last_length:
            # Stages tell each other a shape once and keep to it.
            self._last_length = self._row_length(step)
            self._engine.reset_activation_shape()
        self._stage.before_forward = announce
        try:
            self._engine.train_batch(data_iter=iter(micro_batches))
        finally:
            self._stage.before_forward = lambda: None

    def evaluate(
        self,
        micro_batches: Iterable[tuple[torch.Tensor, Any]],
        count: int,
        *,
        loss_fn: LossFunction | None = None,
    ) -> None:
        """See :meth:`TrainEngine.evaluate`."""
        if count == 0:
            return
        try:
            run_evaluation(
                self._engine, self._stage, micro_batches, count, loss_fn or self._stage.loss_fn
            )
        finally:
            self._stage.train()


def run_evaluation(
    engine: Any,
    stage: Stage,
    micro_batches: Iterable[tuple[torch.Tensor, Any]],
    count: int,
    loss_fn: LossFunction,
) -> None:
    """Run micro-batches through the stages, forward only; collective.

    Args:
        engine: DeepSpeed's engine of ``stage``.
        stage: this rank's layers; left in evaluation mode.
        micro_batches: see :meth:`TrainEngine.evaluate`.
        count: how many there are, at least one.
        loss_fn: applied instead of the stage's own.
    """
    own, stage.loss_fn = stage.loss_fn, loss_fn
    # Stages tell each other a shape once and keep to it: evaluation may have another.
    engine.reset_activation_shape()
    try:
        engine.eval_batch(
            iter(micro_batches),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=count,
        )
    finally:
        engine.reset_activation_shape()
        stage.loss_fn = own


def _specification(layer: LayerDescription) -> LayerSpec:
    if layer.tied_key is None:
        return LayerSpec(layer.module_type, **layer.arguments)
    return TiedLayerSpec(
        layer.tied_key,
        layer.module_type,
        forward_fn=layer.forward,
        tied_weight_attr=list(layer.tied_weights),
        **layer.arguments,
    )


def _silence(engine: Any) -> None:
    """Leave out what DeepSpeed does at each step for a report that nobody asked for.

    It would spread the step's loss over all ranks (two collectives; the ledger says more) and
    keep the time of every step for ever.
    """
    asked = engine.steps_per_print() not in (None, math.inf)
    if not (asked or engine.wall_clock_breakdown() or engine.monitor.enabled):
        engine._aggregate_total_loss = lambda: None
        engine.timers = NoopTimer()
