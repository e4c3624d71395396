"""Optimizers, made here and handed to DeepSpeed as objects so that it compiles nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from megatron.engine.elementwise import Lion, Madgrad
from megatron.engine.fragments import flat_parts
from megatron.engine.sm3 import SM3, Groups, cover_of
from megatron.errors import ConfigError
from megatron.parallel.partition import Partition

_FUSED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
}
_PLAIN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "lion": Lion,
    "sgd": torch.optim.SGD,
    "sm3": SM3,
    "madgrad_wd": Madgrad,
}


def build_optimizer(
    groups: Iterable[Mapping[str, Any]],
    *,
    kind: str,
    lr: float,
    **params: Any,
) -> torch.optim.Optimizer:
    """Build the optimizer over parameter groups that carry their own ``weight_decay``.

    Args:
        groups: parameter groups, as ``megatron.model.gpt.param_groups`` gives them.
        kind: ``"adamw"`` (decoupled decay; what GPT-NeoX's ``Adam`` with weight decay is),
            ``"adam"`` (decay added to the gradient), ``"adam8bit"``, ``"lion"``, ``"sgd"``,
            ``"sm3"`` or ``"madgrad_wd"``.
        lr: peak learning rate.
        params: what the kind has beside, see ``megatron.config.optimizers``.

    Raises:
        ConfigError: the kind needs a package or a device that is not there.
    """
    taken = [dict(group) for group in groups]
    if kind == "adam8bit":
        return _eight_bit()(taken, lr=lr, **params)
    if kind in _FUSED:
        return _FUSED[kind](taken, lr=lr, fused=True, **params)
    return _PLAIN[kind](taken, lr=lr, **params)


def describe_flat_parts(
    optimizer: Any, partitions: Mapping[str, Partition | None], groups: Groups
) -> None:
    """Tell an optimizer that looks at shapes what DeepSpeed's flat parameters are made of.

    Args:
        optimizer: DeepSpeed's, around the one that was built here; for others nothing is done.
        partitions: how tensor ranks divide each parameter, by name.
        groups: of data ranks and of tensor ranks.
    """
    inner = getattr(optimizer, "optimizer", None)
    if not isinstance(inner, SM3):
        return
    cuts = {name: None if one is None else one.dim for name, one in partitions.items()}
    for part in flat_parts(optimizer):
        inner.describe(part.flat, cover_of(part, cuts, groups))


def _eight_bit() -> Callable[..., torch.optim.Optimizer]:
    """Return bitsandbytes' Adam with 8-bit state.

    Raises:
        ConfigError: there is no CUDA device, or no bitsandbytes.
    """
    remedy = "use optimizer: {type: Adam}, or Lion, which keeps half of Adam's state"
    if not torch.cuda.is_available():
        raise ConfigError(
            f"use_bnb_optimizer (Adam8bit) needs a CUDA device, and there is none; {remedy}"
        )
    try:
        from bitsandbytes.optim import Adam8bit
    except ImportError as error:
        raise ConfigError(
            "use_bnb_optimizer (Adam8bit) needs the package bitsandbytes, which is not installed "
            f"({error}); install it, or {remedy}"
        ) from error
    return Adam8bit  # type: ignore[no-any-return]
