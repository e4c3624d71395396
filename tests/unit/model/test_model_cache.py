"""Tokens that run one by one against cached keys give what a whole pass gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron.model import GPT
from megatron.model.kv_cache import KVCache
from tests.support.model_spec import TestSpec

SPEC = TestSpec(init_method_std=0.2, num_layers=3)
LONG = 14


def logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    hidden, weight = model(tokens)
    return hidden @ weight.T


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"pos_emb": "none"},
        {"rotary_pct": 0.5, "num_kv_heads": 2},
        {"num_kv_heads": 1, "gpt_j_residual": True},
        {"moe_num_experts": 4, "moe_top_k": 2},
    ],
)
@torch.no_grad()
def test_token_by_token_equals_the_whole(change: dict[str, object]) -> None:
    model = GPT(dataclasses.replace(SPEC, **change), seed=1).eval()
    tokens = torch.randint(0, 97, (2, LONG), generator=torch.Generator().manual_seed(0))
    whole = logits(model, tokens)
    # Row 0 has a prompt of 7 tokens, row 1 of 4, padded behind.
    lengths = torch.tensor([7, 4])
    prompt = torch.where(torch.arange(7) < lengths[:, None], tokens[:, :7], 0)
    cache = KVCache(rows=2, capacity=LONG)
    with cache.attached(model):
        cache.advance(torch.arange(7).expand(2, 7))
        found = logits(model, prompt)
        for row in range(2):
            expected = whole[row, : lengths[row]]
            torch.testing.assert_close(found[row, : lengths[row]], expected, rtol=0, atol=1e-5)
        for step in range(LONG - 7):
            slots = (lengths + step)[:, None]
            cache.advance(slots)
            found = logits(model, tokens.gather(1, slots))
            expected = whole.gather(1, slots[..., None].expand(-1, -1, whole.shape[-1]))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(model, tokens), whole), "a cache that is no longer attached counts"


def test_misuse_is_named() -> None:
    cache = KVCache(rows=2, capacity=4)
    with pytest.raises(RuntimeError, match="advance"), cache.attached(model := GPT(SPEC, seed=1)):
        model(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="slot 4 of a cache with room for 4"):
        cache.advance(torch.arange(5).expand(2, 5))
    with pytest.raises(ValueError, match="for a cache of 2 rows"):
        cache.advance(torch.zeros(3, 1, dtype=torch.int64))
