"""The way from a document to its projected gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from megatron.selection.base import Cost, FloatArray
from megatron.selection.devices import DTYPES, choose_device
from megatron.selection.less_examples import Example, ExampleMaker
from megatron.selection.less_gradients import (
    ExampleGradients,
    GradientType,
    LoraState,
    precondition,
)
from megatron.selection.less_settings import LessSettings
from megatron.selection.lora_model import LoraModel, LoraSettings
from megatron.selection.model_folder import (
    attention_width,
    causal_flops,
    load_tokenizer,
    longest_input,
    tokenizer_identity,
)
from megatron.selection.projection import Projection

PASSES = 3
"""A gradient costs as much as so many forward passes."""


@dataclass(frozen=True, kw_only=True)
class FeatureMaker:
    """A model with adapters, and what turns documents into features with it.

    Attributes:
        lora: the model.
        maker: turns documents into examples.
        gradients: takes their gradients.
        projection: of those.
    """

    lora: LoraModel
    maker: ExampleMaker
    gradients: ExampleGradients
    projection: Projection

    def features(self, examples: Sequence[Example], state: LoraState, kind: str) -> FloatArray:
        """Return projected gradients at a checkpoint, [n, d].

        Args:
            examples: with something to learn each.
            state: the checkpoint.
            kind: what is made of gradients, see :func:`precondition`.
        """
        device = self.lora.device
        moved = replace(
            state,
            values=state.values.to(device),
            first=state.first.to(device),
            second=state.second.to(device),
        )
        found = np.empty((len(examples), self.projection.dimension))
        for numbers, gradients in self.gradients.each(examples, moved.values):
            updates = precondition(gradients, moved, cast(GradientType, kind))
            found[numbers] = self.projection(updates).double().cpu().numpy()
        return found

    def cost(self, lengths: Sequence[int]) -> Cost:
        """Return what gradients of so many sequences of these lengths cost, three passes each."""
        width = attention_width(self.lora.config)
        flops = sum(PASSES * causal_flops(self.lora.matrices, width, one) for one in lengths)
        return Cost(flops=flops, tokens=sum(lengths))


def open_features(
    folder: Path, settings: LessSettings, *, batch_tokens: int, device: str
) -> FeatureMaker:
    """Load a model with its tokenizer, and give it adapters with their first values.

    Args:
        folder: that transformers loads.
        settings: of the method.
        batch_tokens: read in one pass.
        device: see :func:`megatron.selection.devices.choose_device`.

    Raises:
        CheckpointError: transformers does not load the model.
        ConfigError: there is no such device or module.
        DataError: there is no tokenizer.
        MissingExtraError: peft or transformers is not installed.
    """
    adapters = LoraSettings(
        rank=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        targets=settings.lora_targets,
        seed=settings.seed,
    )
    lora = LoraModel(folder, adapters, dtype=DTYPES[settings.dtype], device=choose_device(device))
    longest = min(settings.max_tokens, longest_input(lora.config) or settings.max_tokens)
    return FeatureMaker(
        lora=lora,
        maker=ExampleMaker(
            load_tokenizer(folder, "less"),
            identity=tokenizer_identity(folder),
            longest=longest,
            vocab_size=int(lora.model.get_input_embeddings().num_embeddings),
        ),
        gradients=ExampleGradients(lora, batch_tokens=batch_tokens),
        projection=Projection(dimension=settings.dimension, seed=settings.seed),
    )
