"""The two ends of the model: tokens in, output weight out."""

from __future__ import annotations

import torch
from torch import nn

from megatron.errors import ConfigError
from megatron.model.carried import Carried, Value
from megatron.model.dropout import Dropout
from megatron.model.init import initializer
from megatron.model.kv_cache import CachingModule, document_starts
from megatron.model.mup import embedding_multipliers, output_multiplier
from megatron.model.norm import build_norm
from megatron.model.positions import build_positions
from megatron.model.relative import RelativeBias
from megatron.model.soft_prompt import PromptEmbedding, prompt_length
from megatron.model.spec import ModelSpec, block_experts, resets, vocabulary
from megatron.parallel.layers import VocabParallelEmbedding
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.partition import Partition
from megatron.parallel.rng import DropoutRng

Output = tuple[torch.Tensor, ...]
"""Hidden states, this rank's rows of the output weight and, where experts train, their loss.

The loss is ``[1]``, or this rank's term of it.  Hidden states are ``[B, S, hidden]``, or this
rank's part of the sequence where it is divided.
"""


class Embedding(CachingModule):
    """Token embedding, with what belongs to positions; with tied weights also the output weight."""

    def __init__(
        self,
        scope: ParameterScope,
        spec: ModelSpec,
        *,
        dropout: DropoutRng,
        positions: bool = True,
    ) -> None:
        """Make the embedding; rows that pad the vocabulary are 0.

        Args:
            scope: place of the layer in the model.
            spec: the architecture.
            dropout: source of masks.
            positions: whether parameters of positions are made too.  They are of no use where
                a stage holds the embedding only as the output weight.

        Raises:
            ConfigError: documents are to be told apart and no token ends them.
        """
        super().__init__()
        self.word_embeddings = VocabParallelEmbedding(
            scope.child("word_embeddings"),
            vocabulary=vocabulary(spec),
            padded=spec.padded_vocab_size(scope.topology.tensor_size),
            hidden=spec.hidden_size,
            initializer=initializer(spec.init_method, spec, hidden=False),
        )
        self.dropout = Dropout(rate=spec.hidden_dropout, layer=-1, place="embedding", rng=dropout)
        self.topology = scope.topology
        self.position_embeddings = (
            build_positions(scope.child("position_embeddings"), spec) if positions else None
        )
        self.relative_bias = (
            RelativeBias(scope.child("relative_bias"), spec)
            if positions and spec.pos_emb == "rpe"
            else None
        )
        self.soft_prompt = (
            PromptEmbedding(
                scope.child("soft_prompt"), spec.soft_prompt_tuning, hidden=spec.hidden_size
            )
            if positions and spec.soft_prompt_tuning is not None
            else None
        )
        self.multiplier, self.position_multiplier = embedding_multipliers(spec)
        self.output_multiplier = output_multiplier(spec)
        self.has_experts = max(block_experts(spec)) > 1
        self.resets_positions, self.document_end = spec.reset_position_ids, _document_end(spec)

    def forward(self, tokens: torch.Tensor) -> Value:
        """Map tokens (int64 ``[B, S]``) to ``[B, S, hidden]`` (or this rank's part of S).

        What blocks must know of positions beside it comes along; see
        :mod:`megatron.model.carried`.
        """
        embedded = _times(self.word_embeddings(tokens), self.multiplier)
        starts = self._starts(tokens)
        if self.position_embeddings is not None:
            added = self.position_embeddings(self._positions(tokens, starts))
            added = _times(added, self.position_multiplier)
            embedded = embedded + added.to(embedded.dtype)
        bias, length = None, tokens.shape[1]
        if self.soft_prompt is not None:
            embedded = self.soft_prompt(embedded, self.cache)
            length = embedded.shape[1]
        if self.relative_bias is not None:
            bias = self.relative_bias(length if self.cache is None else self.cache.length)
        hidden, loss = self.dropout(embedded), None
        if self.has_experts and self.training:
            # Of the graph, because a stage sends back a gradient of whatever it was sent.
            loss = 0.0 * hidden.flatten()[:1].float()
        return Carried(hidden=hidden, starts=starts, bias=bias, extra_loss=loss).value()

    def _starts(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """Return the slot at which each token's document begins, ``[B, S]``."""
        if self.document_end is None:
            return None
        ended = tokens == self.document_end
        return document_starts(ended) if self.cache is None else self.cache.document_starts(ended)

    def _positions(self, tokens: torch.Tensor, starts: torch.Tensor | None) -> torch.Tensor:
        """Return the position of each token, ``[B or 1, S]``."""
        if self.cache is None:
            slots = torch.arange(tokens.shape[1], device=tokens.device)[None]
        else:
            slots = self.cache.slots(tokens.device)
        return slots - starts if starts is not None and self.resets_positions else slots


def _times(x: torch.Tensor, multiplier: float) -> torch.Tensor:
    """Multiply, unless with 1."""
    return x if multiplier == 1.0 else x * multiplier


def _document_end(spec: ModelSpec) -> int | None:
    """Return the token that ends documents, where they are told apart."""
    if not resets(spec):
        return None
    if spec.eod_token_id is None:
        raise ConfigError(
            "reset_attention_mask and reset_position_ids need to know which token ends a document; "
            "set eod_token_id, or preprocess the data with --append-eod"
        )
    return spec.eod_token_id


class FinalNorm(CachingModule):
    """The norm after the last block, of what belongs to tokens."""

    def __init__(self, scope: ParameterScope, spec: ModelSpec) -> None:
        """Make the norm."""
        super().__init__()
        self.norm = build_norm(scope.child("norm"), spec)
        self.prefix = prompt_length(spec)

    def forward(self, value: Value) -> Value:
        """Normalise ``[…, hidden]``; what came beside it ends here, but for the experts' loss."""
        carried = Carried.of(value)
        hidden = carried.hidden
        if carried.bias is not None:
            # A stage without blocks must send a gradient of the bias back too.
            hidden = hidden + 0.0 * carried.bias.sum()
        if self.prefix:
            hidden = hidden[:, self.prefix if self.cache is None else self.cache.prefix_runs :]
        return Carried(hidden=self.norm(hidden), extra_loss=carried.extra_loss).value()


class OutputWeight(nn.Module):
    """Holds the untied output weight; multiplying with it is the loss function's."""

    def __init__(self, scope: ParameterScope, spec: ModelSpec) -> None:
        """Make the weight; rows that pad the vocabulary are 0."""
        super().__init__()
        self.multiplier = output_multiplier(spec)
        ids, padded = vocabulary(spec), spec.padded_vocab_size(scope.topology.tensor_size)
        self.weight = scope.parameter(
            "weight",
            (ids, spec.hidden_size),
            initializer(spec.init_method, spec, hidden=False),
            Partition(dim=0, blocks=(padded,), padded_from=ids),
        )

    def forward(self, value: Value) -> Output:
        """Return the hidden states (times µP's multiplier), the weight, and the experts' loss."""
        return _output(value, self.weight, self.multiplier)


class OutputLayer(nn.Module):
    """The last layer where input and output weights are two."""

    def __init__(self, scope: ParameterScope, spec: ModelSpec) -> None:
        """Make the layer."""
        super().__init__()
        self.final_linear = OutputWeight(scope.child("final_linear"), spec)

    def forward(self, value: Value) -> Output:
        """Return the hidden states and the output weight; see ``Output``."""
        output: Output = self.final_linear(value)
        return output


def tied_output(embedding: Embedding, value: Value) -> Output:
    """Return hidden states and the embedding's weight: the last layer where the two are one."""
    return _output(value, embedding.word_embeddings.weight, embedding.output_multiplier)


def _output(value: Value, weight: torch.Tensor, multiplier: float) -> Output:
    carried = Carried.of(value)
    hidden, loss = _times(carried.hidden, multiplier), carried.extra_loss
    return (hidden, weight) if loss is None else (hidden, weight, loss)
