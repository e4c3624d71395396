"""What there is to know of a model that is only looked at, in whatever layout holds it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from megatron.engine.engine import LossFunction
from megatron.errors import DataError
from megatron.parallel.topology import Topology


class Runnable(Protocol):
    """The calls of an engine, or of a frozen model, that looking at it needs."""

    @property
    def module(self) -> nn.Module:
        """The layers that this rank holds."""
        ...

    def evaluate(
        self,
        micro_batches: Iterable[tuple[torch.Tensor, Any]],
        count: int,
        *,
        loss_fn: LossFunction,
    ) -> None:
        """Run ``count`` micro-batches of tokens and labels through all stages; collective."""
        ...


@dataclass(frozen=True, kw_only=True)
class InferenceModel:
    """A model, its layout and its limits.

    Data ranks hold copies of it and work on batches of their own, in step.

    Attributes:
        model: runs it.
        topology: this rank's place.
        device: where the model is.
        vocab_size: token ids, without padding.
        padded_vocab_size: rows of the output weight, all tensor ranks together.
        longest: tokens that it takes at once.
        rows: sequences that a data rank runs at once.
    """

    model: Runnable
    topology: Topology
    device: torch.device
    vocab_size: int
    padded_vocab_size: int
    longest: int
    rows: int

    def padded(self, length: int) -> int:
        """Return ``length``, or the next one that the tensor ranks can divide among them."""
        if not self.topology.splits_sequence:
            return length
        return -(-length // self.topology.tensor_size) * self.topology.tensor_size

    def check_ids(self, tokens: Iterable[int], what: str) -> None:
        """Check that the model knows every token id.

        Raises:
            DataError: it does not.
        """
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise DataError(
                    f"{what} holds the token id {token}, but there are {self.vocab_size}; "
                    "use the tokenizer that the model was trained with"
                )
