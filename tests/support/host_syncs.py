"""Counting where a step waits for its device.

On a GPU torch tells it (:func:`torch.cuda.set_sync_debug_mode`).  On a CPU nothing ever waits, so
what *would* wait is counted: every operation whose result the host reads, and every tensor that
becomes a Python number or a NumPy array.  Host-side tensors are counted too, where they pass
through the same calls: the count is an upper bound.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# The host has to know a value of these before it can go on: a number, or the size of a result.
_OPERATIONS = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::is_nonzero",
        "aten::equal",
        "aten::nonzero",
        "aten::masked_select",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
        "aten::repeat_interleave.Tensor",
    }
)
_METHODS = ("numpy", "tolist", "cpu", "__array__")
_ARRIVED = "_copied_to_the_host"  # what such a tensor is read for is no further wait
_OWN = ("/torch/", "/tests/support/host_syncs.py", "<string>", "/unittest/", "/contextlib.py")


class HostSyncs(TorchDispatchMode):
    """Counts, by the line of code outside torch that asked, what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Return how often the host would have waited."""
        return self.places.total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        boolean_index = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        overloaded = f"{name}.{func._overloadname}" if func._overloadname else name
        if boolean_index or name in _OPERATIONS or overloaded in _OPERATIONS:
            self.places[_place()] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def host_syncs() -> Iterator[HostSyncs]:
    """Count in this thread, backward passes included, until the block ends."""
    counted = HostSyncs()

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not hasattr(self, _ARRIVED):
                counted.places[_place()] += 1
            with mock.patch.multiple(torch.Tensor, **originals):  # one call, one wait
                result = method(self, *args, **kwargs)
            if isinstance(result, torch.Tensor):
                result = result.detach()  # on a CPU, ``cpu()`` is the tensor itself
                setattr(result, _ARRIVED, True)
            return result

        return call

    originals = {name: getattr(torch.Tensor, name) for name in _METHODS}
    with (
        mock.patch.multiple(
            torch.Tensor, **{name: noting(method) for name, method in originals.items()}
        ),
        counted,
    ):
        yield counted


def _place() -> str:
    """Return the innermost line outside torch."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not any(part in file for part in _OWN):
            return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"
