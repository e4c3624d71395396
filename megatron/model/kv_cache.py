"""Keys and values of the tokens that were run before, so that each token runs once.

For looking at a model only: no gradients, no dropout.  A cache belongs to one batch on one rank
and is attached to the modules that rank holds; a rank of a pipeline caches its own blocks, a
tensor rank its own heads.  Where a token stands is told to the cache, the same on every rank,
so nothing of it travels between stages.

    cache = KVCache(rows=2, capacity=64)
    with cache.attached(model):
        for slots, tokens in …:          # both [B, S]: the prompts first, then token by token
            cache.advance(slots)
            hidden, weight = model(tokens)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


class KVCache:
    """What earlier passes left, by slot: the token's number in its row, counted from 0.

    Rows need not be equally long.  A slot that is run again is written over, so what pads a
    short row needs no mask: it stands behind the row's end, unseen, until a token comes there.

    Attributes:
        rows: sequences in the batch.
        capacity: slots of a row.
        length: slots that any row has used, which is how many keys a query is held against.
        prefix: slots before a row's first token, which vectors without a token take.
        prefix_runs: how many of them are part of this pass.
    """

    def __init__(self, *, rows: int, capacity: int) -> None:
        """Make an empty cache; room is made when the first keys come."""
        self.rows, self.capacity, self.length = rows, capacity, 0
        self.prefix = self.prefix_runs = 0
        self._slots: torch.Tensor | None = None
        # Of the slots of this pass, where all rows have the same ones, in a row.
        self._first: int | None = None
        self._shared: dict[Hashable, Any] = {}
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._ends: torch.Tensor | None = None

    def advance(self, slots: torch.Tensor) -> None:
        """Say where the tokens of the next pass stand.

        Args:
            slots: int64 ``[B, S]`` on the host.  All that stand before a token and were not run
                yet are to be among them.

        Raises:
            ValueError: a slot lies beyond the capacity, or the number of rows is another.
        """
        if slots.dim() != 2 or slots.shape[0] != self.rows:
            raise ValueError(f"slots of shape {tuple(slots.shape)} for a cache of {self.rows} rows")
        last = int(slots.max())
        room = self.capacity - self.prefix
        if int(slots.min()) < 0 or last >= room:
            raise ValueError(f"a token at slot {last} of a cache with room for {room}")
        self._slots, self.prefix_runs = slots, 0
        self.length = max(self.length, last + 1)
        self._shared = {}
        first = int(slots[0, 0])
        even = bool((slots == torch.arange(first, first + slots.shape[1])).all())
        self._first = first + self.prefix if even else None

    def slots(self, device: torch.device) -> torch.Tensor:
        """Return where the tokens of this pass stand, int64 ``[B, S]``."""
        if self._slots is None:
            raise RuntimeError("a cache is attached, but advance(slots) was not called")
        self._slots = self._slots.to(device)
        return self._slots

    @property
    def is_whole(self) -> bool:
        """Whether this pass runs every slot there is so far, in order, in every row."""
        assert self._slots is not None
        return self._first == 0 and self._slots.shape[1] == self.length

    @property
    def is_last(self) -> bool:
        """Whether this pass runs one slot a row, behind all others."""
        assert self._slots is not None
        return self._slots.shape[1] == 1 and self._first == self.length - 1

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """Return what is the same for all layers of this pass, made by the first that asks."""
        if name not in self._shared:
            self._shared[name] = make()
        found: T = self._shared[name]
        return found

    def begin_with(self, count: int) -> bool:
        """Let ``count`` slots come before those of tokens; ask in every pass, before any block.

        Returns:
            Whether what stands there is to be run with this pass: it is with the first.
        """
        assert self._slots is not None
        first = self.prefix == 0
        self._slots = self._slots + count
        if first:
            self.prefix = self.prefix_runs = count
            self.capacity += count
            before = torch.arange(count, device=self._slots.device).expand(self.rows, -1)
            self._slots = torch.cat([before, self._slots], dim=1)
            self._first = 0 if self._first == 0 else None
        self.length = max(self.length, int(self._slots.max()) + 1)
        return first

    def extend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep this pass's keys and values of a layer.

        Args:
            layer: number of the block.
            key: ``[B, S, heads, head_size]``, rotated by its position where that is done.
            value: likewise.

        Returns:
            Keys and values of all slots up to ``length``, ``[B, length, heads, head_size]``.
        """
        if layer not in self._held:
            room = (self.rows, self.capacity)
            self._held[layer] = (
                key.new_zeros((*room, *key.shape[2:])),
                value.new_zeros((*room, *value.shape[2:])),
            )
        keys, values = self._held[layer]
        if self._first is not None:
            stop = self._first + key.shape[1]
            keys[:, self._first : stop], values[:, self._first : stop] = key, value
        else:
            slots = self.slots(key.device)
            row = self.once("rows", lambda: torch.arange(self.rows, device=key.device)[:, None])
            keys[row, slots], values[row, slots] = key, value
        return keys[:, : self.length], values[:, : self.length]

    def document_starts(self, ended: torch.Tensor) -> torch.Tensor:
        """Return at which slot the document of each token of this pass begins.

        Args:
            ended: whether each token of this pass ends a document, bool ``[B, S]``.

        Returns:
            int64 ``[B, S]``.
        """
        slots = self.slots(ended.device)
        if self._ends is None:
            self._ends = ended.new_zeros(self.rows, self.capacity)
        self._ends[torch.arange(self.rows, device=ended.device)[:, None], slots] = ended
        return document_starts(self._ends).gather(1, slots)

    @contextlib.contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Let the modules of ``model`` use this cache inside the ``with`` block."""
        users = [module for module in model.modules() if isinstance(module, CachingModule)]
        try:
            for user in users:
                user.cache = self
            yield
        finally:
            for user in users:
                user.cache = None


class CachingModule(nn.Module):
    """A module whose result for a token depends on the tokens before it.

    Attributes:
        cache: what it knows of those that earlier passes ran; None where every pass is whole.
    """

    def __init__(self) -> None:
        """Begin without a cache."""
        super().__init__()
        self.cache: KVCache | None = None


def document_starts(ended: torch.Tensor) -> torch.Tensor:
    """Return at which place the document of each token begins.

    Args:
        ended: whether a token ends its document (and so belongs to it), bool ``[B, S]``.

    Returns:
        int64 ``[B, S]``.
    """
    place = torch.arange(1, ended.shape[1] + 1, device=ended.device)
    after = torch.where(ended, place, 0)
    first = after.new_zeros(ended.shape[0], 1)
    return torch.cat([first, after[:, :-1]], dim=1).cummax(dim=1).values
