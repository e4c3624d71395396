"""Batch arithmetic: micro-batch × accumulation × data-parallel size = global batch."""

from __future__ import annotations

from megatron.config.base import Count, Group
from megatron.errors import ConfigError


class BatchConfig(Group):
    """Batch sizes in samples; any of them may be left out as long as the rest says it."""

    train_batch_size: Count | None = None
    """Global batch in samples: what one optimizer step sees over all ranks."""
    train_micro_batch_size_per_gpu: Count | None = None
    """Samples that one rank puts through the model at a time."""
    gradient_accumulation_steps: Count | None = None
    """Micro-batches per rank and optimizer step."""


def resolve_batch(batch: BatchConfig, data_size: int) -> tuple[int, int, int]:
    """Work out ``(micro_batch, accumulation, global_batch)`` for ``data_size`` data ranks.

    With only the micro-batch given, accumulation is 1; with only the global batch given,
    the micro-batch is global ÷ ranks.

    Raises:
        ConfigError: the sizes contradict each other, or do not divide.
    """
    total = batch.train_batch_size
    micro = batch.train_micro_batch_size_per_gpu
    accumulation = batch.gradient_accumulation_steps
    if total is None:
        if micro is None:
            raise ConfigError(
                "no batch size: give train_micro_batch_size_per_gpu (samples per rank and "
                "pass) or train_batch_size (samples per optimizer step)"
            )
        accumulation = accumulation or 1
        return micro, accumulation, micro * accumulation * data_size
    if micro is not None:
        return micro, _divide(total, micro, accumulation, data_size), total
    per_rank = (accumulation or 1) * data_size
    if total % per_rank:
        raise ConfigError(
            f"train_batch_size ({total}) is not divisible by gradient_accumulation_steps "
            f"({accumulation or 1}) × data-parallel size ({data_size}) = {per_rank}; "
            f"{_neighbours(total, per_rank)}"
        )
    return total // per_rank, accumulation or 1, total


def _divide(total: int, micro: int, accumulation: int | None, data_size: int) -> int:
    """Return the accumulation that makes ``total``, checking the one that was given."""
    if accumulation is not None:
        product = micro * accumulation * data_size
        if product != total:
            raise ConfigError(
                f"train_batch_size ({total}) is not train_micro_batch_size_per_gpu ({micro}) × "
                f"gradient_accumulation_steps ({accumulation}) × data-parallel size "
                f"({data_size}) = {product}; leave one of the three out and it is worked out"
            )
        return accumulation
    per_pass = micro * data_size
    if total % per_pass:
        raise ConfigError(
            f"train_batch_size ({total}) is not divisible by train_micro_batch_size_per_gpu "
            f"({micro}) × data-parallel size ({data_size}) = {per_pass}; "
            f"{_neighbours(total, per_pass)}"
        )
    return total // per_pass


def _neighbours(total: int, unit: int) -> str:
    below, above = total // unit * unit, -(-total // unit) * unit
    return f"nearest that fit: {below} and {above}" if below else f"the least that fits is {above}"
