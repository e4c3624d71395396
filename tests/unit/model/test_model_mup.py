"""µP: its scales one by one, and the coordinate check of both parametrisations."""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.config import ModelConfig
from megatron.errors import ConfigError
from megatron.model import GPT, param_groups
from megatron.training.coord_check import GROWS, Trial, exponents, sizes
from tests.support.model_spec import TestSpec

ROOT = Path(__file__).parents[3]
BASE = TestSpec(hidden_size=32, num_attention_heads=4, use_mup=True, mup_base_hidden_size=32)
WIDE = dataclasses.replace(BASE, hidden_size=128, no_weight_tying=True)
TOKENS = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.option("mup_init_scale")
@pytest.mark.option("mup_init_scale")
@pytest.mark.parametrize(
    ("method", "base"),
    [
        ("normal", 0.02),
        ("scaled_normal", 0.02 / 2),
        ("single_residual_scaled_normal", 0.02 / math.sqrt(2)),
        ("wang_init", 2 / 2 / math.sqrt(32)),
        ("small_init", math.sqrt(2 / 5 / 32)),
    ],
)
def test_first_weights(method: str, base: float) -> None:
    spec = dataclasses.replace(
        WIDE, init_method=method, output_layer_init_method=method, mup_init_scale=3.0
    )
    weights = {name: value.std().item() for name, value in GPT(spec, seed=1).named_parameters()}
    for name in ("0.word_embeddings.weight", "4.final_linear.weight"):
        true_rows = math.sqrt(97 / 104)  # the rest pads the vocabulary with 0
        assert weights[name] == pytest.approx(3 * base * true_rows, rel=0.03)
    for name in ("attention.query_key_value", "attention.dense", "mlp.dense_4h_to_h"):
        assert weights[f"1.{name}.weight"] == pytest.approx(3 * base / 2, rel=0.03)


def test_methods_without_a_scale_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"init_method 'orthogonal' has no scale"):
        GPT(dataclasses.replace(WIDE, init_method="orthogonal"), seed=1)


def test_rates_and_decay_of_hidden_matrices() -> None:
    groups = {group["name"]: group for group in param_groups(GPT(WIDE, seed=1), 0.1, width=4.0)}
    assert len(groups["hidden"]["params"]) == 2 * 4
    assert groups["hidden"]["lr_scale"] == 0.25
    assert groups["hidden"]["weight_decay"] == pytest.approx(0.4)
    assert {tuple(value.shape) for value in groups["decayed"]["params"]} == {(104, 128)}
    assert "lr_scale" not in groups["decayed"] | groups["not_decayed"]


def _logits(spec: TestSpec) -> torch.Tensor:
    hidden, weight = GPT(spec, seed=1)(TOKENS)
    return hidden @ weight.T


@pytest.mark.option("mup_embedding_mult", "mup_output_temp", "mup_rp_embedding_mult")
@pytest.mark.option("mup_output_temp", "mup_embedding_mult", "mup_rp_embedding_mult")
def test_multipliers() -> None:
    plain = dataclasses.replace(WIDE, mup_base_hidden_size=128)
    logits = _logits(plain)
    tempered = dataclasses.replace(plain, mup_output_temp=2.0)
    torch.testing.assert_close(_logits(tempered), logits / 2)
    tied = dataclasses.replace(plain, no_weight_tying=False)
    tied_logits = _logits(tied)
    torch.testing.assert_close(
        _logits(dataclasses.replace(tied, mup_output_temp=2.0)), tied_logits / 2
    )
    # The same weights under another base width: states are divided before the output.
    model, other = GPT(plain, seed=1), GPT(WIDE, seed=1)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(TOKENS)[0], model(TOKENS)[0] / 4)

    embedding = GPT(plain, seed=1).get_submodule("0")
    doubled = GPT(dataclasses.replace(plain, mup_embedding_mult=2.0), seed=1).get_submodule("0")
    torch.testing.assert_close(doubled(TOKENS), 2 * embedding(TOKENS))
    placed = dataclasses.replace(plain, pos_emb="learned")
    one = GPT(placed, seed=1).get_submodule("0")
    three = GPT(dataclasses.replace(placed, mup_rp_embedding_mult=3.0), seed=1).get_submodule("0")
    position = one(TOKENS) - one.word_embeddings(TOKENS)
    torch.testing.assert_close(three(TOKENS), one(TOKENS) + 2 * position)


@pytest.mark.option("mup_attn_temp")
@pytest.mark.option("mup_attn_temp")
def test_scores_are_divided_by_the_size_of_a_head() -> None:
    spec = dataclasses.replace(WIDE, pos_emb="none", mup_attn_temp=0.5, init_method_std=0.3)
    attention = GPT(spec, seed=1).get_submodule("1.attention")
    x = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(0))
    query, key, value = attention.query_key_value(x).unflatten(-1, (4, 3, 32)).unbind(-2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / (32 * 0.5)
    scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
    torch.testing.assert_close(attention(x), attention.dense(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.option("use_mup")
@pytest.mark.option("use_mup")
@pytest.mark.parametrize("tied", [True, False])
def test_activations_do_not_grow_with_the_width(tied: bool) -> None:
    model = ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=2, seq_length=16, no_weight_tying=not tied
    )
    trial = Trial(widths=(32, 64, 128, 256), seeds=2, length=16)
    standard = exponents(sizes(model, trial, use_mup=False), trial.widths)
    scaled = exponents(sizes(model, trial, use_mup=True), trial.widths)
    assert max(scaled.values()) < GROWS / 2
    assert standard["logits"] > 2 * GROWS
    assert standard["block 1"] > 2 * GROWS


def test_the_tool_shows_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "m.yml", tmp_path / "sizes.json"
    file.write_text("num_layers: 6\nhidden_size: 64\nnum_attention_heads: 2\nseq_length: 64\n")
    words = [str(file), "--layers", "1", "--seeds", "1", "--out", str(out)]
    tool = runpy.run_path(str(ROOT / "tools" / "coord_check.py"))["main"]
    assert tool([*words, "--widths", "32", "64", "128"]) == 0
    shown = capsys.readouterr().out
    assert "µP: nothing grows" in shown
    assert "standard: grows: " in shown
    assert np.shape(json.loads(out.read_text())["µP"]["logits"]) == (5, 3)
    for widths, problem in ((["32"], "at least two"), (["31", "62"], "num_attention_heads")):
        with pytest.raises(ConfigError, match=problem):
            tool([*words, "--widths", *widths])
