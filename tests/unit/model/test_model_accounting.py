"""Counting without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron.model import GPT, flops_per_token, layers, param_groups, parameter_count
from megatron.model.accounting import held_parameters, layer_names, layer_parameters
from megatron.model.block_layouts import Settings
from megatron.model.inventory import stage_inventory
from megatron.model.masking import Masking
from megatron.model.seen_keys import seen_keys
from megatron.model.sparsity import PATTERNS, BlockPattern
from megatron.parallel import Layout, Topology
from tests.support.model_spec import TestSpec

ROOT = Path(__file__).parents[3]


def test_gpt2_small() -> None:
    spec = TestSpec(
        vocab_size=50257,
        make_vocab_size_divisible_by=128,
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        seq_length=1024,
    )
    # 124M without learned positions; 0.80 GFLOP per token.
    assert parameter_count(spec) == 50304 * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768
    assert flops_per_token(spec) == pytest.approx(0.80e9, rel=0.01)
    attention = 6 * 12 * 768 * 1024
    assert flops_per_token(spec, causal=False) - flops_per_token(spec) == attention


def test_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megatron.model import parameter_count\n"
        "from tests.support.model_spec import TestSpec\n"
        "print(parameter_count(TestSpec()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(parameter_count(TestSpec()))


SHAPES = [
    {},
    {"no_weight_tying": True, "num_layers": 3},
    {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "use_bias_in_mlp": False},
    {"use_bias_in_attn_linear": False, "gpt_j_residual": True, "no_weight_tying": True},
    {"norm": "scalenorm", "gpt_j_residual": True, "gpt_j_tied": True},
    {"norm": "layernorm", "use_bias_in_norms": False},
    {"norm": "non_parametric_layernorm"},
    {"pos_emb": "learned", "use_qk_layernorm": True, "max_position_embeddings": 20},
    {"pos_emb": "learned", "no_weight_tying": True, "opt_pos_emb_offset": 2},
    {"pos_emb": "rpe", "rpe_num_buckets": 8, "use_qk_layernorm": True, "norm": "rmsnorm"},
    {"pos_emb": "alibi"},
    {"attention_config": ("gmlp", "global", "amlp"), "num_layers": 3, "gmlp_attn_dim": 8},
    {"attention_config": ("amlp",) * 2, "norm": "scalenorm", "use_bias_in_mlp": False},
    {
        "norm": "non_parametric_layernorm",
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    },
]


@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("changes", SHAPES)
def test_layers_agree_with_the_model(changes: dict[str, object], tensor_size: int) -> None:
    if "attention_config" in changes and tensor_size > 1:
        pytest.skip("these blocks are not divided")
    spec = TestSpec(**changes)  # type: ignore[arg-type]
    topology = Topology(layout=Layout(world_size=tensor_size, tensor_size=tensor_size), rank=0)
    described = layers(spec, topology, seed=1, device="meta")
    assert layer_names(spec) == [one.module_type.__name__ for one in described]
    counted = [sum(value.numel() for value in one.build().parameters()) for one in described]
    assert layer_parameters(spec, tensor_size) == counted
    model = GPT(spec, topology, seed=1, device="meta")
    held = held_parameters(spec, 0, len(described), tensor_size=tensor_size)
    assert held == sum(value.numel() for value in model.parameters())
    assert held_parameters(spec, 0, 2, tensor_size=tensor_size) == sum(counted[:2])
    # The optimizer's groups, in their order: what ZeRO cuts into equal parts.
    inventory = stage_inventory(spec, 0, len(described), tensor_size=tensor_size)
    groups = {group["name"]: group["params"] for group in param_groups(model, 0.1)}
    for name, decayed in (("decayed", True), ("not_decayed", False)):
        assert [value.numel() for value in groups.get(name, [])] == [
            one.count for one in inventory if one.decayed == decayed
        ]
    if tensor_size == 1:
        assert held == parameter_count(spec)


WINDOWS = [
    ("global", None, {}),
    ("flash", 9, {}),
    ("global", 500, {}),
    ("global", 1, {}),
    ("local", None, {}),
    ("local", 13, {"num_sliding_window_blocks": 5}),
    ("sparse_fixed", None, {"num_different_global_patterns": 2, "different_layout_per_head": True}),
    ("sparse_variable", None, {"num_random_blocks": 1, "different_layout_per_head": True}),
    ("bigbird", 21, {"num_random_blocks": 2}),
    ("bslongformer", None, {"global_block_indices": (1,), "block": 8}),
]


@pytest.mark.parametrize(("kind", "window", "settings"), WINDOWS)
@pytest.mark.parametrize("length", [64, 61])
def test_windows_and_patterns_count_what_their_masks_show(kind, window, settings, length):
    sparsity = Settings(**{"block": 4, **settings})
    spec = TestSpec(
        num_layers=2,
        num_attention_heads=4,
        hidden_size=32,
        seq_length=length,
        attention_config=("global", kind),
        sliding_window_width=window,
        sparsity_config=sparsity,
    )
    pairs = []
    for layer, name in enumerate(spec.attention_config):
        pattern = None
        if name in PATTERNS:
            pattern = BlockPattern(name, sparsity, heads=4, layer=layer, topology=Topology.single())
        mask = Masking(window=window, pattern=pattern)(torch.zeros(1, 4, length, 8), length)
        shown = torch.ones(length, length).tril().bool() if mask is None else mask
        pairs.append(shown.float().sum((-2, -1)).mean().item())
    # A query's own key counts half.
    for layer in range(2):
        assert seen_keys(spec, layer) == pytest.approx(pairs[layer] / length - 0.5, rel=1e-6)
    attention = 12 * 32 * (sum(pairs) / length - 1)
    rest = flops_per_token(replace(spec, hidden_size=32, seq_length=None))
    assert flops_per_token(spec) == pytest.approx(rest + attention, rel=1e-6)
