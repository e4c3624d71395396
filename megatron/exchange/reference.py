"""Logits of transformers' model with weights that are in no folder of its own."""

from __future__ import annotations

import torch

from megatron.config import ModelConfig
from megatron.exchange.architecture import Architecture
from megatron.exchange.hf_config import hf_config
from megatron.exchange.libraries import transformers
from megatron.exchange.pieces import pieces
from megatron.exchange.weights import Weights


@torch.no_grad()
def reference_logits(
    model: ModelConfig, architecture: Architecture, weights: Weights, tokens: torch.Tensor
) -> torch.Tensor:
    """Return logits of transformers' model on the CPU in float32.

    Args:
        model: one that the architecture can express.
        architecture: what transformers calls it.
        weights: of the model.
        tokens: int64 ``[B, S]``.

    Returns:
        float32 ``[B, S, vocab_size]``.
    """
    library = transformers("comparing logits")
    config = library.CONFIG_MAPPING[architecture.model_type].from_dict(
        hf_config(model, architecture)
    )
    theirs = library.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    held = dict(theirs.named_parameters())
    for piece in pieces(model, architecture):
        value = torch.zeros(piece.shape) if piece.ours is None else weights.read(piece.ours)
        for name, part in zip(piece.theirs, piece.split(value.float()), strict=True):
            # What files call embed_out is lm_head in version 5.
            held[name if name in held else name.replace("embed_out.", "lm_head.")].copy_(part)
    logits: torch.Tensor = theirs(tokens, use_cache=False).logits
    return logits
