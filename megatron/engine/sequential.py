"""Every rank runs all layers: data and tensor parallelism, ZeRO 1 to 3."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from megatron.engine.engine import LossFunction, TrainEngine, tensor_partitions
from megatron.engine.experts import share_experts
from megatron.engine.mpu import forget_grid, grid
from megatron.parallel.topology import Topology


class SequentialEngine(TrainEngine):
    """One micro-batch after the other through the whole model."""

    def __init__(
        self,
        *,
        model: nn.Module,
        topology: Topology,
        optimizer: torch.optim.Optimizer,
        config: Mapping[str, Any],
        before_micro_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        """Hand the model to DeepSpeed, which moves, casts and partitions it; collective.

        Args:
            model: called with ``(tokens, labels)`` it returns the scaled loss; it has a
                ``loss_fn``.
            topology: this rank's place.
            optimizer: see :func:`megatron.engine.optimizer.build_optimizer`.
            config: DeepSpeed's configuration.
            before_micro_batch: see :class:`TrainEngine`.
        """
        import deepspeed

        forget_grid()
        partitions = tensor_partitions(model)
        experts = share_experts(model, topology, optimizer)
        with contextlib.nullcontext() if experts is None else experts.announced(model):
            engine, wrapped, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=dict(config),
                mpu=grid(topology.layout),
                dist_init_required=False,
            )
        super().__init__(engine, wrapped, partitions, before_micro_batch, experts)

    def _train(self, step: int, micro_batches: Iterable[tuple[torch.Tensor, Any]]) -> None:
        count = 0
        for micro, (tokens, labels) in enumerate(micro_batches):
            self._before_micro_batch(step, micro)
            loss = self._engine(tokens, labels)
            self._engine.backward(loss)
            self._engine.step()
            count += 1
        assert count == self.accumulation, f"{count} micro-batches, expected {self.accumulation}"

    def evaluate(
        self,
        micro_batches: Iterable[tuple[torch.Tensor, Any]],
        count: int,
        *,
        loss_fn: LossFunction | None = None,
    ) -> None:
        """See :meth:`TrainEngine.evaluate`."""
        model: Any = self._engine.module
        own, model.loss_fn = model.loss_fn, loss_fn or model.loss_fn
        self._engine.eval()
        try:
            with torch.no_grad():
                for tokens, labels in micro_batches:
                    self._engine(tokens, labels)
        finally:
            self._engine.train()
            model.loss_fn = own
