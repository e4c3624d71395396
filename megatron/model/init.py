"""How weights start (the method names of GPT-NeoX)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from megatron.errors import ConfigError, did_you_mean
from megatron.model.mup import width_multiplier
from megatron.model.spec import ModelSpec
from megatron.parallel.parameters import Initializer


def normal(std: float) -> Initializer:
    """Return an initializer that draws from N(0, std²)."""

    def draw(shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
        values = generator.standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(values).mul_(std)

    return draw


def xavier_normal() -> Initializer:
    """Return N(0, 2/(inputs + outputs)) (Glorot and Bengio 2010, equation 16)."""

    def draw(shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
        return normal(math.sqrt(2.0 / (shape[0] + shape[1])))(shape, generator)

    return draw


def xavier_uniform() -> Initializer:
    """Return U(−a, a), a = √(6/(inputs + outputs)) (Glorot and Bengio 2010, equation 16)."""

    def draw(shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
        bound = math.sqrt(6.0 / (shape[0] + shape[1]))
        values = generator.random(shape, dtype=np.float32)
        return torch.from_numpy(values).mul_(2 * bound).sub_(bound)

    return draw


def orthogonal(gain: float) -> Initializer:
    """Return a semi-orthogonal matrix times ``gain`` (Saxe et al. 2013)."""

    def draw(shape: tuple[int, ...], generator: np.random.Generator) -> torch.Tensor:
        rows, columns = shape
        tall = (max(rows, columns), min(rows, columns))
        q, r = torch.linalg.qr(torch.from_numpy(generator.standard_normal(tall, np.float32)))
        # Without the signs of R's diagonal Q would not be uniformly distributed.
        q = q * torch.sign(torch.diagonal(r))
        matrix: torch.Tensor = (q if rows >= columns else q.T).mul(gain).contiguous()
        return matrix

    return draw


# Of the architecture, and of the width that counts.
_METHODS: dict[str, Callable[[ModelSpec, int], Initializer]] = {
    "normal": lambda spec, width: normal(spec.init_method_std),
    "scaled_normal": lambda spec, width: normal(
        spec.init_method_std / math.sqrt(2.0 * spec.num_layers)
    ),
    "single_residual_scaled_normal": lambda spec, width: normal(
        spec.init_method_std / math.sqrt(spec.num_layers)
    ),
    "orthogonal": lambda spec, width: orthogonal(math.sqrt(2.0)),
    "scaled_orthogonal": lambda spec, width: orthogonal(math.sqrt(2.0 / spec.num_layers)),
    "xavier_uniform": lambda spec, width: xavier_uniform(),
    "xavier_normal": lambda spec, width: xavier_normal(),
    # GPT-J (Wang): 2 / (L √h); Nguyen and Salazar 2019: √(2 / 5h).
    "wang_init": lambda spec, width: normal(2.0 / spec.num_layers / math.sqrt(width)),
    "small_init": lambda spec, width: normal(math.sqrt(2.0 / (5.0 * width))),
}

WIDTH_AWARE = frozenset(
    {
        "normal",
        "scaled_normal",
        "single_residual_scaled_normal",
        "wang_init",
        "small_init",
    }
)
"""Methods that draw with a standard deviation that is known beforehand."""

INIT_METHODS = tuple(_METHODS)
"""Names that ``init_method`` and ``output_layer_init_method`` take."""


def initializer(
    name: str, spec: ModelSpec, *, field: str = "init_method", hidden: bool = True
) -> Initializer:
    """Return the initializer called ``name`` for a model of this shape.

    Under µP the method draws what it would for the base model, times ``mup_init_scale``, and for
    a matrix between hidden layers over the root of the width's multiple.

    Args:
        name: of the method.
        spec: the architecture.
        field: that names it.
        hidden: whether both sides of the matrix grow with the width (not with an embedding).

    Raises:
        ConfigError: there is no such method; the message names ``field``.
    """
    if name not in _METHODS:
        raise ConfigError(
            f"{field} is '{name}'{did_you_mean(name, _METHODS)} (available: {', '.join(_METHODS)})"
        )
    if not spec.use_mup:
        return _METHODS[name](spec, spec.hidden_size)
    if name not in WIDTH_AWARE:
        raise ConfigError(
            f"{field} '{name}' has no scale that µP could set; use {', '.join(sorted(WIDTH_AWARE))}"
        )
    times = width_multiplier(spec)
    drawn = _METHODS[name](spec, round(spec.hidden_size / times))
    factor = spec.mup_init_scale / (math.sqrt(times) if hidden else 1.0)
    return lambda shape, generator: drawn(shape, generator).mul_(factor)
