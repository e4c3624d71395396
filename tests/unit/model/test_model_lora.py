"""Low-rank updates against peft's, and what is trained, counted and drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from support.hugging import gpt_neox
from support.model_spec import TestSpec

from megatron.model.accounting import flops_per_token, parameter_count
from megatron.model.gpt import GPT, param_groups
from megatron.model.inventory import is_trained, stage_inventory

ALL = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


@dataclass(frozen=True, kw_only=True)
class Settings:
    rank: int = 4
    alpha: float = 12.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ALL


def _spec(**changes) -> TestSpec:
    return TestSpec(vocab_size=96, no_weight_tying=True, lora=Settings(), **changes)


def _tokens() -> torch.Tensor:
    return torch.randint(0, 96, (3, 17), generator=torch.Generator().manual_seed(2))


def _loss(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    hidden, weight = model(tokens[:, :-1])
    return torch.nn.functional.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), tokens[:, 1:].flatten()
    )


@pytest.mark.parametrize("parallel", [False, True])
def test_equals_peft(parallel):
    peft = pytest.importorskip("peft")
    spec = _spec(gpt_j_residual=parallel)
    model = GPT(spec, seed=3).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora.b"):
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    plain = GPT(replace(spec, lora=None), seed=3).eval()
    theirs = peft.get_peft_model(
        gpt_neox(plain, spec, longest=64),
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(ALL), bias="none"),
    )
    place = {"query_key_value": "attention", "dense": "attention"}
    pairs = {}
    for layer in range(spec.num_layers):
        for target in ALL:
            path = f"{place.get(target, 'mlp')}.{target}"
            ours = model.get_submodule(f"{layer + 1}.{path}").lora
            other = theirs.base_model.model.gpt_neox.layers[layer].get_submodule(path)
            with torch.no_grad():
                other.lora_A["default"].weight.copy_(ours.a)
                other.lora_B["default"].weight.copy_(ours.b)
            pairs[path, layer] = (
                (ours.a, other.lora_A["default"].weight),
                (ours.b, other.lora_B["default"].weight),
            )
    tokens = _tokens()
    loss = _loss(model, tokens)
    reference = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, reference, rtol=0, atol=1e-6)
    loss.backward()
    reference.backward()
    for (path, layer), both in pairs.items():
        for ours, other in both:
            torch.testing.assert_close(
                ours.grad, other.grad, rtol=1e-4, atol=1e-7, msg=f"{path} of layer {layer}"
            )
    # Nothing else has a gradient.
    assert {name for name, one in model.named_parameters() if one.grad is not None} == {
        name for name, one in model.named_parameters() if ".lora." in name
    }


def test_training_starts_from_the_model_as_it_is():
    spec = _spec()
    with_updates, plain = GPT(spec, seed=3).eval(), GPT(replace(spec, lora=None), seed=3).eval()
    assert torch.equal(_loss(with_updates, _tokens()), _loss(plain, _tokens()))


def test_updates_added_to_the_weights_give_the_same():
    spec = _spec()
    model = GPT(spec, seed=3).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora.b"):
                value.normal_(std=0.1)
    before = _loss(model, _tokens())
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "lora", None) is not None:
                module.weight += module.lora.product()
                module.lora = None
    torch.testing.assert_close(_loss(model, _tokens()), before, rtol=0, atol=1e-5)


def test_what_is_counted():
    spec = _spec()
    model = GPT(spec, seed=3, device="meta")
    inventory = stage_inventory(spec, 0, spec.num_layers + 3)
    trained = [one.count for one in inventory if is_trained(spec, one)]
    (group,) = param_groups(model, 0.1)
    assert [one.numel() for one in group["params"]] == trained
    assert parameter_count(spec) == sum(one.numel() for one in model.parameters())
    # Forward and backward through what is frozen, and the updates' own gradients beside.
    full = flops_per_token(replace(spec, lora=None))
    attention = 6 * spec.num_layers * spec.hidden_size * spec.seq_length
    assert flops_per_token(spec) == (full - attention) * 4 / 6 + attention + 6 * sum(trained)


def test_dropout_is_of_the_updates_inputs():
    spec = _spec()
    model = GPT(replace(spec, lora=Settings(dropout=0.5)), seed=3)
    model.dropout.begin(step=0, micro_batch=0)
    first = _loss(model, _tokens())
    assert torch.equal(first, _loss(GPT(spec, seed=3), _tokens()))  # B is zero
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("lora.b"):
                value.fill_(0.1)
    again = _loss(model, _tokens())
    assert torch.equal(again, _loss(model, _tokens()))
    model.dropout.begin(step=1, micro_batch=0)
    assert not torch.equal(again, _loss(model, _tokens()))
    model.eval()
    assert not torch.equal(again, _loss(model, _tokens()))
