"""How many keys a query sees on average: what attention needs, whatever computes it."""

from __future__ import annotations

import numpy as np

from megatron.model.block_layouts import DEFAULTS, PATTERNS, block_layout
from megatron.model.spec import MIXERS, ModelSpec, attention_types


def seen_keys(spec: ModelSpec, layer: int) -> float:
    """Return the mean number of keys that a query of a block sees in a whole window of tokens.

    Keys within ``sliding_window_width`` and within the blocks of a sparse pattern count, the mean
    is over queries and heads.  A query's own key counts half, so that plain causal attention is
    s / 2, as in Narayanan et al. 2021.  Ends of documents (``reset_attention_mask``) depend on the
    data and are not counted; nor is what a kernel computes and then masks.

    Args:
        spec: the architecture.
        layer: number of the block, counted from 0.
    """
    length = spec.seq_length or 0
    kind, window = attention_types(spec)[layer], spec.sliding_window_width
    if kind in MIXERS or not length:
        return length / 2
    # Further than all others lies the first token.
    reach = length - 1 if window is None else min(window, length - 1)
    if kind not in PATTERNS:
        pairs = (reach + 1) * length - reach * (reach + 1) / 2
    else:
        pairs = _pairs_in_blocks(spec, kind, layer, length, reach)
    return (pairs - length / 2) / length


def _pairs_in_blocks(spec: ModelSpec, kind: str, layer: int, length: int, reach: int) -> float:
    """Return the pairs of a query and a key that it sees, as a mean over heads."""
    settings = spec.sparsity_config or DEFAULTS
    block = settings.block
    heads = range(spec.num_attention_heads if settings.different_layout_per_head else 1)
    layout = block_layout(kind, settings, -(-length // block), heads=heads, layer=layer)
    share = layout.mean(axis=0)
    pairs = 0.0
    for row in range(len(share)):
        query = np.arange(row * block, min((row + 1) * block, length))[:, None]
        first = block * np.arange(row + 1)
        seen = np.minimum(first + block - 1, query) - np.maximum(first, query - reach) + 1
        pairs += float(share[row, : row + 1] @ seen.clip(min=0).sum(axis=0))
    return pairs
