"""Optimizers, made here and handed to DeepSpeed as objects so that it compiles nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch


def build_optimizer(
    groups: Iterable[Mapping[str, Any]],
    *,
    kind: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """Build the optimizer over parameter groups that carry their own ``weight_decay``.

    Args:
        groups: parameter groups, as ``megatron.model.accounting.param_groups`` gives them.
        kind: ``"adamw"`` (decoupled decay; what GPT-NeoX's ``Adam`` with weight decay is)
            or ``"adam"`` (decay added to the gradient).
        lr: peak learning rate.
        betas: coefficients of the running means.
        eps: added to the denominator.
    """
    make: type[torch.optim.Adam] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[kind]
    return make([dict(group) for group in groups], lr=lr, betas=betas, eps=eps, fused=True)
