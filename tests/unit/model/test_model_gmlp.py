"""gMLP and aMLP blocks beside their formula written out, position by position."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.errors import ConfigError
from megatron.model import GPT, layers, param_groups
from megatron.model.accounting import flops_per_token, layer_names
from megatron.model.kv_cache import KVCache
from megatron.parallel import Layout, Topology
from tests.support.model_spec import TestSpec

SPEC = TestSpec(
    attention_config=("gmlp", "amlp", "global"), num_layers=3, gmlp_attn_dim=8, seq_length=12
)
TOKENS = torch.randint(0, 97, (2, 10), generator=torch.Generator().manual_seed(2))


def _shaken(spec: TestSpec = SPEC) -> GPT:
    """A model whose spatial matrices are not at 0, where they would mix nothing."""
    model = GPT(spec, seed=3)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def _block(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Liu et al. 2021, figures 1 and 7, for one position after the other."""
    normalised = F.layer_norm(x, (32,), block.norm.weight, block.norm.bias)
    inner = F.gelu(F.linear(normalised, block.input_linear.weight, block.input_linear.bias))
    own, gate = inner.split(128, dim=-1)
    unit = block.sgu
    gate = F.layer_norm(gate, (128,), unit.norm.weight, unit.norm.bias)
    rows = []
    for place in range(x.shape[1]):
        mixed = unit.proj.bias[place] + sum(
            unit.proj.weight[place, other] * gate[:, other] for other in range(place + 1)
        )
        if unit.attn is not None:
            linear = unit.attn.proj_qkv
            query, key, value = F.linear(inner, linear.weight, linear.bias).split(8, dim=-1)
            scores = (query[:, place, None] * key[:, : place + 1]).sum(-1) / 8**0.5
            seen = (scores.softmax(-1)[..., None] * value[:, : place + 1]).sum(1)
            mixed = mixed + F.linear(seen, unit.attn.proj_ffn.weight, unit.attn.proj_ffn.bias)
        rows.append(own[:, place] * mixed)
    linear = block.output_linear
    return x + F.linear(torch.stack(rows, dim=1), linear.weight, linear.bias)


@pytest.mark.option("gmlp_attn_dim")
def test_blocks_are_their_formula() -> None:
    model = _shaken()
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(0))
    for name in ("1", "2"):
        block = model.get_submodule(name)
        torch.testing.assert_close(block(x), _block(block, x), rtol=1e-5, atol=1e-5)
    assert model.get_submodule("1").sgu.attn is None
    assert layer_names(SPEC)[1:4] == [
        "GMLPTransformerBlock",
        "GMLPTransformerBlock",
        "TransformerBlock",
    ]


def test_the_unit_starts_as_nothing() -> None:
    unit = GPT(SPEC, seed=3).get_submodule("1").sgu
    x = torch.randn(2, 10, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit(x), x[..., :128])


def test_a_later_token_never_changes_an_earlier_position() -> None:
    model = _shaken()
    changed = TOKENS.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 97
    before, after = model(TOKENS)[0], model(changed)[0]
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 9], after[:, 9], atol=1e-4)


@pytest.mark.option("gmlp_attn_dim")
def test_a_document_sees_none_before_it() -> None:
    spec = TestSpec(
        attention_config=("gmlp", "amlp"), gmlp_attn_dim=8, reset_attention_mask=True,
        eod_token_id=0,
    )  # fmt: skip
    model = _shaken(spec)
    first, second = TOKENS.clamp(min=1), TOKENS.clamp(min=1)
    first[:, 4] = second[:, 4] = 0
    second[:, :4] = (second[:, :4] + 7) % 96 + 1
    torch.testing.assert_close(model(first)[0][:, 5:], model(second)[0][:, 5:])
    assert not torch.allclose(model(first)[0][:, :4], model(second)[0][:, :4])


@torch.no_grad()
def test_token_by_token_is_the_same() -> None:
    model = _shaken().eval()
    expected, _ = model(TOKENS)
    cache, parts = KVCache(rows=2, capacity=12), []
    with cache.attached(model):
        for first, last in ((0, 6), (6, 7), (7, 10)):
            cache.advance(torch.arange(first, last).expand(2, -1).contiguous())
            parts.append(model(TOKENS[:, first:last])[0])
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_every_part_trains_recomputed_or_not() -> None:
    found = []
    for recompute in (False, True):
        spec = TestSpec(attention_config=("gmlp", "amlp"), checkpoint_activations=recompute)
        model = _shaken(spec)
        model(TOKENS)[0].square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        found.append(gradients)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_weights_are_counted_as_they_multiply() -> None:
    spec = TestSpec(attention_config=("gmlp", "gmlp"), seq_length=16)
    head = 6 * 104 * 32
    # Three matrices of width 128 in and out, and half a product over 16 positions, twice.
    assert flops_per_token(spec) == head + 2 * 6 * (3 * 32 * 128 + 16 * 128 / 2)
    groups = {group["name"]: len(group["params"]) for group in param_groups(GPT(spec, seed=0), 0.1)}
    assert groups == {"decayed": 1 + 2 * 3, "not_decayed": 2 * 7 + 2}


def test_tensor_ranks_are_refused() -> None:
    topology = Topology(layout=Layout(world_size=2, tensor_size=2), rank=0)
    with pytest.raises(ConfigError, match="not divided among tensor ranks"):
        layers(SPEC, topology, seed=0)[1].build()
