"""A model with low-rank updates as the model without them that it is the same as."""

from __future__ import annotations

import torch

from megatron.config import ModelConfig
from megatron.exchange.weights import Weights

_WEIGHT = ".weight"


class Merged:
    """The weights of a model with its updates added: ``W + (alpha / rank) · B A``."""

    def __init__(self, weights: Weights, model: ModelConfig) -> None:
        """Name the weights and the model that they are of, which has updates."""
        assert model.lora is not None
        self._weights = weights
        self._targets = model.lora.targets
        self._scale = model.lora.alpha / model.lora.rank

    def read(self, name: str) -> torch.Tensor:
        """See :class:`~megatron.exchange.weights.Weights`."""
        weight = self._weights.read(name)
        layer = name.removesuffix(_WEIGHT)
        if layer == name or layer.rpartition(".")[2] not in self._targets:
            return weight
        a, b = (self._weights.read(f"{layer}.lora.{part}").float() for part in "ab")
        return weight.float() + self._scale * (b @ a)


def without_updates(model: ModelConfig) -> ModelConfig:
    """Return the model that the merged weights are of."""
    return model.model_copy(update={"lora": None})
