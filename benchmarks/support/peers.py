"""The models of other libraries that ours are compared with, and what they keep in memory."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A model with our weights, in float32.

    Attributes:
        model: the module.
        logits: takes token ids [B, S] and returns logits [B, S, V].
        holds_half: in bf16 its weights are bf16, with masters beside them; else autocast.
    """

    model: nn.Module
    logits: Callable[[torch.Tensor], torch.Tensor]
    holds_half: bool = False


def hugging_face(config: Any, ours: nn.Module) -> Peer:
    """Return Hugging Face's GPT-NeoX with SDPA.

    Args:
        config: of our model.
        ours: whose weights are copied.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model: Any = GPTNeoXForCausalLM(
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
        target = (
            model.get_output_embeddings() if there == "embed_out" else model.get_submodule(there)
        )
        target.load_state_dict(_whole(ours, here))

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(tokens, use_cache=False).logits
        return found

    return Peer(model=model.train(), logits=logits)


def nanogpt(clone: Path, config: Any, ours: nn.Module) -> Peer:
    """Return the GPT of a clone of nanoGPT.

    Args:
        clone: folder with its ``model.py``.
        config: of our model, of the same architecture.
        ours: whose weights are copied.
    """
    spec = importlib.util.spec_from_file_location("nanogpt_model", clone / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["nanogpt_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with contextlib.redirect_stdout(io.StringIO()):
        model: Any = module.GPT(
            module.GPTConfig(
                block_size=config.max_position_embeddings,
                vocab_size=config.padded_vocab_size(),
                n_layer=config.num_layers,
                n_head=config.num_attention_heads,
                n_embd=config.hidden_size,
                dropout=0.0,
                bias=True,
            )
        )
    heads = config.num_attention_heads
    names = {
        "input_layernorm": "ln_1",
        "attention.query_key_value": "attn.c_attn",
        "attention.dense": "attn.c_proj",
        "post_attention_layernorm": "ln_2",
        "mlp.dense_h_to_4h": "mlp.c_fc",
        "mlp.dense_4h_to_h": "mlp.c_proj",
    }
    embedding = "tied_modules.embed"
    parts = {
        "transformer.wte": f"{embedding}.word_embeddings",
        "transformer.wpe": f"{embedding}.position_embeddings",
        "transformer.ln_f": f"{config.num_layers + 1}.norm",
    }
    for layer in range(config.num_layers):
        parts |= {f"transformer.h.{layer}.{b}": f"{layer + 1}.{a}" for a, b in names.items()}
    for there, here in parts.items():
        whole = _whole(ours, here)
        if here.endswith("query_key_value"):
            # [heads, 3, size] here, [3, heads, size] there.
            whole = {
                name: value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
                for name, value in whole.items()
            }
        model.get_submodule(there).load_state_dict(whole)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(tokens, tokens)[0]  # without targets: of the last token only
        return found

    return Peer(model=model.train(), logits=logits)


def megatron_core(config: Any, ours: nn.Module, device: torch.device) -> Peer:
    """Return megatron-core's GPTModel of its local layer specification.

    It is written for CUDA.  On a CPU it runs with three things of its own replaced: the buffer
    of attention's scores and the rotation's device, which are taken from CUDA there, and the
    tracker of random states, of which it has one that does nothing.

    Args:
        config: of our model, of the same architecture.
        ours: whose weights are copied.
        device: where it will run.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import TransformerConfig

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    on_cpu = device.type == "cpu"
    random.initialize_rng_tracker(inference_rng_tracker=on_cpu)
    if not on_cpu:
        random.model_parallel_cuda_manual_seed(0)
    settings = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        ffn_hidden_size=4 * config.hidden_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layernorm_epsilon=config.layernorm_epsilon,
        use_cpu_initialization=on_cpu,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )
    model: Any = GPTModel(
        config=settings,
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=config.padded_vocab_size(),
        max_sequence_length=config.seq_length,
        parallel_output=False,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=config.rotary_pct,
        rotary_base=config.rotary_emb_base,
    )
    names = {
        "input_layernorm": "input_layernorm",
        "attention.query_key_value": "self_attention.linear_qkv",
        "attention.dense": "self_attention.linear_proj",
        "post_attention_layernorm": "pre_mlp_layernorm",
        "mlp.dense_h_to_4h": "mlp.linear_fc1",
        "mlp.dense_4h_to_h": "mlp.linear_fc2",
    }
    last = config.num_layers
    parts = {"embedding.word_embeddings": "0.word_embeddings"}
    parts |= {"decoder.final_layernorm": f"{last + 1}.norm"}
    parts |= {"output_layer": f"{last + 2}.final_linear"}
    for layer in range(last):
        parts |= {f"decoder.layers.{layer}.{b}": f"{layer + 1}.{a}" for a, b in names.items()}
    for there, here in parts.items():
        model.get_submodule(there).load_state_dict(_whole(ours, here), strict=False)
    length = config.seq_length
    places = torch.arange(length, device=device)[None]
    mask = (places > places.T)[None, None]  # True where a query must not look
    if on_cpu:
        parallel_state._GLOBAL_MEMORY_BUFFER = _HostBuffer()
        angles = torch.outer(places[0].float(), model.rotary_pos_emb.inv_freq)
        turned = torch.cat((angles, angles), dim=-1)[:, None, None]
        model.rotary_pos_emb.forward = lambda *_, **__: turned

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(tokens, places.expand(len(tokens), -1), mask)
        return found

    return Peer(model=model.train(), logits=logits, holds_half=True)


class _HostBuffer:
    """What megatron-core takes its buffer of scores from, on the host."""

    def get_tensor(
        self, shape: tuple[int, ...], dtype: torch.dtype, name: str, context: Any = None
    ) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)


def _whole(ours: nn.Module, here: str) -> Mapping[str, torch.Tensor]:
    return {name: value.float() for name, value in ours.get_submodule(here).state_dict().items()}


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
