"""Normalisation of the residual stream, always computed in float32 inside."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from megatron.errors import ConfigError, did_you_mean
from megatron.model.spec import ModelSpec
from megatron.parallel.parameters import ParameterScope, ones, zeros
from megatron.parallel.sequence import whole_gradients


class Norm(nn.Module):
    """What every norm is; its parameters do not decay."""


class LayerNorm(Norm):
    """Layer normalisation (Ba et al. 2016) with scale ``weight`` and shift ``bias``."""

    def __init__(
        self, scope: ParameterScope, *, hidden: int, epsilon: float, shifted: bool = True
    ) -> None:
        """Make a norm over the last dimension of size ``hidden``; ``shifted``: with a bias."""
        super().__init__()
        self.topology = scope.topology
        self.epsilon = epsilon
        self.weight = scope.parameter("weight", (hidden,), ones)
        self.bias = scope.parameter("bias", (hidden,), zeros) if shifted else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[…, hidden]``."""
        # torch accumulates mean and variance in float32 for half-precision inputs.
        if self.bias is None:
            (weight,) = whole_gradients(self.topology, self.weight)
            return F.layer_norm(x, weight.shape, weight, None, self.epsilon)
        weight, bias = whole_gradients(self.topology, self.weight, self.bias)
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


class NonParametricLayerNorm(Norm):
    """Layer normalisation without scale and shift (Groeneveld et al. 2024, OLMo)."""

    def __init__(self, *, hidden: int, epsilon: float) -> None:
        """Make a norm over the last dimension of size ``hidden``."""
        super().__init__()
        self.hidden = hidden
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[…, hidden]``."""
        return F.layer_norm(x, (self.hidden,), None, None, self.epsilon)


class RMSNorm(Norm):
    """Root-mean-square normalisation (Zhang and Sennrich 2019): x · scale / √(mean x² + ε).

    With ``outside`` it is x · scale / (√(mean x²) + ε), which GPT-NeoX computed before its
    version of 2024 (the data-mixing fork still does); Llama and GPT-NeoX today add ε inside.
    """

    def __init__(
        self, scope: ParameterScope, *, hidden: int, epsilon: float, outside: bool = False
    ) -> None:
        """Make a norm over the last dimension of size ``hidden``."""
        super().__init__()
        self.topology = scope.topology
        self.epsilon = epsilon
        self.outside = outside
        self.scale = scope.parameter("scale", (hidden,), ones)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[…, hidden]``."""
        (scale,) = whole_gradients(self.topology, self.scale)
        if not self.outside:
            return F.rms_norm(x, scale.shape, scale, self.epsilon)
        wide = _widened(x)
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / scale.numel() ** 0.5
        scaled: torch.Tensor = wide / (size + self.epsilon) * scale
        return scaled.to(x.dtype)


class ScaleNorm(Norm):
    """One scale for all: x · g / max(‖x‖, ε) (Nguyen and Salazar 2019, section 2.2).

    g starts at 1, as GPT-NeoX's does (the paper's starts at √hidden).
    """

    def __init__(self, scope: ParameterScope, *, epsilon: float) -> None:
        """Make a norm over the last dimension."""
        super().__init__()
        self.topology = scope.topology
        self.epsilon = epsilon
        self.g = scope.parameter("g", (1,), ones)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``[…, hidden]``."""
        (g,) = whole_gradients(self.topology, self.g)
        wide = _widened(x)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=self.epsilon)
        scaled: torch.Tensor = wide * (g / length)
        return scaled.to(x.dtype)


_NORMS: dict[str, Callable[[ParameterScope, ModelSpec, int], Norm]] = {
    "layernorm": lambda scope, spec, hidden: LayerNorm(
        scope, hidden=hidden, epsilon=spec.layernorm_epsilon, shifted=spec.use_bias_in_norms
    ),
    "non_parametric_layernorm": lambda scope, spec, hidden: NonParametricLayerNorm(
        hidden=hidden, epsilon=spec.layernorm_epsilon
    ),
    "rmsnorm": lambda scope, spec, hidden: RMSNorm(
        scope,
        hidden=hidden,
        epsilon=spec.rms_norm_epsilon,
        outside=spec.rms_norm_epsilon_outside_root,
    ),
    "scalenorm": lambda scope, spec, hidden: ScaleNorm(scope, epsilon=spec.scalenorm_epsilon),
}

NORMS = tuple(_NORMS)
"""Names that ``norm`` takes."""


def build_norm(scope: ParameterScope, spec: ModelSpec, *, hidden: int | None = None) -> Norm:
    """Make the norm that the architecture asks for.

    Args:
        scope: place of the norm in the model.
        spec: the architecture.
        hidden: size of what is normalised; None = ``spec.hidden_size``.

    Raises:
        ConfigError: there is no such norm.
    """
    if spec.norm not in _NORMS:
        raise ConfigError(
            f"norm is '{spec.norm}'{did_you_mean(spec.norm, NORMS)} (available: {', '.join(NORMS)})"
        )
    return _NORMS[spec.norm](scope, spec, hidden or spec.hidden_size)


def _widened(x: torch.Tensor) -> torch.Tensor:
    """Return half precision as float32, and anything wider as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
