"""Copies of an engine's state in host memory, to be written while training changes the original.

A copy keeps what a file of ``torch.save`` is made of: which tensors are views of one storage,
their strides, and whatever else is in the structure.  So the file of a copy holds the same bytes
as that of the original.
"""

from __future__ import annotations

import contextlib
import copy
import mmap
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron.errors import RunError

_OWN_PAGES = 1 << 20
"""Bytes from which a buffer has pages of its own, so that it can be pinned."""


def compact(state: Any) -> Any:
    """Return ``state`` with copies of those tensors that are a small part of their storage.

    ``torch.save`` writes whole storages, and a layer's weights may be views of a buffer that holds
    the weights of all layers.  Nothing is copied where a storage is needed for the most part.
    """
    held = _Held(state)
    if all(held.whole(key) for key in held.views):
        return state
    memo: dict[int, Any] = {}
    for key, views in held.views.items():
        parts: dict[Any, torch.Tensor] = {}
        for view in views:
            memo[id(view)] = view
            if held.whole(key):
                continue
            if _place(view) not in parts:
                part = torch.empty(view.shape, dtype=view.dtype)
                parts[_place(view)] = part.copy_(view.detach())
            memo[id(view)] = _like(view, parts[_place(view)], memo)
    return copy.deepcopy(state, memo)


Span = tuple[int, int]
"""Address and bytes of a piece of memory."""


def host_spans(state: Any) -> list[Span]:
    """Return the host memory that the tensors of ``state`` lie in, sorted."""
    return sorted(
        (storage.data_ptr(), storage.nbytes())
        for storage in _Held(state).storages.values()
        if storage.device.type == "cpu"
    )


class HostCopies:
    """Makes copies of states in host memory, in buffers that are used again.

    One set of copies is alive at a time: :meth:`begin` gives the buffers free.  Copies from a GPU
    are ordered with the GPU's work and may be read after :meth:`wait`; what the GPU does to the
    original after :meth:`take` is not in them.
    """

    def __init__(self, *, pinned: bool) -> None:
        """Hold nothing yet.

        Args:
            pinned: lock the buffers' pages, so that a GPU can copy into them by itself.
        """
        self._pinned = pinned
        self._buffers: list[torch.Tensor] = []
        self._used = 0
        self._events: list[torch.cuda.Event] = []

    @property
    def bytes(self) -> int:
        """Return the size of the buffers together."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def begin(self) -> None:
        """Give the buffers of earlier copies free."""
        self._used = 0
        self._events.clear()

    def take(self, state: Any) -> Any:
        """Return a copy of ``state``, in which all tensors are on the host.

        Raises:
            RunError: there is not enough memory.
        """
        held = _Held(state)
        memo: dict[int, Any] = {}
        for key, views in held.views.items():
            whole = self._copied(held.storages[key]) if held.whole(key) else None
            parts: dict[Any, torch.Tensor] = {}
            for view in views:
                if whole is None:
                    if _place(view) not in parts:
                        parts[_place(view)] = self._part(view)
                    part = parts[_place(view)]
                else:
                    part = torch.empty(0, dtype=view.dtype).set_(
                        whole.untyped_storage(), view.storage_offset(), view.shape, view.stride()
                    )
                memo[id(view)] = _like(view, part, memo)
        self._note_devices(held)
        return copy.deepcopy(state, memo)

    def wait(self) -> None:
        """Wait until all copies are complete."""
        for event in self._events:
            event.synchronize()

    def _copied(self, storage: torch.UntypedStorage) -> torch.Tensor:
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        buffer = self._buffer(storage.nbytes())
        return buffer.copy_(source, non_blocking=True)

    def _part(self, view: torch.Tensor) -> torch.Tensor:
        buffer = self._buffer(view.numel() * view.element_size()).view(view.dtype)
        return buffer.view(view.shape).copy_(view.detach(), non_blocking=True)

    def _buffer(self, size: int) -> torch.Tensor:
        """Return the next buffer; saves ask for the same sizes in the same order."""
        if self._used == len(self._buffers):
            self._buffers.append(_allocate(size, pinned=self._pinned))
        elif (old := self._buffers[self._used]).nbytes != size:
            if self._pinned and old.nbytes >= _OWN_PAGES:
                _cuda().cudaHostUnregister(old.data_ptr())
            self._buffers[self._used] = _allocate(size, pinned=self._pinned)
        self._used += 1
        return self._buffers[self._used - 1]

    def _note_devices(self, held: _Held) -> None:
        devices = {storage.device for storage in held.storages.values()}
        for device in devices:
            if device.type == "cuda":
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(device))
                self._events.append(event)


_Key = tuple[str, int, int]


class _Held:
    """The tensors in a state by the storage that they are views of."""

    def __init__(self, state: Any) -> None:
        self.views: dict[_Key, list[torch.Tensor]] = {}
        self.storages: dict[_Key, torch.UntypedStorage] = {}
        seen: set[int] = set()
        for tensor in _tensors(state):
            plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
            # What is left out is copied as Python copies an object.
            if id(tensor) in seen or not plain or not tensor.untyped_storage().nbytes():
                continue
            seen.add(id(tensor))
            storage = tensor.untyped_storage()
            key = str(storage.device), storage.data_ptr(), storage.nbytes()
            self.storages.setdefault(key, storage)
            self.views.setdefault(key, []).append(tensor)

    def whole(self, key: _Key) -> bool:
        """Whether the tensors need (nearly) all of their storage."""
        sizes = {_place(view): view.numel() * view.element_size() for view in self.views[key]}
        return 8 * sum(sizes.values()) >= 7 * key[2]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _place(view: torch.Tensor) -> Any:
    return view.storage_offset(), tuple(view.shape), view.stride(), view.dtype


def _like(original: torch.Tensor, values: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """Return a tensor of these values that is pickled as the original is."""
    made = values.detach()
    if isinstance(original, nn.Parameter):
        made = nn.Parameter(made, requires_grad=original.requires_grad)
    elif original.requires_grad:
        made.requires_grad_()
    for name, value in vars(original).items():
        setattr(made, name, copy.deepcopy(value, memo))
    return made


def _allocate(size: int, *, pinned: bool) -> torch.Tensor:
    """Return ``size`` bytes of host memory.

    Large ones are mapped for themselves: torch's own pinned memory comes in powers of two.
    """
    if size < _OWN_PAGES:
        return torch.empty(size, dtype=torch.uint8)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise RunError(
            f"no host memory for the copy that async_save makes of a checkpoint ({size:,} bytes "
            f"more): {error.strerror}; set async_save: false"
        ) from error
    with contextlib.suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(pages, dtype=torch.uint8, count=size)
    if pinned:
        # Where the system refuses to lock so much, copies are slower, not wrong.
        portable = 1
        _cuda().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, portable)
    return buffer


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
