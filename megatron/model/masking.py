"""Which keys a query sees, and what its position adds to their scores.

Queries and keys stand at *slots*: places in the window of tokens, counted from 0.  A query sees
no key behind its own slot.
"""

from __future__ import annotations

import torch


class Masking:
    """The mask of one layer, for a whole pass or for a few tokens against cached keys.

    Not a module and without buffers, as :class:`~megatron.model.rotary.Rotary` is not: a cast to
    bf16 would round the distances.
    """

    def __init__(self, *, window: int | None = None) -> None:
        """Make the mask.

        Args:
            window: how many tokens before its own a query sees; None = all.
        """
        self.window = window
        self._tables: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}

    def __call__(
        self,
        query: torch.Tensor,
        keys: int,
        *,
        slots: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Return what ``scaled_dot_product_attention`` takes as ``attn_mask``.

        Args:
            query: ``[B, heads, S, head_size]``; its size, type and device count.
            keys: number of keys, at slots 0, 1, ….
            slots: of the queries, int64 ``[B, S]``; None = 0, 1, … as the keys.
            starts: slot at which each query's document begins, int64 ``[B, S]``, where it
                sees no other; None = the whole window is one.

        Returns:
            bool (True = seen) or in the type of ``query``, what is added to the scores; None
            where the mask is the plain causal one.
        """
        whole = slots is None and starts is None
        if whole and self.window is None:
            return None
        if slots is None:
            slots = torch.arange(keys, device=query.device)[None]
        if not whole:
            return self._made(slots, keys, starts, query.dtype)
        place = (keys, query.device, query.dtype)
        if place not in self._tables:
            # One length at a time: evaluation and training take turns at most.
            self._tables = {place: self._made(slots, keys, None, query.dtype)}
        return self._tables[place]

    @torch.no_grad()
    def _made(
        self, slots: torch.Tensor, keys: int, starts: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        key = torch.arange(keys, device=slots.device)
        distance = slots[..., None] - key
        seen = distance >= 0
        if self.window is not None:
            seen &= distance <= self.window
        if starts is not None:
            seen &= key >= starts[..., None]
        return seen[:, None]
