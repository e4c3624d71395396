"""Which blocks of keys a block of queries sees, in the kinds of block-sparse attention.

The patterns and their settings are those of DeepSpeed's sparse attention (Child et al. 2019;
Zaheer et al. 2020; Beltagy et al. 2020), in their causal form: no block sees one behind itself,
and what a block sees does not depend on how long the sequence gets.  NumPy alone, so that a plan
can count what is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron.model.spec import Sparsity

BlockLayout = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """:class:`megatron.model.spec.Sparsity` with the defaults that GPT-NeoX gives."""

    block: int = 16
    different_layout_per_head: bool = False
    num_local_blocks: int | None = None
    num_global_blocks: int = 1
    num_different_global_patterns: int = 1
    num_random_blocks: int | None = None
    local_window_blocks: tuple[int, ...] = (4,)
    global_block_indices: tuple[int, ...] = (0,)
    global_block_end_indices: tuple[int, ...] | None = None
    num_sliding_window_blocks: int | None = None


DEFAULTS = Settings()


def block_layout(
    kind: str, spec: Sparsity, blocks: int, *, heads: Iterable[int], layer: int
) -> BlockLayout:
    """Return which block sees which, ``[heads, blocks, blocks]``, never one behind it.

    Args:
        kind: a name of :data:`PATTERNS`.
        spec: its settings.
        blocks: in the sequence.
        heads: their numbers in the layer.
        layer: number of the block of the model, which random blocks depend on (and not on the
            seed: they are part of the architecture).
    """
    make = PATTERNS[kind]
    return np.tril(np.stack([make(spec, blocks, head, layer) for head in heads]))


def _fixed(spec: Sparsity, blocks: int, head: int, layer: int) -> BlockLayout:
    row, column = np.indices((blocks, blocks))
    window = spec.num_local_blocks or 4
    first = window - (1 + head % spec.num_different_global_patterns) * spec.num_global_blocks
    place = column % window
    shared = (place >= first) & (place < first + spec.num_global_blocks)
    local: BlockLayout = row // window == column // window
    return local | shared


def _variable(spec: Sparsity, blocks: int, head: int, layer: int) -> BlockLayout:
    sizes = list(spec.local_window_blocks)
    sizes += [sizes[-1]] * blocks
    window = np.repeat(np.arange(len(sizes)), sizes)[:blocks]
    layout: BlockLayout = window[:, None] == window[None, :]
    layout[:, _global_blocks(spec, blocks)] = True
    return layout | _random(spec.num_random_blocks or 0, blocks, head, layer)


def _bigbird(spec: Sparsity, blocks: int, head: int, layer: int) -> BlockLayout:
    layout = _sliding(spec.num_sliding_window_blocks or 3, blocks)
    layout[: spec.num_global_blocks] = True
    layout[:, : spec.num_global_blocks] = True
    drawn = 1 if spec.num_random_blocks is None else spec.num_random_blocks
    return layout | _random(drawn, blocks, head, layer)


def _longformer(spec: Sparsity, blocks: int, head: int, layer: int) -> BlockLayout:
    layout = _sliding(spec.num_sliding_window_blocks or 3, blocks)
    shared = _global_blocks(spec, blocks)
    layout[shared] = True
    layout[:, shared] = True
    return layout


def _local(spec: Sparsity, blocks: int, head: int, layer: int) -> BlockLayout:
    return _sliding(spec.num_local_blocks or spec.num_sliding_window_blocks or 4, blocks)


def _sliding(width: int, blocks: int) -> BlockLayout:
    row, column = np.indices((blocks, blocks))
    near: BlockLayout = row - column <= width // 2
    return near


def _global_blocks(spec: Sparsity, blocks: int) -> list[int]:
    starts = spec.global_block_indices
    ends = spec.global_block_end_indices or [start + 1 for start in starts]
    return [
        block
        for start, end in zip(starts, ends, strict=True)
        for block in range(start, min(end, blocks))
    ]


def _random(count: int, blocks: int, head: int, layer: int) -> BlockLayout:
    """Draw ``count`` different blocks for every row among those up to itself."""
    from megatron.parallel.rng import generator  # brings torch, which most plans do without

    layout = np.zeros((blocks, blocks), dtype=np.bool_)
    for row in range(blocks if count else 0):
        draw = generator("sparse attention", layer, head, row)
        layout[row, draw.choice(row + 1, min(count, row + 1), replace=False)] = True
    return layout


PATTERNS: dict[str, Callable[[Sparsity, int, int, int], BlockLayout]] = {
    "local": _local,
    "sparse_fixed": _fixed,
    "sparse_variable": _variable,
    "bigbird": _bigbird,
    "bslongformer": _longformer,
}
"""Block patterns by the names that ``attention_config`` gives them."""
