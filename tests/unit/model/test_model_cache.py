"""Tokens that run one by one against cached keys give what a whole pass gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron.engine.frozen import lay_out_for_few_rows
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


@pytest.mark.parametrize("options", [{}, {"sliding_window_width": 3}, {"pos_emb": "alibi"}])
@torch.no_grad()
def test_rows_in_step_are_run_as_any_rows_are(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left out where all rows stand at one slot (masks, places) changes nothing."""
    model = GPT(dataclasses.replace(SPEC, **options), seed=1).eval()
    tokens = torch.randint(0, 96, (3, 9), generator=torch.Generator().manual_seed(0))

    def run() -> list[torch.Tensor]:
        cache, found = KVCache(rows=3, capacity=12), []
        with cache.attached(model), torch.no_grad():
            for start, stop in ((0, 4), (4, 5), (5, 7), (7, 8), (8, 9)):
                cache.advance(torch.arange(start, stop).expand(3, -1))
                found.append(logits(model, tokens[:, start:stop]))
        return found

    quick = run()
    original = KVCache.advance

    def uneven(self: KVCache, slots: torch.Tensor) -> None:
        original(self, slots)
        self._first = None

    monkeypatch.setattr(KVCache, "advance", uneven)
    for one, other in zip(quick, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(quick, dim=1), logits(model, tokens), rtol=0, atol=1e-5)


@torch.no_grad()
def test_weights_laid_out_for_few_rows_are_the_same_weights() -> None:
    model = GPT(dataclasses.replace(SPEC, no_weight_tying=True), seed=1).eval()
    tokens = torch.randint(0, 96, (2, 5), generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model, tokens)
    lay_out_for_few_rows(model)
    changed = {name for name, one in model.named_parameters() if not one.is_contiguous()}
    kinds = ("query_key_value.weight", "dense_h_to_4h.weight", "final_linear.weight")
    assert changed == {name for name in before if name.endswith(kinds)}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=1e-5)
