"""The parallel layers' twins on one process, of torch's own modules and written-out formulas.

Each is built from weights that were gathered from the tensor ranks; parameter names are those
of the layer it stands for, so that gradients can be compared by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from megatron.model.attention import build_rotary
from tests.support.model_spec import TestSpec

Weights = Mapping[str, torch.Tensor]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "swiglu": F.silu,
}


def linear(weights: Weights) -> nn.Linear:
    rows, columns = weights["weight"].shape
    module = nn.Linear(columns, rows, bias="bias" in weights, dtype=weights["weight"].dtype)
    module.load_state_dict(dict(weights))
    return module


def below(weights: Weights, name: str) -> dict[str, torch.Tensor]:
    """Return the weights of the sub-module ``name``."""
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)
    }


class DenseAttention(nn.Module):
    def __init__(self, weights: Weights, spec: TestSpec) -> None:
        super().__init__()
        self.spec = spec
        self.query_key_value = linear(below(weights, "query_key_value"))
        self.dense = linear(below(weights, "dense"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, groups = self.spec.num_attention_heads, self.spec.num_kv_heads
        size = self.spec.hidden_size // heads
        fused = self.query_key_value(x)
        if groups is None or groups == heads:
            query, key, value = fused.unflatten(-1, (heads, 3, size)).unbind(-2)
        else:
            query, key, value = (
                part.unflatten(-1, (-1, size))
                for part in fused.split([heads * size, groups * size, groups * size], dim=-1)
            )
            key, value = (part.repeat_interleave(heads // groups, dim=2) for part in (key, value))
        query, key = self._turned(query), self._turned(key)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(size)
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        chances = scores.masked_fill(future, -math.inf).softmax(dim=-1)
        return self.dense(torch.einsum("bhqk,bkhd->bqhd", chances, value).flatten(2))

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply pairs (i, i + half) as complex numbers by e^(i·angle)."""
        rotary = build_rotary(self.spec)
        if rotary is None:
            return x
        half = rotary.dimensions // 2
        cos, sin = rotary.table(x.shape[1], x.device)
        turn = torch.complex(cos.to(x.dtype), sin.to(x.dtype))[:, None, :]
        pairs = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous())
        turned = pairs * turn
        return torch.cat([turned.real, turned.imag, x[..., 2 * half :]], dim=-1)


class DenseMLP(nn.Module):
    def __init__(self, weights: Weights, spec: TestSpec) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.gated = spec.activation == "swiglu"
        self.dense_h_to_4h = linear(below(weights, "dense_h_to_4h"))
        self.dense_4h_to_h = linear(below(weights, "dense_4h_to_h"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.dense_h_to_4h(x)
        if self.gated:
            up, gate = inner.chunk(2, dim=-1)
            return self.dense_4h_to_h(up * self.activation(gate))
        return self.dense_4h_to_h(self.activation(inner))


def norm(weights: Weights, spec: TestSpec) -> nn.Module:
    if spec.norm == "layernorm":
        return _LayerNorm(weights, spec)
    return _RMSNorm(weights, spec)


class _LayerNorm(nn.LayerNorm):
    def __init__(self, weights: Weights, spec: TestSpec) -> None:
        dtype = weights["weight"].dtype
        super().__init__(spec.hidden_size, eps=spec.layernorm_epsilon, dtype=dtype)
        self.load_state_dict(dict(weights))


class _RMSNorm(nn.Module):
    def __init__(self, weights: Weights, spec: TestSpec) -> None:
        super().__init__()
        self.scale = nn.Parameter(weights["scale"].clone())
        self.epsilon = spec.rms_norm_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + self.epsilon).sqrt() * self.scale


class DenseBlock(nn.Module):
    def __init__(self, weights: Weights, spec: TestSpec) -> None:
        super().__init__()
        self.parallel = spec.gpt_j_residual
        self.input_layernorm = norm(below(weights, "input_layernorm"), spec)
        self.attention = DenseAttention(below(weights, "attention"), spec)
        self.post_attention_layernorm = norm(below(weights, "post_attention_layernorm"), spec)
        self.mlp = DenseMLP(below(weights, "mlp"), spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attended = x + self.attention(self.input_layernorm(x))
        source = x if self.parallel else attended
        return attended + self.mlp(self.post_attention_layernorm(source))
