"""Low-rank updates of linear layers that are not trained themselves, divided as those are.

LoRA (Hu et al. 2022, section 4.1): ``y = W x + (alpha / rank) · B A x`` with A ``[rank, inputs]``
and B ``[outputs, rank]``.  A starts as a linear layer of PyTorch does (as in the authors' code and
in peft), B at zero, so that training starts from the layer as it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from megatron.parallel.parameters import ParameterScope, zeros
from megatron.parallel.partition import Partition
from megatron.parallel.sequence import leave_shared, shared_linear, whole_gradients

Dropping = Callable[[torch.Tensor], torch.Tensor]


class LowRank(nn.Module, ABC):
    """What is added to a linear layer's output.

    Attributes:
        a: ``[rank, inputs]``, or this rank's columns of it.
        b: ``[outputs, rank]``, or this rank's rows of it.
        scale: ``alpha / rank``.
    """

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the layer's input to what is added to its output."""

    def product(self) -> torch.Tensor:
        """Return this rank's part of ``(alpha / rank) · B A``, which the weight would take up."""
        return self.scale * (self.b @ self.a)


class ColumnLowRank(LowRank):
    """Beside a layer whose outputs are divided: every rank has A, and its rows of B."""

    def __init__(
        self,
        scope: ParameterScope,
        *,
        inputs: int,
        outputs: Sequence[int],
        rank: int,
        scale: float,
        dropping: Dropping,
    ) -> None:
        """Make the update; ``outputs`` are the sizes of the blocks that the layer concatenates."""
        super().__init__()
        self.topology, self.scale, self.dropping = scope.topology, scale, dropping
        rows = Partition(dim=0, blocks=tuple(outputs))
        self.a = scope.parameter("a", (rank, inputs), _as_linear)
        self.b = scope.parameter("b", (sum(outputs), rank), zeros, rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, S, inputs]`` (or a part of the sequence) to ``[B, S, outputs / ranks]``."""
        (a,) = whole_gradients(self.topology, self.a)
        # Outputs, not inputs, are gathered where the sequence is divided: they are rank wide.
        inner = F.linear(self.dropping(x), a)
        return self.scale * shared_linear(inner, self.b, None, self.topology)


class RowLowRank(LowRank):
    """Beside a layer whose inputs are divided: every rank has its columns of A, and B."""

    def __init__(
        self,
        scope: ParameterScope,
        *,
        inputs: int,
        outputs: int,
        rank: int,
        scale: float,
        dropping: Dropping,
    ) -> None:
        """Make the update; ``inputs`` is the full size, before division."""
        super().__init__()
        self.topology, self.scale, self.dropping = scope.topology, scale, dropping
        columns = Partition(dim=1, blocks=(inputs,))
        self.a = scope.parameter("a", (rank, inputs), _as_linear, columns)
        self.b = scope.parameter("b", (outputs, rank), zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, S, inputs / ranks]`` to ``[B, S, outputs]`` (or a part of the sequence)."""
        inner = leave_shared(F.linear(self.dropping(x), self.a), self.topology)
        (b,) = whole_gradients(self.topology, self.b)
        return self.scale * F.linear(inner, b)


def _as_linear(shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
    """Draw from U(−1/√inputs, 1/√inputs): Kaiming's uniform rule with a = √5."""
    reach = 1.0 / math.sqrt(shape[1])
    values = generator.random(shape, dtype=np.float32)
    return torch.from_numpy(values).mul_(2 * reach).sub_(reach)
