"""Which tokens see which: windows, block patterns, documents; and the norm of queries and keys."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import MistralConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from megatron.config.attention import SparsityConfig
from megatron.model import GPT
from megatron.model.kv_cache import KVCache, document_starts
from megatron.model.masking import Masking
from megatron.model.sparsity import PATTERNS, BlockPattern
from megatron.parallel import Topology
from tests.support.model_spec import TestSpec

SPEC = TestSpec(init_method_std=0.2, num_layers=2)
EOD = 96
ONE = Topology.single()


def seen(length: int, **options: Any) -> torch.Tensor:
    """Return which key each query sees, ``[heads or 1, S, S]``."""
    mask = Masking(**options)(torch.zeros(1, 4, length, 8), length)
    assert mask is not None
    return mask[0]


@pytest.mark.parametrize("window", [1, 3, 20])
def test_a_window_is_mistrals_with_the_token_itself_counted(window: int) -> None:
    config = MistralConfig(sliding_window=window + 1)
    config._attn_implementation = "sdpa"
    embedded = torch.zeros(1, 12, 8)
    expected = create_sliding_window_causal_mask(
        config=config,
        inputs_embeds=embedded,
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(12)[None],
    )
    if expected is None:  # a window as wide as the sequence
        expected = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    assert torch.equal(seen(12, window=window), expected[0])


def pattern(kind: str, **settings: Any) -> torch.Tensor:
    """Return the pattern over 12 blocks of 2 tokens, ``[heads or 1, 24, 24]``."""
    config = SparsityConfig(block=2, **settings)
    blocks = BlockPattern(kind, config, heads=4, layer=0, topology=ONE)
    return seen(24, pattern=blocks)


def visible(kind: str, row: int, column: int, head: int, **settings: Any) -> bool:
    """Tell by the patterns' definitions whether block ``row`` sees block ``column`` ≤ row."""
    if kind == "local":
        width = settings.get("num_local_blocks", settings.get("num_sliding_window_blocks", 4))
        return row - column <= width // 2
    if kind == "sparse_fixed":
        window, shared = settings.get("num_local_blocks", 4), settings.get("num_global_blocks", 1)
        turn = head % settings.get("num_different_global_patterns", 1)
        first = window - (turn + 1) * shared
        return row // window == column // window or first <= column % window < first + shared
    if kind == "sparse_variable":
        sizes = settings.get("local_window_blocks", [4])
        edges = [0]
        while edges[-1] < 12:
            edges.append(edges[-1] + sizes[min(len(edges), len(sizes)) - 1])
        same = any(one <= column <= row < two for one, two in pairwise(edges))
        return same or column in shared_blocks(settings)
    width = settings.get("num_sliding_window_blocks", 3)
    if row - column <= width // 2:
        return True
    if kind == "bigbird":
        return row < settings.get("num_global_blocks", 1) > column or column < settings.get(
            "num_global_blocks", 1
        )
    return bool({row, column} & shared_blocks(settings))


def shared_blocks(settings: dict[str, Any]) -> set[int]:
    starts = settings.get("global_block_indices", [0])
    ends = settings.get("global_block_end_indices", [start + 1 for start in starts])
    return {block for one, two in zip(starts, ends, strict=True) for block in range(one, two)}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("local", {}),
        ("local", {"num_local_blocks": 2}),
        ("local", {"num_sliding_window_blocks": 7}),
        ("sparse_fixed", {}),
        ("sparse_fixed", {"num_local_blocks": 6, "num_global_blocks": 2}),
        (
            "sparse_fixed",
            {"different_layout_per_head": True, "num_different_global_patterns": 4},
        ),
        ("sparse_variable", {}),
        ("sparse_variable", {"local_window_blocks": [2, 3], "global_block_indices": [1, 5]}),
        (
            "sparse_variable",
            {"global_block_indices": [2], "global_block_end_indices": [4]},
        ),
        ("bigbird", {"num_random_blocks": 0}),
        ("bigbird", {"num_random_blocks": 0, "num_global_blocks": 2}),
        ("bigbird", {"num_random_blocks": 0, "num_sliding_window_blocks": 5}),
        ("bslongformer", {}),
        ("bslongformer", {"global_block_indices": [0, 4], "num_sliding_window_blocks": 1}),
    ],
)
def test_patterns_by_their_definitions(kind: str, settings: dict[str, Any]) -> None:
    found = pattern(kind, **settings)
    assert found.shape[0] == (4 if settings.get("different_layout_per_head") else 1)
    for head in range(found.shape[0]):
        for query in range(24):
            for key in range(24):
                expected = key <= query and visible(kind, query // 2, key // 2, head, **settings)
                assert bool(found[head, query, key]) == expected, (head, query, key)


@pytest.mark.parametrize("kind", ["bigbird", "sparse_variable"])
def test_random_blocks_are_earlier_ones_and_always_the_same(kind: str) -> None:
    none = pattern(kind, num_random_blocks=0)
    two = pattern(kind, num_random_blocks=2, different_layout_per_head=True)
    assert torch.equal(two, pattern(kind, num_random_blocks=2, different_layout_per_head=True))
    assert not two.triu(1).any(), "nothing later is seen"
    assert torch.all(two | ~none), "random blocks are added"
    assert (two.sum(-1) > none.sum(-1)).any()
    assert not torch.equal(two[0], two[1]), "heads draw their own"
    config = SparsityConfig(block=2, num_random_blocks=2)
    other = seen(24, pattern=BlockPattern(kind, config, heads=4, layer=1, topology=ONE))
    assert not torch.equal(other[0], two[0]), "so do layers"


@pytest.mark.parametrize("kind", sorted(PATTERNS))
def test_a_pattern_does_not_depend_on_the_length(kind: str) -> None:
    """So that a prefix gives the same as it does within more: what generation relies on."""
    blocks = BlockPattern(kind, SparsityConfig(block=2), heads=4, layer=0, topology=ONE)
    long = blocks.layout(12)
    for length in range(1, 12):
        assert (blocks.layout(length) == long[:, :length, :length]).all()


@pytest.mark.option("attention_config", "sparsity_config")
@pytest.mark.parametrize("types", [("local", "global"), ("sparse_fixed",) * 2])
def test_blocks_attend_by_their_own_kind(types: tuple[str, ...]) -> None:
    ids = torch.arange(16)[None]
    sparse = SparsityConfig(block=2, num_local_blocks=2)
    spec = dataclasses.replace(SPEC, attention_config=types, sparsity_config=sparse)
    model, plain = GPT(spec, seed=1), GPT(SPEC, seed=1)
    for layer, kind in enumerate(types):
        x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(layer))
        own = model.get_submodule(f"{layer + 1}.attention")(x)
        full = plain.get_submodule(f"{layer + 1}.attention")(x)
        assert torch.allclose(own[:, :2], full[:, :2], atol=1e-6)
        assert torch.allclose(own, full, atol=1e-6) == (kind == "global")
    assert not torch.allclose(model(ids)[0], plain(ids)[0])


@pytest.mark.option("sliding_window_width")
def test_a_sliding_window_keeps_far_tokens_out() -> None:
    model = GPT(dataclasses.replace(SPEC, sliding_window_width=3), seed=1)
    one = torch.arange(16)[None]
    other = one.clone()
    other[0, 2] = 90
    # Two layers: token 2 reaches 3 tokens further in each.
    same = (model(one)[0] - model(other)[0]).abs().amax(dim=-1)[0] < 1e-6
    assert same.tolist() == [True] * 2 + [False] * 7 + [True] * 7


@pytest.mark.option("use_qk_layernorm")
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_queries_and_keys_are_normalised_by_head(norm: str, kv_heads: int) -> None:
    spec = dataclasses.replace(
        SPEC, norm=norm, num_kv_heads=kv_heads, use_qk_layernorm=True, pos_emb="none"
    )
    attention: Any = GPT(spec, seed=1).get_submodule("1.attention")
    with torch.no_grad():
        for part in (attention.query_norm, attention.key_norm):
            for value in part.parameters():
                value.add_(torch.randn(8, generator=torch.Generator().manual_seed(8)))
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    fused = attention.query_key_value(x)
    if kv_heads == 4:
        query, key, value = fused.view(2, 6, 4, 3, 8).unbind(3)
    else:
        query, key, value = (
            part.unflatten(-1, (-1, 8))
            for part in fused.split([32, kv_heads * 8, kv_heads * 8], -1)
        )

    def normalised(part: Any, x: torch.Tensor) -> torch.Tensor:
        if norm == "rmsnorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-8).sqrt() * part.scale
        return F.layer_norm(x, (8,), part.weight, part.bias, 1e-5)

    query, key = normalised(attention.query_norm, query), normalised(attention.key_norm, key)
    key, value = (part.repeat_interleave(4 // kv_heads, dim=2) for part in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(8)
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    mixed = torch.einsum(
        "bhqk,bkhd->bqhd", scores.masked_fill(future, -math.inf).softmax(-1), value
    )
    expected = attention.dense(mixed.flatten(2))
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-5)


def test_documents_start_behind_the_token_that_ends_the_last() -> None:
    ended = torch.tensor([[0, 0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1]]).bool()
    assert document_starts(ended).tolist() == [[0, 0, 0, 3, 3, 5, 6], [0, 1, 1, 1, 1, 1, 1]]


RESET = {"reset_attention_mask": True, "reset_position_ids": True, "eod_token_id": EOD}
KINDS: list[dict[str, Any]] = [
    {"pos_emb": "rotary"},
    {"pos_emb": "rotary", "reset_position_ids": False},
    {"pos_emb": "learned"},
    {"pos_emb": "sinusoidal", "num_kv_heads": 1},
    {"pos_emb": "alibi", "sliding_window_width": 4},
    {"pos_emb": "rpe", "checkpoint_activations": True},
    {"pos_emb": "none", "use_qk_layernorm": True},
    {
        "pos_emb": "rotary",
        "attention_config": ("sparse_fixed", "bigbird"),
        "sparsity_config": SparsityConfig(block=2, num_local_blocks=2),
    },
]


def windows() -> tuple[torch.Tensor, list[slice]]:
    """Two rows that differ before the same second document; and its places in them."""
    draw = torch.Generator().manual_seed(4)
    document = torch.randint(0, EOD, (9,), generator=draw)
    rows = torch.randint(0, EOD, (2, 16), generator=draw)
    rows[:, -9:] = document
    rows[0, 6], rows[1, 6], rows[1, 2] = EOD, EOD, EOD
    return rows, [slice(7, 16)] * 2


@pytest.mark.parametrize("change", KINDS)
def test_a_document_does_not_know_what_stands_before_it(change: dict[str, Any]) -> None:
    rows, places = windows()
    model = GPT(dataclasses.replace(SPEC, **{**RESET, **change}), seed=1)
    hidden = model(rows)[0]
    first, second = (hidden[row, place] for row, place in enumerate(places))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    # Without the options it does know.
    plain = {key: value for key, value in change.items() if not key.startswith("reset")}
    hidden = GPT(dataclasses.replace(SPEC, **plain), seed=1)(rows)[0]
    assert not torch.allclose(hidden[0, 7:], hidden[1, 7:], atol=1e-3)


@pytest.mark.parametrize("change", [one for one in KINDS if "reset_position_ids" not in one])
def test_a_document_is_what_it_is_by_itself(change: dict[str, Any]) -> None:
    rows, _ = windows()
    model = GPT(dataclasses.replace(SPEC, **{**RESET, **change}), seed=1)
    torch.testing.assert_close(model(rows)[0][:, 7:], model(rows[:, 7:])[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pos_emb", ["rotary", "learned"])
def test_positions_can_begin_anew_alone(pos_emb: str) -> None:
    rows, _ = windows()
    changed = dataclasses.replace(SPEC, pos_emb=pos_emb, reset_position_ids=True, eod_token_id=EOD)
    model, plain = GPT(changed, seed=1), GPT(dataclasses.replace(SPEC, pos_emb=pos_emb), seed=1)
    assert torch.allclose(model(rows)[0][0, :7], plain(rows)[0][0, :7], atol=1e-6)
    assert not torch.allclose(model(rows)[0][0, 7:], plain(rows)[0][0, 7:], atol=1e-3)
    # The document before is still seen.
    assert not torch.allclose(model(rows)[0][0, 7:], model(rows)[0][1, 7:], atol=1e-3)


@pytest.mark.parametrize("change", KINDS)
@torch.no_grad()
def test_documents_token_by_token(change: dict[str, Any]) -> None:
    rows, _ = windows()
    model = GPT(dataclasses.replace(SPEC, **{**RESET, **change}), seed=1).eval()
    whole = model(rows)[0]
    cache = KVCache(rows=2, capacity=16)
    with cache.attached(model):
        for first, last in ((0, 5), (5, 6), (6, 8), (8, 9), (9, 16)):
            cache.advance(torch.arange(first, last).expand(2, -1))
            part = model(rows[:, first:last])[0]
            torch.testing.assert_close(part, whole[:, first:last], rtol=0, atol=1e-5)


def test_nothing_changes_where_nothing_is_asked_for() -> None:
    assert Masking()(torch.zeros(1, 4, 8, 8), 8) is None
    attention: Any = GPT(SPEC, seed=1).get_submodule("1.attention")
    assert attention.query_norm is None
    assert isinstance(
        GPT(SPEC, seed=1).tied_modules["embed"](torch.zeros(1, 4).long()), torch.Tensor
    )


def test_layers_share_a_mask_where_they_have_the_same() -> None:
    sparse = SparsityConfig(block=2)
    types = ("global", "sparse_fixed", "bigbird", "global", "sparse_fixed", "bigbird")
    spec = dataclasses.replace(
        SPEC, pos_emb="alibi", num_layers=6, attention_config=types, sparsity_config=sparse
    )
    model, query = GPT(spec, seed=1), torch.zeros(1, 4, 16, 8)
    made: Any = [
        model.get_submodule(f"{layer + 1}.attention").masking(query, 16) for layer in range(6)
    ]
    assert made[0] is made[3]
    assert made[1] is made[4]
    assert not torch.equal(made[2], made[5]), "these draw blocks of their own"
    assert not torch.equal(made[0], made[1])
