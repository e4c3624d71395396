"""Mixtures of experts beside a loop over tokens, and beside transformers' Mixtral."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron.model import GPT, DomainLoss, flops_per_token, param_groups, parameter_count
from megatron.model.accounting import active_parameter_count, layer_names
from megatron.model.block import TransformerBlock
from megatron.model.experts import MixtureOfExperts
from megatron.model.inventory import stage_inventory
from megatron.model.router import Routed, balance_loss, balanced
from megatron.parallel import Topology
from megatron.parallel.parameters import ParameterScope
from megatron.parallel.rng import DropoutRng
from tests.support.model_spec import TestSpec

SPEC = TestSpec(
    moe_num_experts=4, moe_top_k=2, moe_router_type="topk", moe_loss_coeff=0.01, vocab_size=96
)
GATED = dataclasses.replace(
    SPEC, activation="swiglu", intermediate_size=24, use_bias_in_mlp=False, norm="rmsnorm"
)
TOKENS = torch.arange(64).view(4, 16) * 7 % 96


def layer(spec: TestSpec, *, scale: float = 20.0) -> MixtureOfExperts:
    """Return experts alone, with a router that makes up its mind."""
    topology = Topology.single()
    rng = DropoutRng(seed=3, topology=topology)
    scope = ParameterScope(seed=3, topology=topology, name="layer")
    made = MixtureOfExperts(scope, spec, layer=0, rng=rng)
    with torch.no_grad():
        made.router.weight.mul_(scale)
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()))
    rng.begin(step=1, micro_batch=0)
    return made


def routed(made: MixtureOfExperts, x: torch.Tensor) -> Routed:
    return Routed(*made.router(x))


def inputs(rows: int = 3, length: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, length, SPEC.hidden_size, generator=generator)


def looped(made: MixtureOfExperts, spec: TestSpec, x: torch.Tensor) -> torch.Tensor:
    """Send one token after the other through one expert after the other."""
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for place in range(x.shape[1]):
            token = x[row, place]
            logits = made.router.weight @ token
            chances = logits.softmax(0)
            if spec.moe_router_type == "sinkhorn" and spec.moe_top_k == 1:
                chances = logits.sigmoid()
            weights, chosen = chances.sort(descending=True)
            weights = weights[: spec.moe_top_k]
            if spec.moe_normalize_expert_weights:
                weights = weights / weights.sum()
            for weight, number in zip(weights, chosen, strict=False):
                expert = made.experts[str(int(number))]
                first, second = expert.dense_h_to_4h, expert.dense_4h_to_h
                inner = F.linear(token, first.weight, first.bias)
                if spec.activation == "swiglu":
                    up, gate = inner.chunk(2)
                    inner = up * F.silu(gate)
                else:
                    inner = F.gelu(inner)
                out[row, place] += weight * F.linear(inner, second.weight, second.bias)
    return out


@pytest.mark.option("moe_top_k", "moe_normalize_expert_weights")
@pytest.mark.parametrize(
    "changes",
    [
        {"moe_top_k": 1},
        {"moe_top_k": 3, "moe_normalize_expert_weights": True},
        {"moe_top_k": 1, "moe_router_type": "sinkhorn"},
        {"moe_top_k": 2, "moe_router_type": "sinkhorn"},
        {"activation": "swiglu", "intermediate_size": 24, "use_bias_in_mlp": False},
    ],
    ids=str,
)
def test_a_loop_over_tokens_finds_the_same(changes: dict[str, Any]) -> None:
    spec = dataclasses.replace(SPEC, **changes)
    made, x = layer(spec).eval(), inputs().requires_grad_()
    y, loss = made(x)
    expected = looped(made, spec, x)
    assert loss is None
    assert torch.allclose(y, expected, atol=1e-6)
    parameters = [*made.parameters(), x]
    weight = torch.linspace(-1, 1, y.numel()).view_as(y)
    own = torch.autograd.grad((y * weight).sum(), parameters)
    other = torch.autograd.grad((expected * weight).sum(), parameters, allow_unused=True)
    for one, two in zip(own, other, strict=True):
        assert torch.allclose(one, torch.zeros_like(one) if two is None else two, atol=1e-5)


def test_a_token_knows_nothing_of_its_batch() -> None:
    model = GPT(SPEC, seed=1).eval()
    with torch.no_grad():
        whole = model(TOKENS)[0]
        for row in range(len(TOKENS)):
            assert torch.allclose(model(TOKENS[row : row + 1])[0][0], whole[row], atol=1e-6)
        assert torch.allclose(model(TOKENS[:, :5])[0], whole[:, :5], atol=1e-6)


@pytest.mark.option("moe_num_experts", "moe_expert_interval")
def test_which_blocks_have_experts() -> None:
    spec = dataclasses.replace(SPEC, num_layers=5, moe_expert_interval=2)
    model = GPT(spec, seed=1)
    found = [isinstance(one.mlp, MixtureOfExperts) for one in blocks(model)]
    assert found == [True, False, True, False, True]
    for dense in (0, 1):
        none = GPT(dataclasses.replace(spec, moe_num_experts=dense), seed=1)
        assert not any(isinstance(one.mlp, MixtureOfExperts) for one in blocks(none))


def blocks(model: GPT) -> list[TransformerBlock]:
    return [one for one in model.modules() if isinstance(one, TransformerBlock)]


def test_experts_are_drawn_by_their_own_names() -> None:
    held = dict(GPT(SPEC, seed=1).named_parameters())
    first, second = (held[f"1.mlp.experts.{n}.dense_h_to_4h.weight"] for n in (0, 1))
    assert not torch.equal(first, second)
    more = dict(GPT(dataclasses.replace(SPEC, moe_num_experts=8), seed=1).named_parameters())
    assert torch.equal(more["1.mlp.experts.1.dense_h_to_4h.weight"], second)


# Balance


@pytest.mark.option("moe_router_type")
def test_balanced_logits_ask_all_experts_alike() -> None:
    logits = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(1)) + torch.tensor(
        [4.0, 0.0, 0.0, 0.0]
    )
    plan = balanced(logits).float()
    assert torch.allclose(plan.sum(dim=1), torch.full((2, 4), 0.25), atol=1e-5)
    assert torch.allclose(balanced(logits[:1]).float(), plan[:1])
    # The routine of GPT-NeoX, on one sequence.
    cost = logits[0].exp()
    d0, d1 = torch.ones(12), 1 / (4 * cost.sum(0))
    for _ in range(3):
        d0 = 1 / 12 / ((d1 * cost).sum(1) + 1e-8)
        d1 = 1 / 4 / ((d0[:, None] * cost).sum(0) + 1e-8)
    assert torch.allclose(plan[0], d1 * cost * d0[:, None], atol=1e-6)


@pytest.mark.option("moe_router_type")
def test_sinkhorn_spreads_in_training_alone() -> None:
    spec = dataclasses.replace(SPEC, moe_router_type="sinkhorn", moe_top_k=1, moe_loss_coeff=0.0)
    made = layer(spec, scale=1.0)
    x = inputs(2, 16) * 0.1 + 1.0  # all tokens like the same expert best
    assert len(routed(made.eval(), x).experts.unique()) == 1
    counts = routed(made.train(), x).experts.flatten(1)
    for row in counts:
        assert torch.bincount(row, minlength=4).max() <= 8
    alone = routed(made, x[:1]).experts
    assert torch.equal(alone[0].flatten(), counts[0])
    topk = dataclasses.replace(spec, moe_router_type="topk")
    assert len(routed(layer(topk, scale=1.0).train(), x).experts.unique()) == 1


def test_the_balancing_loss_is_the_papers() -> None:
    chances = torch.rand(3, 10, 4, generator=torch.Generator().manual_seed(2)).softmax(-1)
    experts = chances.topk(2, dim=-1).indices
    expected = 0.0
    for row in range(3):
        for one in range(4):
            share = (experts[row] == one).sum() / 20
            expected += 4 * share * chances[row, :, one].mean() / 3
    found = balance_loss(chances, experts, 10, Topology.single())
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    alike = torch.full((1, 4, 4), 0.25)
    spread = torch.arange(4).view(1, 4, 1)
    assert float(balance_loss(alike, spread, 4, Topology.single())) == 1.0


LABELS = (TOKENS.roll(-1, 1), torch.ones(4, 16), torch.zeros(4, dtype=torch.int64))


def total(model: GPT, rows: slice = slice(None), micro: int = 0) -> torch.Tensor:
    """Return the loss of rows of the batch as a run weighs it."""
    model.dropout.begin(step=1, micro_batch=micro)
    part = [one[rows] for one in LABELS]
    weight = torch.full((len(part[0]),), 1 / (16 * len(part[0])))
    value = model(TOKENS[rows], (*part, weight))
    assert isinstance(value, torch.Tensor)
    return value


def built(spec: TestSpec, **arguments: Any) -> GPT:
    return GPT(spec, seed=1, loss_fn=DomainLoss(vocab_size=spec.vocab_size, **arguments))


def gradients(model: GPT, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.option("moe_loss_coeff", "moe_z_loss_coeff")
def test_coefficients_train_the_router_and_are_no_domains_loss() -> None:
    seen: list[torch.Tensor] = []
    bare = dataclasses.replace(SPEC, moe_loss_coeff=0.0)
    losses = {}
    for name, spec in {
        "bare": bare,
        "balance": dataclasses.replace(bare, moe_loss_coeff=0.5),
        "z": dataclasses.replace(bare, moe_z_loss_coeff=0.5),
    }.items():
        model = built(spec, observe=lambda total, *_: seen.append(total))
        losses[name] = total(model)
        taken = [one.mlp.load.take() for one in blocks(model)]
        z, balance = (sum(float(one[place]) for one in taken) for place in (-2, -3))
        expected = {"bare": 0.0, "balance": 0.5 * balance, "z": 0.5 * z}[name]
        assert (losses[name] - losses["bare"]).item() == pytest.approx(expected, rel=1e-4)
        assert [int(one[:4].sum()) for one in taken] == [4 * 16 * 2] * 2
    assert all(torch.equal(one, seen[0]) for one in seen)
    # Nobody but a training model carries it.
    assert len(built(SPEC)(TOKENS)) == 2
    assert torch.equal(total(built(SPEC).eval()), total(built(bare).eval()))


def test_micro_batches_make_up_the_batch() -> None:
    model = built(dataclasses.replace(SPEC, moe_loss_coeff=0.5, moe_z_loss_coeff=0.1))
    whole = gradients(model, total(model))
    parts = [total(model, slice(first, first + 2), first // 2) for first in (0, 2)]
    summed = gradients(model, (parts[0] + parts[1]) / 2)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, summed, strict=True))


def test_recomputation_changes_and_counts_nothing() -> None:
    spec = dataclasses.replace(SPEC, moe_loss_coeff=0.5, moe_jitter_eps=0.2, hidden_dropout=0.1)
    plain, again = (
        built(dataclasses.replace(spec, checkpoint_activations=on)) for on in (False, True)
    )
    first, second = gradients(plain, total(plain)), gradients(again, total(again))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for one, other in zip(blocks(plain), blocks(again), strict=True):
        assert torch.equal(one.mlp.load.take(), other.mlp.load.take())
        assert other.mlp.load.take() is None


@pytest.mark.option("moe_jitter_eps")
def test_jitter_is_a_function_of_the_token_and_the_step() -> None:
    spec = dataclasses.replace(SPEC, moe_jitter_eps=0.3)
    made, plain = layer(spec), layer(SPEC)
    x = inputs(4)

    def weights(one: MixtureOfExperts, x: torch.Tensor, step: int, micro: int) -> torch.Tensor:
        one.rng.begin(step=step, micro_batch=micro)
        return routed(one, x).weights

    whole = weights(made, x, 1, 0)
    assert not torch.equal(whole, weights(plain, x, 1, 0))
    assert torch.equal(whole, weights(made, x, 1, 0))
    assert not torch.equal(whole, weights(made, x, 2, 0))
    halves = [weights(made, x[2 * micro : 2 * micro + 2], 1, micro) for micro in (0, 1)]
    assert torch.allclose(torch.cat(halves), whole, atol=1e-6)
    noise = made.router._noise(x, 0.3)
    assert 0.7 <= noise.min() < 0.75
    assert 1.25 < noise.max() <= 1.3
    assert torch.equal(routed(made.eval(), x).weights, routed(plain.eval(), x).weights)


@pytest.mark.option("moe_lbl_in_fp32")
def test_the_balancing_loss_in_fp32() -> None:
    x = inputs(2, 64).bfloat16()
    narrow, wide = (
        routed(layer(dataclasses.replace(SPEC, moe_lbl_in_fp32=on)).bfloat16(), x)
        for on in (False, True)
    )
    assert narrow.balance.dtype == torch.bfloat16
    assert wide.balance.dtype == torch.float32
    assert torch.equal(narrow.experts, wide.experts)


# What there is of it


@pytest.mark.parametrize("spec", [SPEC, GATED], ids=["plain", "gated"])
def test_counts_are_those_of_the_model(spec: TestSpec) -> None:
    spec = dataclasses.replace(spec, num_layers=3, moe_expert_interval=2)
    model = GPT(spec, seed=1, device="meta")
    counts = [one.numel() for one in model.parameters()]
    assert parameter_count(spec) == sum(counts)
    assert [one.count for one in stage_inventory(spec, 0, 6)] == counts
    assert layer_names(spec)[1:4] == ["TransformerBlock"] * 3
    expert = sum(one.numel() for one in blocks(model)[0].mlp.experts["0"].parameters())
    assert active_parameter_count(spec) == sum(counts) - 2 * 2 * expert
    matrices = sum(
        one.numel()
        for block in blocks(model)
        for name, one in block.named_parameters()
        if one.dim() == 2 and "experts.2" not in name and "experts.3" not in name
    )
    attention = 3 * spec.hidden_size * 16
    assert flops_per_token(spec) == 6.0 * (matrices + 96 * spec.hidden_size + attention)
    groups = {group["name"]: group["params"] for group in param_groups(model, 0.1)}
    assert len(groups["decayed"]) == sum(one.dim() == 2 for one in model.parameters())


# Mixtral


def test_logits_are_those_of_mixtral() -> None:
    transformers = pytest.importorskip("transformers")
    spec = dataclasses.replace(
        GATED,
        moe_normalize_expert_weights=True,
        num_kv_heads=2,
        use_bias_in_attn_linear=False,
        no_weight_tying=True,
        rms_norm_epsilon=1e-5,
        moe_num_experts=4,
    )
    config = transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        sliding_window=None,
    )
    ours = GPT(spec, seed=1).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(3)
    theirs = transformers.MixtralForCausalLM(config).eval()
    theirs.load_state_dict(as_mixtral(dict(ours.named_parameters()), theirs.state_dict()))
    with torch.no_grad():
        hidden, weight = ours(TOKENS)
        assert (hidden @ weight[:96].T - theirs(TOKENS).logits).abs().max() < 1e-5


def as_mixtral(
    held: dict[str, torch.Tensor], names: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Name our parameters as transformers does."""
    made: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": held["0.word_embeddings.weight"][:96],
        "model.norm.weight": held["3.norm.scale"],
        "lm_head.weight": held["4.final_linear.weight"][:96],
    }
    for number in range(2):
        ours, theirs = f"{number + 1}", f"model.layers.{number}"
        q, k, v = held[f"{ours}.attention.query_key_value.weight"].split([32, 16, 16])
        made |= {
            f"{theirs}.self_attn.q_proj.weight": q,
            f"{theirs}.self_attn.k_proj.weight": k,
            f"{theirs}.self_attn.v_proj.weight": v,
            f"{theirs}.self_attn.o_proj.weight": held[f"{ours}.attention.dense.weight"],
            f"{theirs}.input_layernorm.weight": held[f"{ours}.input_layernorm.scale"],
            f"{theirs}.post_attention_layernorm.weight": held[
                f"{ours}.post_attention_layernorm.scale"
            ],
            f"{theirs}.mlp.gate.weight": held[f"{ours}.mlp.router.weight"],
        }
        experts = [f"{ours}.mlp.experts.{one}" for one in range(4)]
        first = [held[f"{one}.dense_h_to_4h.weight"] for one in experts]
        second = [held[f"{one}.dense_4h_to_h.weight"] for one in experts]
        # [up | gate] here, [gate | up] there.
        made[f"{theirs}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat(one.chunk(2)[::-1]) for one in first]
        )
        made[f"{theirs}.mlp.experts.down_proj"] = torch.stack(second)
    assert made.keys() == names.keys(), names.keys()
    return made
