"""Block-sparse attention: the masks of the patterns in :mod:`megatron.model.block_layouts`.

Blocks are counted from the beginning of the document where attention ends with it, otherwise from
the window's.
"""

from __future__ import annotations

import torch

from megatron.model.block_layouts import DEFAULTS, PATTERNS, BlockLayout, block_layout
from megatron.model.spec import Sparsity
from megatron.parallel.topology import Topology

__all__ = ["DEFAULTS", "PATTERNS", "BlockPattern"]


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

    def layout(self, blocks: int) -> BlockLayout:
        """Return which block sees which, ``[heads or 1, blocks, blocks]``, never one behind it."""
        return block_layout(self._kind, self._spec, blocks, heads=self._heads, layer=self._layer)
