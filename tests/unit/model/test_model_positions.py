"""Every position encoding against an independent formula, and what each must not do."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from megatron.config.model import ModelConfig
from megatron.errors import ConfigError
from megatron.model import GPT
from megatron.model.relative import alibi_slopes, distance_buckets, sinusoids
from tests.support.model_spec import TestSpec

SPEC = TestSpec(init_method_std=0.2, num_layers=2)
HEADS, SIZE = 4, 8


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 16, 20, 40])
def test_alibi_slopes_are_blooms(heads: int) -> None:
    bias = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32).view(heads, 2)
    found = torch.tensor(alibi_slopes(heads))
    torch.testing.assert_close(found, bias[:, 1] - bias[:, 0])


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (5, 9)])
def test_buckets_are_t5s(buckets: int, furthest: int) -> None:
    expected = T5Attention._relative_position_bucket(
        -torch.arange(300), bidirectional=False, num_buckets=buckets, max_distance=furthest
    )
    assert torch.equal(distance_buckets(300, buckets=buckets, furthest=furthest), expected)


def test_sinusoids_by_hand() -> None:
    table = sinusoids(30, 6)
    for place in (0, 1, 29):
        for pair in range(3):
            angle = place / 10_000 ** (2 * pair / 6)
            assert table[place, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[place, 3 + pair].item() == pytest.approx(math.cos(angle), abs=1e-6)


def blocks_by_hand(model: GPT, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Run the blocks on the embedded tokens, with ``bias`` added to all scores."""
    length = x.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    for layer in range(2):
        block = model.get_submodule(str(layer + 1))
        fused = block.attention.query_key_value(block.input_layernorm(x))
        query, key, value = fused.view(*x.shape[:2], HEADS, 3, SIZE).unbind(3)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(SIZE) + bias
        chances = scores.masked_fill(future, -math.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", chances, value).flatten(2)
        x = x + block.attention.dense(mixed)
        x = x + block.mlp(block.post_attention_layernorm(x))
    return model.get_submodule("3")(x)


@pytest.mark.option("rpe_num_buckets", "rpe_max_distance")
@pytest.mark.parametrize("pos_emb", ["none", "learned", "sinusoidal", "alibi", "rpe"])
def test_the_model_by_hand(pos_emb: str) -> None:
    spec = dataclasses.replace(SPEC, pos_emb=pos_emb, rpe_num_buckets=8, rpe_max_distance=10)
    model, ids = GPT(spec, seed=1), tokens()
    embedding = model.tied_modules["embed"]
    length = ids.shape[1]
    x = F.embedding(ids, embedding.word_embeddings.weight)
    bias = torch.zeros(HEADS, length, length)
    if pos_emb == "learned":
        assert embedding.position_embeddings.weight.shape == (16, 32)
        x = x + embedding.position_embeddings.weight[:length]
    elif pos_emb == "sinusoidal":
        x = x + sinusoids(length, 32)
    for query in range(length):
        for key in range(query + 1):
            if pos_emb == "alibi":
                slope = torch.tensor([2.0 ** (-2 * (head + 1)) for head in range(HEADS)])
                bias[:, query, key] = -slope * (query - key)
            elif pos_emb == "rpe":
                bucket = distance_buckets(length, buckets=8, furthest=10)[query - key]
                table = embedding.relative_bias.weight
                bias[:, query, key] = table[bucket] * math.sqrt(SIZE)
    expected = blocks_by_hand(model, x, bias)
    torch.testing.assert_close(model(ids)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.option("pos_emb")
def test_positions_make_a_difference_and_learn() -> None:
    ids = tokens()
    found = {}
    for pos_emb in ("none", "learned", "sinusoidal", "alibi", "rpe", "rotary"):
        model = GPT(dataclasses.replace(SPEC, pos_emb=pos_emb), seed=1)
        hidden, weight = model(ids)
        (hidden @ weight.T).square().mean().backward()
        found[pos_emb] = hidden.detach()
        assert all(value.grad is not None for value in model.parameters()), pos_emb
    for one in found:
        for other in found:
            assert one == other or not torch.allclose(found[one], found[other]), (one, other)


@pytest.mark.option("opt_pos_emb_offset")
@pytest.mark.parametrize("pos_emb", ["learned", "sinusoidal"])
def test_an_offset_moves_the_positions(pos_emb: str) -> None:
    ids = tokens()
    plain = GPT(dataclasses.replace(SPEC, pos_emb=pos_emb), seed=1)
    moved = GPT(dataclasses.replace(SPEC, pos_emb=pos_emb, opt_pos_emb_offset=2), seed=1)
    assert not torch.allclose(plain(ids)[0], moved(ids)[0])
    if pos_emb == "learned":
        table = moved.tied_modules["embed"].position_embeddings.weight
        assert table.shape == (18, 32)
        with torch.no_grad():
            table[2:] = plain.tied_modules["embed"].position_embeddings.weight
        assert torch.equal(plain(ids)[0], moved(ids)[0])


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="pos_emb is 'learnt'; did you mean 'learned'"):
        GPT(dataclasses.replace(SPEC, pos_emb="learnt"), seed=0)
    with pytest.raises(ConfigError, match="rpe_max_distance 4 is not above half"):
        GPT(dataclasses.replace(SPEC, pos_emb="rpe", rpe_max_distance=4), seed=0)
    with pytest.raises(ConfigError, match="attention_config names 'lokal'; did you mean 'local'"):
        GPT(dataclasses.replace(SPEC, attention_config=("global", "lokal")), seed=0)
    with pytest.raises(ConfigError, match="eod_token_id"):
        GPT(dataclasses.replace(SPEC, reset_attention_mask=True), seed=0)


def test_the_configuration_group_names_the_same() -> None:
    for pos_emb in ("learned", "rotary", "sinusoidal", "rpe", "alibi", "none"):
        group = ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            seq_length=16,
            vocab_size=97,
            pos_emb=pos_emb,
            attention_config=[[["local", "global"], "all"]],
            use_qk_layernorm=True,
        )
        assert GPT(group, seed=0)(tokens())[0].shape == (2, 12, 32)
