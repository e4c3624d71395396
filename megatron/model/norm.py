"""Normalisation of the residual stream, always computed in float32 inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from megatron.errors import ConfigError
from megatron.model.spec import ModelSpec
from megatron.parallel.parameters import ParameterScope, ones, zeros
from megatron.parallel.sequence import whole_gradients


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) with scale ``weight`` and shift ``bias``."""

    def __init__(self, scope: ParameterScope, *, hidden: int, epsilon: float) -> None:
        """Make a norm over the last dimension of size ``hidden``."""
        super().__init__()
        self.topology = scope.topology
        self.epsilon = epsilon
        self.weight = scope.parameter("weight", (hidden,), ones)
        self.bias = scope.parameter("bias", (hidden,), zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[…, hidden]``."""
        # torch accumulates mean and variance in float32 for half-precision inputs.
        weight, bias = whole_gradients(self.topology, self.weight, self.bias)
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich 2019): x · scale / √(mean x² + ε)."""

    def __init__(self, scope: ParameterScope, *, hidden: int, epsilon: float) -> None:
        """Make a norm over the last dimension of size ``hidden``."""
        super().__init__()
        self.topology = scope.topology
        self.epsilon = epsilon
        self.scale = scope.parameter("scale", (hidden,), ones)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[…, hidden]``."""
        (scale,) = whole_gradients(self.topology, self.scale)
        return F.rms_norm(x, scale.shape, scale, self.epsilon)


def build_norm(scope: ParameterScope, spec: ModelSpec) -> LayerNorm | RMSNorm:
    """Make the norm that the architecture asks for.

    Raises:
        ConfigError: ``norm`` is neither "layernorm" nor "rmsnorm".
    """
    if spec.norm == "layernorm":
        return LayerNorm(scope, hidden=spec.hidden_size, epsilon=spec.layernorm_epsilon)
    if spec.norm == "rmsnorm":
        return RMSNorm(scope, hidden=spec.hidden_size, epsilon=spec.rms_norm_epsilon)
    raise ConfigError(f"norm is '{spec.norm}'; available: layernorm, rmsnorm")
