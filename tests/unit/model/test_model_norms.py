"""Norms and activations beside plain formulas and Hugging Face's modules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron.errors import ConfigError
from megatron.model import GPT
from megatron.model.mlp import ACTIVATIONS, MLP
from megatron.model.norm import build_norm
from megatron.parallel import Topology
from megatron.parallel.parameters import ParameterScope
from tests.support.model_spec import TestSpec

X = 3 * torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)) + 1


def _scope() -> ParameterScope:
    return ParameterScope(seed=1, topology=Topology.single())


def _norm(**changes: object) -> torch.nn.Module:
    norm = build_norm(_scope(), TestSpec(**changes))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return norm


def _plain(name: str, norm: torch.nn.Module, x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The formulas of the papers, with an epsilon large enough to tell where it stands."""
    square = x.square().mean(dim=-1, keepdim=True)
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
    if name == "layernorm":
        return centred / deviation * norm.weight + norm.bias
    if name == "layernorm without bias":
        return centred / deviation * norm.weight
    if name == "non_parametric_layernorm":
        return centred / deviation
    if name == "rmsnorm":
        return x / (square + epsilon).sqrt() * norm.scale
    if name == "rmsnorm outside":
        return x / (square.sqrt() + epsilon) * norm.scale
    return norm.g * x / x.norm(dim=-1, keepdim=True).clamp(min=epsilon)


@pytest.mark.option(
    "norm", "layernorm_epsilon", "rms_norm_epsilon", "scalenorm_epsilon", "use_bias_in_norms"
)
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("layernorm", {}),
        ("layernorm without bias", {"use_bias_in_norms": False}),
        ("non_parametric_layernorm", {}),
        ("rmsnorm", {}),
        ("rmsnorm outside", {"rms_norm_epsilon_outside_root": True}),
        ("scalenorm", {}),
    ],
)
def test_norms_are_their_formulas(name: str, changes: dict[str, object]) -> None:
    epsilons = {"layernorm_epsilon": 0.3, "rms_norm_epsilon": 0.4, "scalenorm_epsilon": 12.0}
    norm = _norm(norm=name.split()[0], **epsilons, **changes)
    kind = "layernorm" if "layer" in name else name.split()[0].replace("rmsnorm", "rms_norm")
    epsilon = epsilons[f"{kind}_epsilon"]
    # Some vectors are shorter than scalenorm's least length, some longer.
    x = (X * torch.linspace(0.1, 1, 5)[:, None]).requires_grad_()
    own = x.detach().clone().requires_grad_()
    found, expected = norm(own), _plain(name, norm, x, epsilon)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(own.grad, x.grad, rtol=1e-5, atol=1e-5)
    half = norm.bfloat16()(own.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), found.detach(), rtol=0.03, atol=0.03)


def test_olmos_norm() -> None:
    olmo = pytest.importorskip("transformers.models.olmo.modeling_olmo")
    found = _norm(norm="non_parametric_layernorm")(X)
    torch.testing.assert_close(found, olmo.OlmoLayerNorm(32)(X), rtol=1e-6, atol=1e-6)


def test_an_unknown_norm_is_named() -> None:
    with pytest.raises(ConfigError, match=r"norm is 'scalenom'.*scalenorm"):
        _norm(norm="scalenom")


PLAIN = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
    "relu": lambda x: x.clamp(min=0),
    "softsign": lambda x: x / (1 + x.abs()),
    "swish": lambda x: x / (1 + torch.exp(-x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    "geglu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "reglu": lambda x: x.clamp(min=0),
    "swiglu": lambda x: x / (1 + torch.exp(-x)),
    "glu": lambda x: 1 / (1 + torch.exp(-x)),
    "bilinear": lambda x: x,
}


@pytest.mark.option("activation", "intermediate_size")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_their_formulas(name: str) -> None:
    mlp = MLP(_scope(), TestSpec(activation=name, intermediate_size=24, init_method_std=0.3))
    inner = F.linear(X, mlp.dense_h_to_4h.weight, mlp.dense_h_to_4h.bias)
    if inner.shape[-1] == 48:
        up, gate = inner.split(24, dim=-1)
        inner = up * PLAIN[name](gate)
    else:
        inner = PLAIN[name](inner)
    expected = F.linear(inner, mlp.dense_4h_to_h.weight, mlp.dense_4h_to_h.bias)
    torch.testing.assert_close(mlp(X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.option("gpt_j_tied")
def test_tied_norms_are_one_norm_for_both() -> None:
    spec = TestSpec(gpt_j_residual=True, gpt_j_tied=True)
    model = GPT(spec, seed=3)
    block = model.get_submodule("1")
    assert not [name for name, _ in block.named_parameters() if "post_attention" in name]
    with torch.no_grad():
        block.input_layernorm.weight.mul_(1.7)
    normalised = block.input_layernorm(X)
    expected = X + block.attention(normalised) + block.mlp(normalised)
    torch.testing.assert_close(block(X), expected, rtol=1e-6, atol=1e-6)
    apart = GPT(TestSpec(gpt_j_residual=True), seed=3).get_submodule("1")
    assert "post_attention_layernorm.weight" in dict(apart.named_parameters())
