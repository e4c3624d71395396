"""The comparison that every exchange ends with: the same tokens, the same logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron.config import ModelConfig
from megatron.errors import CheckpointError
from megatron.exchange.libraries import transformers
from megatron.exchange.weights import Weights, partition_of
from megatron.model.gpt import LayerDescription, layers
from megatron.parallel.topology import Topology

TOLERANCE = 1e-5
"""Largest difference of logits in float32, relative to the largest logit."""

ROUNDING = 0.1
"""Largest difference that rounding the weights to half precision may make, relative likewise."""

_SEQUENCES, _LONGEST = 3, 512


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far logits lie apart.

    Attributes:
        difference: the largest, relative to the largest logit.
        tokens: how many positions were compared.
    """

    difference: float
    tokens: int


class Rounded:
    """Weights as they are after a trip through another number format."""

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        """Name the weights and the format."""
        self._weights, self._dtype = weights, dtype

    def read(self, name: str) -> torch.Tensor:
        """See :class:`~megatron.exchange.weights.Weights`."""
        return self._weights.read(name).to(self._dtype)


def sample_tokens(model: ModelConfig, *, seed: int = 0) -> torch.Tensor:
    """Return random sequences, int64 ``[B, S]``, longer than a sliding window where one fits."""
    window = model.sliding_window_width or 0
    longest = model.max_position_embeddings or model.context_length
    length = min(longest, max(64, min(window + 64, _LONGEST)))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.vocab_size or 1, (_SEQUENCES, length), generator=generator)


@torch.no_grad()
def our_logits(model: ModelConfig, weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits of a model of ours on the CPU in float32; one layer is in memory at a time.

    Args:
        model: the model.
        weights: its parameters.
        tokens: int64 ``[B, S]``.

    Returns:
        float32 ``[B, S, vocab_size]``.
    """
    spec = model.model_copy(update={"checkpoint_activations": False})
    tied: dict[str, nn.Module] = {}
    value: Any = tokens
    for index, description in enumerate(layers(spec, Topology.single(), seed=0, device="meta")):
        key = description.tied_key
        if key is None:
            module = _filled(description, str(index), weights)
        else:
            if key not in tied:
                tied[key] = _filled(description, f"tied_modules.{key}", weights)
            module = tied[key]
        value = module(value) if description.forward is None else description.forward(module, value)
    hidden, weight = value
    logits: torch.Tensor = hidden @ weight.T
    return logits[..., : model.vocab_size]


def _filled(description: LayerDescription, name: str, weights: Weights) -> nn.Module:
    module = description.build().eval()
    for own, parameter in list(module.named_parameters()):
        partition = partition_of(parameter)
        full = weights.read(f"{name}.{own}").float()
        place, _, leaf = own.rpartition(".")
        value = full if partition is None else partition.pad(full)
        module.get_submodule(place).register_parameter(leaf, nn.Parameter(value))
    return module


@torch.no_grad()
def their_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits of a Hugging Face folder's model on the CPU in float32.

    Raises:
        CheckpointError: transformers does not load it, or finds parameters missing or unknown.
    """
    library = transformers("comparing logits")
    try:
        model, loaded = library.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever the library raises over a folder
        raise CheckpointError(f"transformers does not load {folder}: {error}") from error
    faults: Mapping[str, Any] = {key: value for key, value in loaded.items() if value}
    if faults:
        raise CheckpointError(f"transformers loads {folder} with faults: {dict(faults)}")
    model.eval()
    logits: torch.Tensor = model(tokens, use_cache=False).logits
    return logits.float()


def compare(ours: torch.Tensor, theirs: torch.Tensor, *, bound: float, what: str) -> Comparison:
    """Compare logits.

    Args:
        ours: ``[B, S, V]``.
        theirs: the same shape.
        bound: largest difference allowed, relative to the largest logit.
        what: is compared, for the message.

    Raises:
        CheckpointError: they differ by more, or are not finite.
    """
    if ours.shape != theirs.shape:
        raise CheckpointError(
            f"{what}: logits of {tuple(ours.shape)} against {tuple(theirs.shape)}"
        )
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        raise CheckpointError(f"{what}: the model's logits are not finite on random tokens")
    scale = max(ours.abs().max().item(), torch.finfo(torch.float32).tiny)
    difference = (ours - theirs).abs().max().item() / scale
    if not difference <= bound:
        raise CheckpointError(
            f"{what}: logits differ by {difference:.1e} of the largest one, more than {bound:.0e}; "
            "nothing was written"
        )
    return Comparison(difference=difference, tokens=ours.shape[0] * ours.shape[1])
