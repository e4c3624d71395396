"""A model that is only looked at, in the same layout as the one that trains.

No optimizer, no gradients, no dropout: a rank holds its weights and nothing else.  Under ZeRO they
are not divided among the data ranks; what is frozen is a copy on each of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megatron.engine.engine import LossFunction
from megatron.engine.universal_load import UniversalCheckpoint
from megatron.model.embedding import OutputWeight
from megatron.parallel.layers import ColumnParallelLinear

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class FrozenModel(ABC):
    """What reads a frozen model's losses; see :class:`megatron.engine.engine.TrainEngine`."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The layers that this rank holds."""

    @abstractmethod
    def evaluate(
        self,
        micro_batches: Iterable[tuple[torch.Tensor, Any]],
        count: int,
        *,
        loss_fn: LossFunction,
    ) -> None:
        """Run the model on micro-batches; collective, every rank of a data rank calls it alike.

        Args:
            micro_batches: pairs of tokens [B, S] and labels, on the device; read by the ranks
                of the first and the last stage.
            count: how many there are.
            loss_fn: takes the last layer's output and the labels, on the ranks of the last
                stage; what comes of the evaluation is what it keeps.
        """


class FrozenSequential(FrozenModel):
    """All layers, or this tensor rank's part of them, on every rank."""

    def __init__(self, model: nn.Module, *, precision: str, device: torch.device) -> None:
        """Take over a model whose weights are loaded.

        Args:
            model: called with ``(tokens, labels)`` it applies its ``loss_fn``.
            precision: ``fp32``, ``fp16`` or ``bf16``, as DeepSpeed casts the model that trains.
            device: where it runs.
        """
        self._model: Any = model.to(device=device, dtype=PRECISIONS[precision]).eval()
        self._model.requires_grad_(False)

    @property
    def module(self) -> nn.Module:
        """See :class:`FrozenModel`."""
        module: nn.Module = self._model
        return module

    def evaluate(
        self,
        micro_batches: Iterable[tuple[torch.Tensor, Any]],
        count: int,
        *,
        loss_fn: LossFunction,
    ) -> None:
        """See :meth:`FrozenModel.evaluate`."""
        self._model.loss_fn = loss_fn
        with torch.no_grad():
            for tokens, labels in micro_batches:
                self._model(tokens, labels)


def lay_out_for_few_rows(model: nn.Module) -> None:
    """Let the larger weights of a model that continues texts lie in memory column by column.

    A product with one token, or a few, takes as long as the weight takes to be read, and on a
    CPU in float32 matrices with more outputs than inputs are read up to twice as fast so.  Shapes,
    names and values stay; a long sequence takes as long as before.

    Args:
        model: that is not trained.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, ColumnParallelLinear | OutputWeight) or weight is None:
            continue
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            rows, columns = weight.shape
            if rows > columns:
                weight.data = weight.data.t().contiguous().t()


def load_weights(model: nn.Module, checkpoint: UniversalCheckpoint) -> None:
    """Fill a model's parameters, or its part of them, from a universal checkpoint.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.part(name, "fp32", parameter.shape))
