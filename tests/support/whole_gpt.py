"""The whole model on one process, which divided ones are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron.model import GPT, param_groups

Batch = tuple[torch.Tensor, tuple[torch.Tensor, ...]]


def train_whole(
    model: GPT, batch: Callable[[int], Batch]
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train three steps of two micro-batches; return losses and weights.

    Args:
        model: with a loss.
        batch: makes micro-batch ``10 * step + micro``.
    """
    optimizer = torch.optim.AdamW(param_groups(model, 0.1), lr=1e-2, eps=1e-3)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = sum(model(*batch(10 * step + micro)) for micro in range(2)) / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value.detach() for name, value in model.named_parameters()}
