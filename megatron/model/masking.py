"""Which keys a query sees, and what its position adds to their scores.

Queries and keys stand at *slots*: places in the window of tokens, counted from 0.  A query sees
no key behind its own slot.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch

from megatron.model.sparsity import BlockPattern


class MaskTables:
    """Masks of whole passes, each held once for all layers that have the same.

    A mask that adds to scores has a number for every head, query and key.
    """

    def __init__(self) -> None:
        """Begin without any."""
        self._held: dict[Hashable, tuple[Hashable, torch.Tensor]] = {}

    def get(self, kind: Hashable, size: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the mask of a kind, made anew where the last one asked for had another size."""
        held = self._held.get(kind)
        if held is None or held[0] != size:
            held = self._held[kind] = (size, make())
        return held[1]


class Masking:
    """The mask of one layer, for a whole pass or for a few tokens against cached keys.

    Not a module and without buffers, as :class:`~megatron.model.rotary.Rotary` is not: a cast to
    bf16 would round the distances.
    """

    def __init__(
        self,
        *,
        window: int | None = None,
        pattern: BlockPattern | None = None,
        slopes: torch.Tensor | None = None,
        tables: MaskTables | None = None,
    ) -> None:
        """Make the mask.

        Args:
            window: how many tokens before its own a query sees; None = all.
            pattern: which blocks of them it sees; None = all.
            slopes: what a step of distance takes from the score, of each of this rank's heads
                (ALiBi); None = nothing.
            tables: shared with the model's other layers, which have the same window and slopes;
                None makes some of its own.
        """
        self.window, self.pattern, self.slopes = window, pattern, slopes
        self._tables = tables or MaskTables()

    @property
    def kind(self) -> Hashable:
        """What layers of a model may differ by: which blocks of keys are seen; None = all."""
        return None if self.pattern is None else self.pattern.kind

    @property
    def is_causal(self) -> bool:
        """Whether a query sees all keys up to its own, each for what it is."""
        return self.window is None and self.pattern is None and self.slopes is None

    def __call__(
        self,
        query: torch.Tensor,
        keys: int,
        *,
        slots: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Return what ``scaled_dot_product_attention`` takes as ``attn_mask``.

        Args:
            query: of any shape; its type and device count.
            keys: number of keys, at slots 0, 1, ….
            slots: of the queries, int64 ``[B, S]``; None = 0, 1, … as the keys.
            starts: slot at which each query's document begins, int64 ``[B, S]``; it sees
                none before that.  None = the whole window is one document.
            bias: what distance adds to the score, ``[heads, at least keys]``.

        Returns:
            bool (True = seen) or in the type of ``query``, what is added to the scores; None
            where the mask is the plain causal one.
        """
        whole = slots is None and starts is None and bias is None
        if whole and self.is_causal:
            return None
        if slots is None:
            slots = torch.arange(keys, device=query.device)[None]
        if not whole:
            return self._made(slots, keys, starts, bias, query.dtype)
        make = partial(self._made, slots, keys, None, None, query.dtype)
        return self._tables.get(self.kind, (keys, query.device, query.dtype), make)

    def _made(
        self,
        slots: torch.Tensor,
        keys: int,
        starts: torch.Tensor | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        distance = slots[..., None] - torch.arange(keys, device=slots.device)
        seen = self._seen(slots, distance, starts)
        if bias is None and self.slopes is None:
            return seen
        if bias is not None:
            added = bias[:, distance.clamp(min=0)].movedim(0, 1)
        else:
            assert self.slopes is not None
            slopes = self.slopes.to(slots.device)[:, None, None]
            # Distances are whole numbers that half precision does not hold: rounded at the end.
            added = -slopes * distance[:, None]
        return added.to(dtype).masked_fill(~seen, -torch.inf)

    def _seen(
        self, slots: torch.Tensor, distance: torch.Tensor, starts: torch.Tensor | None
    ) -> torch.Tensor:
        """Tell which keys a query sees, bool ``[B, heads or 1, S, K]``."""
        key = torch.arange(distance.shape[-1], device=slots.device)
        seen = distance >= 0
        if self.window is not None:
            seen &= distance <= self.window
        if starts is not None:
            seen = seen & (key >= starts[..., None])
        seen = seen[:, None]
        if self.pattern is None:
            return seen
        first = torch.zeros_like(slots) if starts is None else starts
        return seen & self.pattern.seen(slots - first, key - first[..., None])
