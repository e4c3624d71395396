"""The two ends of the model: tokens in, output weight out."""

from __future__ import annotations

import torch
from torch import nn

from megatron.model.dropout import Dropout
from megatron.model.init import initializer
from megatron.model.norm import build_norm
from megatron.model.spec import ModelSpec, vocabulary
from megatron.parallel.layers import VocabParallelEmbedding
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.partition import Partition
from megatron.parallel.rng import DropoutRng

Output = tuple[torch.Tensor, torch.Tensor]
"""Hidden states and this rank's rows of the output weight.

Hidden states are ``[B, S, hidden]``, or this rank's part of the sequence where it is divided.
"""


class Embedding(nn.Module):
    """Token embedding; with tied weights also the output weight."""

    def __init__(self, scope: ParameterScope, spec: ModelSpec, *, dropout: DropoutRng) -> None:
        """Make the embedding; rows that pad the vocabulary are 0."""
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            scope.child("word_embeddings"),
            vocabulary=vocabulary(spec),
            padded=spec.padded_vocab_size(scope.topology.tensor_size),
            hidden=spec.hidden_size,
            initializer=initializer(spec.init_method, spec),
        )
        self.dropout = Dropout(rate=spec.hidden_dropout, layer=-1, place="embedding", rng=dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens (int64 ``[B, S]``) to ``[B, S, hidden]`` (or this rank's part of S)."""
        embedded: torch.Tensor = self.dropout(self.word_embeddings(tokens))
        return embedded


class FinalNorm(nn.Module):
    """The norm after the last block."""

    def __init__(self, scope: ParameterScope, spec: ModelSpec) -> None:
        """Make the norm."""
        super().__init__()
        self.norm = build_norm(scope.child("norm"), spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[…, hidden]``."""
        normalised: torch.Tensor = self.norm(x)
        return normalised


class OutputWeight(nn.Module):
    """Holds the untied output weight; multiplying with it is the loss function's."""

    def __init__(self, scope: ParameterScope, spec: ModelSpec) -> None:
        """Make the weight; rows that pad the vocabulary are 0."""
        super().__init__()
        ids, padded = vocabulary(spec), spec.padded_vocab_size(scope.topology.tensor_size)
        self.weight = scope.parameter(
            "weight",
            (ids, spec.hidden_size),
            initializer(spec.init_method, spec),
            Partition(dim=0, blocks=(padded,), padded_from=ids),
        )

    def forward(self, hidden: torch.Tensor) -> Output:
        """Return ``hidden`` and the weight."""
        return hidden, self.weight


class OutputLayer(nn.Module):
    """The last layer where input and output weights are two."""

    def __init__(self, scope: ParameterScope, spec: ModelSpec) -> None:
        """Make the layer."""
        super().__init__()
        self.final_linear = OutputWeight(scope.child("final_linear"), spec)

    def forward(self, hidden: torch.Tensor) -> Output:
        """Return ``hidden`` and the output weight."""
        output: Output = self.final_linear(hidden)
        return output


def tied_output(embedding: Embedding, hidden: torch.Tensor) -> Output:
    """Return ``hidden`` and the embedding's weight: the last layer where the two are one."""
    return hidden, embedding.word_embeddings.weight
