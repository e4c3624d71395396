"""Linear layers and the embedding, divided among tensor-parallel ranks.

With one rank each is its plain torch counterpart.  Division follows Megatron-LM
(Shoeybi et al. 2019, section 3): columns first, rows second, one sum per pair.  Where the
sequence is divided too, a pair takes and gives this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from megatron.parallel.collectives import gather_last_dimension
from megatron.parallel.lora import LowRank
from megatron.parallel.parameters import Initializer, ParameterScope, zeros
from megatron.parallel.partition import Partition
from megatron.parallel.products import linear
from megatron.parallel.sequence import leave_shared, shared_linear, whole_gradients


class ColumnParallelLinear(nn.Module):
    """``y = x Wᵀ + b`` with the outputs divided among the tensor ranks.

    Attributes:
        weight: this rank's rows, ``[outputs / tensor_size, inputs]``.
        bias: this rank's part, or None.
        lora: what is added to the output before it is gathered, if anything is.
    """

    def __init__(
        self,
        scope: ParameterScope,
        *,
        inputs: int,
        outputs: Sequence[int],
        initializer: Initializer,
        bias: bool = True,
        gather: bool = False,
    ) -> None:
        """Make the layer.

        Args:
            scope: place of the layer in the model.
            inputs: size of the last dimension in.
            outputs: sizes of the blocks that the output concatenates; each is divided.
            initializer: of the weight; the bias starts at zero.
            bias: whether there is a bias.
            gather: whether every rank returns the whole output instead of its part.
        """
        super().__init__()
        self.topology = scope.topology
        self.gather = gather
        rows = Partition(dim=0, blocks=tuple(outputs))
        total = sum(outputs)
        self.weight = scope.parameter("weight", (total, inputs), initializer, rows)
        self.bias = scope.parameter("bias", (total,), zeros, rows) if bias else None
        self.lora: LowRank | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[B, S, inputs]`` to ``[B, S, outputs / tensor_size]`` (or all, with ``gather``).

        Where the sequence is divided, ``x`` is this rank's part of it.
        """
        y = shared_linear(x, self.weight, self.bias, self.topology)
        if self.lora is not None:
            y = y + self.lora(x)
        return gather_last_dimension(y, self.topology) if self.gather else y


class RowParallelLinear(nn.Module):
    """``y = x Wᵀ + b`` with the inputs divided among the tensor ranks and the outputs added up.

    Attributes:
        weight: this rank's columns, ``[outputs, inputs / tensor_size]``.
        bias: the whole bias on every rank, added once, after the sum; or None.
        lora: what is added to the output, if anything is.
    """

    def __init__(
        self,
        scope: ParameterScope,
        *,
        inputs: int,
        outputs: int,
        initializer: Initializer,
        bias: bool = True,
    ) -> None:
        """Make the layer; ``inputs`` is the full size, before division."""
        super().__init__()
        self.topology = scope.topology
        columns = Partition(dim=1, blocks=(inputs,))
        self.weight = scope.parameter("weight", (outputs, inputs), initializer, columns)
        self.bias = scope.parameter("bias", (outputs,), zeros) if bias else None
        self.lora: LowRank | None = None

    def forward(self, x: torch.Tensor, *, biased: bool = True) -> torch.Tensor:
        """Map this rank's part ``[B, S, inputs / tensor_size]`` to the whole ``[B, S, outputs]``.

        Where the sequence is divided, the result is this rank's part of it.  Without ``biased``
        the bias is left to the caller, see :meth:`own_bias`.
        """
        y = self._product(x, biased=biased)
        return y if self.lora is None else y + self.lora(x)

    def own_bias(self) -> torch.Tensor | None:
        """Return the bias, to be added to this rank's part of the sequence where it is divided."""
        if self.bias is None:
            return None
        (bias,) = whole_gradients(self.topology, self.bias)
        return bias

    def _product(self, x: torch.Tensor, *, biased: bool) -> torch.Tensor:
        if self.topology.tensor_size == 1:
            return linear(x, self.weight, self.bias if biased else None)
        y = leave_shared(linear(x, self.weight), self.topology)
        bias = self.own_bias() if biased else None
        return y if bias is None else y + bias


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the vocabulary divided among the tensor ranks.

    Attributes:
        weight: this rank's rows, ``[padded / tensor_size, hidden]``.
    """

    def __init__(
        self,
        scope: ParameterScope,
        *,
        vocabulary: int,
        padded: int,
        hidden: int,
        initializer: Initializer,
    ) -> None:
        """Make the embedding.

        Args:
            scope: place of the layer in the model.
            vocabulary: number of token ids.
            padded: number of rows, which the tensor ranks divide; those without an id are 0.
            hidden: size of a token's vector.
            initializer: of the true rows.
        """
        super().__init__()
        self.topology = scope.topology
        rows = Partition(dim=0, blocks=(padded,), padded_from=vocabulary)
        self.weight = scope.parameter("weight", (vocabulary, hidden), initializer, rows)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look up ``tokens`` (int64 ``[B, S]``): ``[B, S, hidden]`` on every rank.

        Where the sequence is divided, the result is this rank's part of it.
        """
        if self.topology.tensor_size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - self.topology.tensor_rank * rows
        absent = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(absent, 0), self.weight)
        return leave_shared(found.masked_fill(absent[..., None], 0), self.topology)
