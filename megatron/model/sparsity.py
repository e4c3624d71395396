"""Block-sparse attention: which blocks of keys each block of queries sees.

The patterns and their settings are those of DeepSpeed's sparse attention (Child et al. 2019;
Zaheer et al. 2020; Beltagy et al. 2020), in their causal form: no block sees one behind itself,
and what a block sees does not depend on how long the sequence gets.  Blocks are counted from the
beginning of the document where attention ends with it, otherwise from the window's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron.model.spec import Sparsity
from megatron.parallel.rng import generator
from megatron.parallel.topology import Topology

Layout = NDArray[np.bool_]


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


class BlockPattern:
    """The pattern of one layer, for this tensor rank's heads.

    Attributes:
        kind: patterns with the same are the same: the name, and the layer where blocks are drawn.
    """

    def __init__(
        self, kind: str, spec: Sparsity, *, heads: int, layer: int, topology: Topology
    ) -> None:
        """Make the pattern.

        Args:
            kind: a name of :data:`PATTERNS`.
            spec: its settings.
            heads: of the layer, on all tensor ranks together.
            layer: number of the block, which random blocks depend on (and not on the seed: they
                are part of the architecture).
            topology: decides which heads are this rank's.
        """
        self._kind, self._spec, self._layer = kind, spec, layer
        draws = kind == "bigbird" or (kind == "sparse_variable" and bool(spec.num_random_blocks))
        self.kind = (kind, layer if draws else None)
        own = heads // topology.tensor_size
        first = topology.tensor_rank * own
        self._heads = range(first, first + own) if spec.different_layout_per_head else range(1)
        self._layouts: dict[tuple[int, torch.device], torch.Tensor] = {}

    def seen(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Tell which keys are in a block that the query's block sees.

        Args:
            query: places of the queries, int64 ``[B, S]``.
            key: places of the keys, int64 ``[B, S, K]`` or less by broadcasting; those behind a
                query, or before place 0, get whatever answer.

        Returns:
            bool ``[B, heads or 1, S, K]``.
        """
        block = self._spec.block
        row, column = query[..., None] // block, (key // block).clamp(min=0)
        blocks = int(max(row.max(), column.max())) + 1
        place = (blocks, query.device)
        if place not in self._layouts:
            layout = torch.from_numpy(self.layout(blocks)).to(query.device)
            self._layouts = {place: layout}
        return self._layouts[place][:, row, column].movedim(0, 1)

    def layout(self, blocks: int) -> Layout:
        """Return which block sees which, ``[heads or 1, blocks, blocks]``, never one behind it."""
        make = PATTERNS[self._kind]
        every = [make(self._spec, blocks, head, self._layer) for head in self._heads]
        return np.tril(np.stack(every))


def _fixed(spec: Sparsity, blocks: int, head: int, layer: int) -> Layout:
    row, column = np.indices((blocks, blocks))
    window = spec.num_local_blocks or 4
    first = window - (1 + head % spec.num_different_global_patterns) * spec.num_global_blocks
    place = column % window
    shared = (place >= first) & (place < first + spec.num_global_blocks)
    local: Layout = row // window == column // window
    return local | shared


def _variable(spec: Sparsity, blocks: int, head: int, layer: int) -> Layout:
    sizes = list(spec.local_window_blocks)
    sizes += [sizes[-1]] * blocks
    window = np.repeat(np.arange(len(sizes)), sizes)[:blocks]
    layout: Layout = window[:, None] == window[None, :]
    layout[:, _global_blocks(spec, blocks)] = True
    return layout | _random(spec.num_random_blocks or 0, blocks, head, layer)


def _bigbird(spec: Sparsity, blocks: int, head: int, layer: int) -> Layout:
    layout = _sliding(spec.num_sliding_window_blocks or 3, blocks)
    layout[: spec.num_global_blocks] = True
    layout[:, : spec.num_global_blocks] = True
    drawn = 1 if spec.num_random_blocks is None else spec.num_random_blocks
    return layout | _random(drawn, blocks, head, layer)


def _longformer(spec: Sparsity, blocks: int, head: int, layer: int) -> Layout:
    layout = _sliding(spec.num_sliding_window_blocks or 3, blocks)
    shared = _global_blocks(spec, blocks)
    layout[shared] = True
    layout[:, shared] = True
    return layout


def _local(spec: Sparsity, blocks: int, head: int, layer: int) -> Layout:
    return _sliding(spec.num_local_blocks or spec.num_sliding_window_blocks or 4, blocks)


def _sliding(width: int, blocks: int) -> Layout:
    row, column = np.indices((blocks, blocks))
    near: Layout = row - column <= width // 2
    return near


def _global_blocks(spec: Sparsity, blocks: int) -> list[int]:
    starts = spec.global_block_indices
    ends = spec.global_block_end_indices or [start + 1 for start in starts]
    return [
        block
        for start, end in zip(starts, ends, strict=True)
        for block in range(start, min(end, blocks))
    ]


def _random(count: int, blocks: int, head: int, layer: int) -> Layout:
    """Draw ``count`` different blocks for every row among those up to itself."""
    layout = np.zeros((blocks, blocks), dtype=np.bool_)
    for row in range(blocks if count else 0):
        draw = generator("sparse attention", layer, head, row)
        layout[row, draw.choice(row + 1, min(count, row + 1), replace=False)] = True
    return layout


PATTERNS: dict[str, Callable[[Sparsity, int, int, int], Layout]] = {
    "local": _local,
    "sparse_fixed": _fixed,
    "sparse_variable": _variable,
    "bigbird": _bigbird,
    "bslongformer": _longformer,
}
"""Block patterns by the names that ``attention_config`` gives them."""
