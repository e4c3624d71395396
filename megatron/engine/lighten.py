"""Costs of a process that serve nothing here, left out: a compiler never used, pages given back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 256 << 20
_MAPPED_FROM_BYTES = 32 << 20  # the most that glibc takes
_OWN_CHOICE = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> None:
    """Let glibc keep up to 256 MiB of freed memory instead of returning it after every step.

    A step on the CPU frees all its activations and needs as much again at once.  Returned pages
    come back one fault at a time and zeroed by the kernel: a tenth of a small model's step.
    Blocks of 32 MiB or more are still mapped and returned one by one.  Nothing is changed where
    the environment has settings of its own, or where the C library is another.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(os.environ.get(name) for name in _OWN_CHOICE) or "glibc.malloc" in tunables:
        return
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (absent from others, whose numbers may differ)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without handing it to torch's compiler.

    DeepSpeed imports that optimizer to compare its class with the one it was given.  The import
    decorates functions with ``torch.compile``, which loads the whole compiler (over a second in
    every rank) to compile nothing.  Muon cannot be chosen here, so none of them is ever called.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from deepspeed.runtime import compiler

        decorate = compiler.compile

        def plain(*_: Any, **__: Any) -> Any:
            return lambda function: function

        compiler.compile = plain
        try:
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
        finally:
            compiler.compile = decorate
