"""The models of other libraries that ours are compared with, and what they keep in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def hugging_face(config: Any, ours: nn.Module) -> Any:
    """Return Hugging Face's GPT-NeoX with our weights, in float32, ready to be trained.

    Args:
        config: of our model.
        ours: whose weights are copied.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.padded_vocab_size(),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=4 * config.hidden_size,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rotary_emb_base,
                "partial_rotary_factor": config.rotary_pct,
            },
            max_position_embeddings=config.seq_length,
            use_parallel_residual=config.gpt_j_residual,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            attn_implementation="sdpa",
        )
    )
    last = config.num_layers
    pairs = {
        "gpt_neox.embed_in": "0.word_embeddings",
        "gpt_neox.final_layer_norm": f"{last + 1}.norm",
        **{f"gpt_neox.layers.{layer}": str(layer + 1) for layer in range(last)},
        "embed_out": f"{last + 2}.final_linear",
    }
    for there, here in pairs.items():
        whole = {
            name: value.float() for name, value in ours.get_submodule(here).state_dict().items()
        }
        target = (
            model.get_output_embeddings() if there == "embed_out" else model.get_submodule(there)
        )
        target.load_state_dict(whole)
    return model.train()


def saved_bytes(model: nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, each storage once.

    Args:
        model: whose parameters do not count.
        forward: returns the loss.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(size for size, _ in kept.values())
    del loss
    return total
