"""Micro-batches from the host to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from megatron.data.batch import MicroBatch

Labels = tuple[torch.Tensor, ...]


def to_device(batch: MicroBatch, device: torch.device) -> tuple[torch.Tensor, Labels]:
    """Copy one micro-batch, asynchronously where the host memory is pinned.

    Returns:
        tokens [B, S], and the labels (targets [B, S], loss_mask [B, S], domain_ids [B],
        sample_weight [B] and, where there is a reference, its losses [B, S]) in the order that
        the loss function takes them.
    """
    tokens, *labels = (
        torch.as_tensor(part).to(device, non_blocking=True)
        for part in (
            batch.tokens,
            batch.targets,
            batch.loss_mask,
            batch.domain_ids,
            batch.sample_weight,
            batch.reference,
        )
        if part is not None
    )
    return tokens, tuple(labels)


def all_to_device(
    batches: Iterable[MicroBatch], device: torch.device
) -> Iterator[tuple[torch.Tensor, Labels]]:
    """Copy micro-batches one by one, as they are asked for."""
    for batch in batches:
        yield to_device(batch, device)
