"""The same weights in Hugging Face's models: the same logits, the same loss, the same gradients."""

from __future__ import annotations

import pytest
import torch

from megatron.model import GPT, DomainLoss
from tests.support.model_spec import TestSpec

transformers = pytest.importorskip("transformers")


def _shaken(spec: TestSpec) -> GPT:
    """Build a model whose norms and biases are not at their trivial first values."""
    model = GPT(spec, seed=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def _weights(model: GPT) -> dict[str, torch.Tensor]:
    """Return the weights without the rows that pad the vocabulary."""
    return {
        name: value.detach() if value.partition is None else value.partition.unpad(value.detach())
        for name, value in model.named_parameters()
    }


def _neox(model: GPT, spec: TestSpec):
    config = transformers.GPTNeoXConfig(
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
        max_position_embeddings=64,
        layer_norm_eps=spec.layernorm_epsilon,
        use_parallel_residual=spec.gpt_j_residual,
        tie_word_embeddings=not spec.no_weight_tying,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    other = transformers.GPTNeoXForCausalLM(config)
    ours, last = _weights(model), spec.num_layers
    tied = "tied_modules.embed.word_embeddings.weight"
    # Named embed_out in older releases and in published checkpoints.
    output = "lm_head.weight" if hasattr(other, "lm_head") else "embed_out.weight"
    state = {
        "gpt_neox.embed_in.weight": ours.get(tied, ours.get("0.word_embeddings.weight")),
        output: ours.get(tied, ours.get(f"{last + 2}.final_linear.weight")),
        "gpt_neox.final_layer_norm.weight": ours[f"{last + 1}.norm.weight"],
        "gpt_neox.final_layer_norm.bias": ours[f"{last + 1}.norm.bias"],
    }
    for layer in range(last):
        prefix = f"{layer + 1}."
        for name, value in ours.items():
            if name.startswith(prefix):
                state[f"gpt_neox.layers.{layer}.{name.removeprefix(prefix)}"] = value
    other.load_state_dict(state, strict=True)
    return other


def _llama(model: GPT, spec: TestSpec):
    config = transformers.LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_kv_heads,
        intermediate_size=spec.intermediate_size,
        hidden_act="silu",
        rms_norm_eps=spec.rms_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rotary_emb_base},
        tie_word_embeddings=False,
    )
    other = transformers.LlamaForCausalLM(config)
    ours, last = _weights(model), spec.num_layers
    state = {
        "model.embed_tokens.weight": ours["0.word_embeddings.weight"],
        "model.norm.weight": ours[f"{last + 1}.norm.scale"],
        "lm_head.weight": ours[f"{last + 2}.final_linear.weight"],
    }
    size = spec.hidden_size // spec.num_attention_heads
    for layer in range(last):
        there, here = f"model.layers.{layer}.", f"{layer + 1}."
        rows = ours[here + "attention.query_key_value.weight"]
        shared = spec.num_kv_heads * size
        parts = rows.split([spec.hidden_size, shared, shared])
        for name, part in zip("qkv", parts, strict=True):
            state[f"{there}self_attn.{name}_proj.weight"] = part
        up, gate = ours[here + "mlp.dense_h_to_4h.weight"].chunk(2)
        state[there + "self_attn.o_proj.weight"] = ours[here + "attention.dense.weight"]
        state[there + "mlp.up_proj.weight"] = up
        state[there + "mlp.gate_proj.weight"] = gate
        state[there + "mlp.down_proj.weight"] = ours[here + "mlp.dense_4h_to_h.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{there}{norm}.weight"] = ours[f"{here}{norm}.scale"]
    other.load_state_dict(state, strict=True)
    return other


def _compare(model: GPT, other, spec: TestSpec) -> None:
    tokens = torch.randint(0, spec.vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))
    expected = other(tokens[:, :-1]).logits
    hidden, weight = model(tokens[:, :-1])
    torch.testing.assert_close(
        (hidden @ weight.T)[..., : spec.vocab_size], expected, rtol=1e-5, atol=1e-5
    )

    expected_loss = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), tokens[:, 1:].flatten()
    )
    expected_loss.backward()
    ones, share = torch.ones(3, 16), torch.full((3,), 1 / 48)
    loss = DomainLoss(vocab_size=spec.vocab_size, chunk_tokens=7)(
        (hidden, weight), (tokens[:, 1:], ones, torch.zeros(3, dtype=torch.int64), share)
    )
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    ours = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    theirs = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.option("gpt_j_residual", "rotary_pct", "no_weight_tying")
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rotary_pct", [0.25, 1.0])
def test_equals_gpt_neox(parallel: bool, tied: bool, rotary_pct: float) -> None:
    spec = TestSpec(
        hidden_size=64, rotary_pct=rotary_pct, gpt_j_residual=parallel, no_weight_tying=not tied
    )
    model = _shaken(spec)
    _compare(model, _neox(model, spec), spec)


@pytest.mark.option("rotary_emb_base", "num_kv_heads", "use_bias_in_attn_linear", "use_bias_in_mlp")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_llama(kv_heads: int) -> None:
    spec = TestSpec(
        num_kv_heads=kv_heads,
        norm="rmsnorm",
        rms_norm_epsilon=1e-6,
        activation="swiglu",
        intermediate_size=96,
        rotary_emb_base=500_000.0,
        no_weight_tying=True,
        use_bias_in_attn_linear=False,
        use_bias_in_mlp=False,
    )
    model = _shaken(spec)
    if kv_heads == spec.num_attention_heads:
        # With a key head per query head rows are [heads, 3, size]; Llama wants q, k, v apart.
        other = _llama_from_fused(model, spec)
    else:
        other = _llama(model, spec)
    _compare(model, other, spec)


def _llama_from_fused(model: GPT, spec: TestSpec):
    """Copy into Llama after bringing the [heads, 3, size] rows into [q | k | v] order."""
    regrouped = GPT(spec, seed=0)
    regrouped.load_state_dict(model.state_dict())
    size = spec.hidden_size // spec.num_attention_heads
    for layer in range(spec.num_layers):
        rows = regrouped.get_parameter(f"{layer + 1}.attention.query_key_value.weight")
        by_head = rows.detach().view(spec.num_attention_heads, 3, size, spec.hidden_size)
        rows.data = by_head.transpose(0, 1).reshape(rows.shape).contiguous()
    return _llama(regrouped, spec)
