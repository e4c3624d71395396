"""Micro-batches: windows of tokens, their mask, and the weight of every row in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megatron.data.reader import TokenReader
from megatron.errors import DataError

if TYPE_CHECKING:
    import torch

#: NumPy arrays, or pinned torch tensors from a loader with ``pin_memory``;
#: ``torch.as_tensor`` takes both without a copy.
Array: TypeAlias = "NDArray[Any] | torch.Tensor"

#: A whole window: the reader and the token at which it starts.
Start: TypeAlias = tuple[TokenReader, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """The rows that one data-parallel rank feeds to the model at once.

    The loss of the micro-batch is
    ``Σ_b sample_weight[b] · Σ_s loss_mask[b, s] · ℓ[b, s]``; averaged by the engine over
    micro-batches and data-parallel ranks, it is the mean over the global batch, each token
    weighted by the loss weight of its domain.

    Attributes:
        tokens: [B, S] int64, inputs.
        targets: [B, S] int64, ``targets[b, s]`` follows ``tokens[b, s]``.
        loss_mask: [B, S] float32, 1 where a token counts.
        domain_ids: [B] int64.
        sample_weight: [B] float32.
        reference: [B, S] float32, a reference model's loss of every target in nats, or None
            where nothing is compared with one.
    """

    tokens: Array
    targets: Array
    loss_mask: Array
    domain_ids: Array
    sample_weight: Array
    reference: Array | None = None


def read_windows(places: Sequence[Start], seq_length: int) -> NDArray[Any]:
    """Read windows of S+1 tokens.

    Args:
        places: n readers, each with the token at which the window starts.
        seq_length: S.

    Returns:
        [n, S+1] tokens, in the narrowest type that holds those of all readers.

    Raises:
        DataError: a file cannot be read.
    """
    dtypes = {reader.dtype for reader, _ in places}
    windows = np.empty((len(places), seq_length + 1), dtype=np.result_type(*dtypes, np.uint8))
    for row, (reader, start) in zip(windows, places, strict=True):
        if row.dtype == reader.dtype:
            reader.read_into(row, start)
        else:
            row[:] = reader.read(start, start + seq_length + 1)
    return windows


def make_micro_batch(
    windows: NDArray[Any],
    *,
    seq_length: int,
    domain_ids: NDArray[np.int64],
    sample_weight: NDArray[np.float64],
    labels: NDArray[np.int64] | None = None,
    masked_token: int | None = None,
    pin_memory: bool = False,
) -> MicroBatch:
    """Put windows together.

    Args:
        windows: [n, S+1] token ids, n ≤ B; rows missing at the end are padding, all masked and
            of weight 0.
        seq_length: S.
        domain_ids: [B] domains.
        sample_weight: [B] weights; of the padding, ignored.
        labels: [n, S] targets, negative where a token is not trained on; None = the tokens.
        masked_token: mask the loss wherever this token is the *input* (as GPT-NeoX's
            ``eod_mask_loss`` does): the first token of the next document is not predicted.
        pin_memory: make pinned torch tensors, which a device copies asynchronously.
    """
    rows, shape = domain_ids.size, (domain_ids.size, seq_length)
    tokens, tokens_array = _allocate(shape, np.int64, pin_memory)
    targets, targets_array = _allocate(shape, np.int64, pin_memory)
    mask, mask_array = _allocate(shape, np.float32, pin_memory)
    ids, ids_array = _allocate((rows,), np.int64, pin_memory)
    weight, weight_array = _allocate((rows,), np.float32, pin_memory)
    used = len(windows)
    tokens_array[:used] = windows[:, :-1]
    if labels is None:
        targets_array[:used], mask_array[:used] = windows[:, 1:], 1.0
    else:
        targets_array[:used], mask_array[:used] = np.maximum(labels, 0), labels >= 0
    tokens_array[used:] = targets_array[used:] = 0
    mask_array[used:] = 0.0
    if masked_token is not None:
        mask_array[:used][tokens_array[:used] == masked_token] = 0.0
    ids_array[:] = domain_ids
    weight_array[:] = sample_weight
    weight_array[used:] = 0.0
    return MicroBatch(
        tokens=tokens, targets=targets, loss_mask=mask, domain_ids=ids, sample_weight=weight
    )


def sample_weights(
    domain_ids: NDArray[Any],
    loss_weights: NDArray[np.float64] | None,
    domain_tokens: NDArray[np.int64],
    parts: int,
) -> NDArray[np.float64]:
    """Return the weight of each row in the loss of its micro-batch.

    ``loss_weight[domain] · parts ÷ Σ_k loss_weight[k] · domain_tokens[k]``: the engine averages
    over ``parts`` micro-batches, so their mean is the weighted mean over the global batch.

    Args:
        domain_ids: rows' domains, any shape.
        loss_weights: [K] weight of each token of a domain; ``None`` = 1.
        domain_tokens: [K] unmasked tokens of each domain in the global batch.
        parts: accumulation × data-parallel size.

    Returns:
        Weights in the shape of ``domain_ids``; zeros if no token of the global batch counts.
    """
    per_domain = np.ones(domain_tokens.size) if loss_weights is None else loss_weights
    denominator = float(per_domain @ domain_tokens)
    scale = parts / denominator if denominator else 0.0
    weights: NDArray[np.float64] = per_domain[domain_ids] * scale
    return weights


def check_token_ids(
    windows: NDArray[Any], names: Sequence[str], vocab_size: int | None, *, what: str = "token id"
) -> None:
    """Refuse ids that have no row in the embedding, which on a device would be a bare assertion.

    Args:
        windows: [n, S+1] token ids.
        names: of the n windows' domains.
        vocab_size: ids lie below it; ``None`` checks for negative ones only.
        what: the ids are, for the message.

    Raises:
        DataError: naming the domain, the id and the vocabulary.
    """
    wrong = windows < 0 if windows.dtype.kind == "i" and windows.min() < 0 else None
    if wrong is None and vocab_size is not None and windows.max() >= vocab_size:
        wrong = windows >= vocab_size
    if wrong is not None:
        row, column = np.argwhere(wrong)[0].tolist()
        raise DataError(
            f"domain '{names[row]}': {what} {windows[row, column]} is outside the vocabulary "
            f"of {vocab_size} tokens; its files were made with another tokenizer, or are "
            "damaged (tools/inspect_dataset.py --verify)"
        )


def _allocate(shape: tuple[int, ...], dtype: type[Any], pin_memory: bool) -> tuple[Array, Any]:
    """Return an uninitialised array or pinned tensor, and a NumPy view of it."""
    if not pin_memory:
        array = np.empty(shape, dtype=dtype)
        return array, array
    import torch

    kinds = {np.int64: torch.int64, np.float32: torch.float32}
    tensor = torch.empty(shape, dtype=kinds[dtype], pin_memory=True)
    return tensor, tensor.numpy()
