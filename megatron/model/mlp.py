"""The feed-forward part of a block, plain or gated."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from megatron.errors import ConfigError, did_you_mean
from megatron.model.init import initializer
from megatron.model.spec import GATED_ACTIVATIONS, ModelSpec, ffn_width
from megatron.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.parallel.parameters import ParameterScope

Activation = Callable[[torch.Tensor], torch.Tensor]


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": _tanh_gelu,
    "relu": F.relu,
    "softsign": F.softsign,
    "swish": F.silu,
    "silu": F.silu,
    "mish": F.mish,
    # Gated (Shazeer 2020): what the gate goes through.
    "geglu": F.gelu,
    "reglu": F.relu,
    "swiglu": F.silu,
    "glu": torch.sigmoid,
    "bilinear": _same,
}

ACTIVATIONS = tuple(_ACTIVATIONS)
"""Names that ``activation`` takes."""


def activation_function(name: str) -> Activation:
    """Return the activation called ``name``; of a gated one what the gate goes through.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in _ACTIVATIONS:
        raise ConfigError(
            f"activation is '{name}'{did_you_mean(name, _ACTIVATIONS)} "
            f"(available: {', '.join(_ACTIVATIONS)})"
        )
    return _ACTIVATIONS[name]


class FeedForward(nn.Module):
    """``dense_4h_to_h(act(dense_h_to_4h(x)))``; gated: ``[up | gate]``, up · act(gate).

    Which layers these are, and how ranks share them, is the subclass's.
    """

    dense_h_to_4h: nn.Module
    dense_4h_to_h: nn.Module

    def __init__(self, spec: ModelSpec) -> None:
        """Choose the activation.

        Raises:
            ConfigError: it is unknown.
        """
        super().__init__()
        self.activation = activation_function(spec.activation)
        self.gated = spec.activation in GATED_ACTIVATIONS

    def forward(self, x: torch.Tensor, **output: bool) -> torch.Tensor:
        """Map ``[…, hidden]`` (or this rank's part of the sequence) to the same shape.

        ``output`` is for the second layer, see :class:`megatron.parallel.layers.RowParallelLinear`.
        """
        inner = self.dense_h_to_4h(x)
        if self.gated:
            up, gate = inner.chunk(2, dim=-1)
            inner = up * self.activation(gate)
        else:
            inner = self.activation(inner)
        projected: torch.Tensor = self.dense_4h_to_h(inner, **output)
        return projected


class MLP(FeedForward):
    """The feed-forward part that every token goes through."""

    def __init__(self, scope: ParameterScope, spec: ModelSpec) -> None:
        """Make the MLP.

        Raises:
            ConfigError: the activation is unknown.
        """
        super().__init__(spec)
        width = ffn_width(spec)
        self.dense_h_to_4h = ColumnParallelLinear(
            scope.child("dense_h_to_4h"),
            inputs=spec.hidden_size,
            outputs=(width, width) if self.gated else (width,),
            initializer=initializer(spec.init_method, spec),
            bias=spec.use_bias_in_mlp,
        )
        self.dense_4h_to_h = RowParallelLinear(
            scope.child("dense_4h_to_h"),
            inputs=width,
            outputs=spec.hidden_size,
            initializer=initializer(
                spec.output_layer_init_method, spec, field="output_layer_init_method"
            ),
            bias=spec.use_bias_in_mlp,
        )
