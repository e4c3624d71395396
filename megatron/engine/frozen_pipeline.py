"""A frozen model dealt out to the stages of a pipeline, beside the one that trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import deepspeed
import torch
from torch import nn

from megatron.engine.engine import LossFunction
from megatron.engine.frozen import FrozenModel
from megatron.engine.mpu import forget_grid
from megatron.engine.pipeline import Stage, run_evaluation


class FrozenPipeline(FrozenModel):
    """Micro-batches on their way through the stages, forward only."""

    def __init__(
        self, stage: Stage, *, precision: str, micro: int, accumulation: int, data_size: int
    ) -> None:
        """Hand a stage whose weights are loaded to DeepSpeed; collective.

        Args:
            stage: this rank's layers.
            precision: ``fp32``, ``fp16`` or ``bf16``.
            micro: samples per data rank and micro-batch.
            accumulation: micro-batches of a step.
            data_size: number of data-parallel ranks.
        """
        forget_grid()
        stage.requires_grad_(False)
        config: Mapping[str, Any] = {
            "train_batch_size": micro * accumulation * data_size,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": accumulation,
            "zero_optimization": {"stage": 0},
            "steps_per_print": float("inf"),
            "wall_clock_breakdown": False,
            "timers": {"throughput": {"enabled": False}},
            # Where tensor ranks divide the sequence, activations are not copies of each other.
            "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
            **({} if precision == "fp32" else {precision: {"enabled": True}}),
        }
        self._engine, *_ = deepspeed.initialize(
            model=stage, config=dict(config), dist_init_required=False
        )
        self._stage = stage

    @property
    def module(self) -> nn.Module:
        """See :class:`FrozenModel`."""
        module: nn.Module = self._stage
        return module

    def evaluate(
        self,
        micro_batches: Iterable[tuple[torch.Tensor, Any]],
        count: int,
        *,
        loss_fn: LossFunction,
    ) -> None:
        """See :meth:`FrozenModel.evaluate`."""
        if count:
            run_evaluation(self._engine, self._stage, micro_batches, count, loss_fn)
            self._stage.eval()
