"""A prompt before the tokens: where it stands, what it changes, and that it alone is trained."""

from __future__ import annotations

import pytest
import torch

from megatron.config.adapters import SoftPromptConfig
from megatron.model import GPT, param_groups, parameter_count
from megatron.model.accounting import layer_parameters
from megatron.model.kv_cache import KVCache
from megatron.model.soft_prompt import embed_prompt, find_prompt
from tests.support.model_spec import TestSpec

PROMPT = SoftPromptConfig(enabled=True, n_tokens=5, init_range=0.25)
TOKENS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(2))


def _spec(**changes: object) -> TestSpec:
    return TestSpec(soft_prompt_tuning=PROMPT, init_method_std=0.3, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{}, {"pos_emb": "learned"}, {"pos_emb": "rpe"}, {"pos_emb": "alibi", "no_weight_tying": True}],
)
def test_the_prompt_stands_before_the_tokens(changes: dict[str, object]) -> None:
    model = GPT(_spec(**changes), seed=3).eval()
    bare = GPT(TestSpec(init_method_std=0.3, **changes), seed=3).eval()  # type: ignore[arg-type]
    words, prompt = find_prompt(model)
    assert prompt.weight.abs().max() <= 0.25
    hidden, _ = model(TOKENS)
    assert hidden.shape == (2, 9, 32)
    # Ids as a prompt are the same ids in front, where tokens do not know their place; a token
    # keeps its place, so that under learned positions only a prompt without any can be shown.
    ids = [7, 3, 90]
    embed_prompt(words, prompt, ids)
    assert torch.equal(prompt.weight, words.weight[torch.tensor([7, 3, 90, 7, 3])])
    front = torch.tensor([[7, 3, 90, 7, 3]]).expand(2, -1)
    if changes.get("pos_emb") == "learned":
        places = bare.get_submodule("tied_modules.embed").position_embeddings.weight
        with torch.no_grad():
            prompt.weight += places[:5]
            model.get_submodule("tied_modules.embed").position_embeddings.weight[:9] = places[5:14]
    expected, _ = bare(torch.cat([front, TOKENS], dim=1))
    torch.testing.assert_close(model(TOKENS)[0], expected[:, 5:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pos_emb", ["rotary", "learned", "rpe"])
def test_token_by_token_is_the_same(pos_emb: str) -> None:
    model = GPT(_spec(pos_emb=pos_emb), seed=3).eval()
    expected, _ = model(TOKENS)
    cache, parts = KVCache(rows=2, capacity=9), []
    with cache.attached(model):
        for first, last in ((0, 6), (6, 7), (7, 9)):
            cache.advance(torch.arange(first, last).expand(2, -1).contiguous())
            parts.append(model(TOKENS[:, first:last])[0])
        with pytest.raises(ValueError, match="room for 9"):
            cache.advance(torch.tensor([[9], [9]]))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_the_prompt_alone_is_trained_and_counted() -> None:
    for tied in (True, False):
        spec = _spec(no_weight_tying=not tied, checkpoint_activations=True)
        model = GPT(spec, seed=3)
        (group,) = param_groups(model, 0.1)
        (trained,) = group["params"]
        assert trained.shape == (5, 32)
        model(TOKENS)[0].square().sum().backward()
        held = [p for p in model.parameters() if p.grad is not None]
        assert len(held) == 1
        assert held[0] is trained
        assert trained.grad.abs().sum() > 0
        assert parameter_count(spec) == sum(p.numel() for p in model.parameters())
        assert layer_parameters(spec)[0] == 104 * 32 + 5 * 32
