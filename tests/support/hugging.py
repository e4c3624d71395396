"""Our weights in transformers' GPTNeoX."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from megatron.model.gpt import GPT


def shaken(spec: Any, *, by: float = 0.1) -> GPT:
    """Build a model whose weights are large enough for texts that are not one token only."""
    model = GPT(spec, seed=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)
    return model.eval()


def gpt_neox(model: GPT, spec: Any, *, longest: int) -> Any:
    """Return transformers' model with the weights of ``model``, whose output is untied."""
    other = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=spec.vocab_size,
            hidden_size=spec.hidden_size,
            num_hidden_layers=spec.num_layers,
            num_attention_heads=spec.num_attention_heads,
            intermediate_size=4 * spec.hidden_size,
            hidden_act="gelu",
            rope_parameters={
                "rope_type": "default",
                "rope_theta": spec.rotary_emb_base,
                "partial_rotary_factor": spec.rotary_pct,
            },
            max_position_embeddings=longest,
            layer_norm_eps=spec.layernorm_epsilon,
            use_parallel_residual=spec.gpt_j_residual,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    ours = {
        name: value.detach() if value.partition is None else value.partition.unpad(value.detach())
        for name, value in model.named_parameters()
    }
    last = spec.num_layers
    renamed = {
        "0.word_embeddings.weight": "gpt_neox.embed_in.weight",
        f"{last + 1}.norm.weight": "gpt_neox.final_layer_norm.weight",
        f"{last + 1}.norm.bias": "gpt_neox.final_layer_norm.bias",
        f"{last + 2}.final_linear.weight": "embed_out.weight",
    }
    for name in ours:
        layer, _, rest = name.partition(".")
        if name not in renamed:
            renamed[name] = f"gpt_neox.layers.{int(layer) - 1}.{rest}"
    names = set(other.state_dict())
    state = {renamed[name]: value for name, value in ours.items()}
    if "embed_out.weight" not in names:
        state["lm_head.weight"] = state.pop("embed_out.weight")
    other.load_state_dict(state, strict=True)
    return other.eval()
