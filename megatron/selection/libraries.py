"""The libraries of the extra ``select``, loaded where they are used."""

from __future__ import annotations

from typing import Any

from megatron.errors import load_extra


def load(module: str, purpose: str) -> Any:
    """Import a module of an optional library; see :func:`megatron.errors.load_extra`."""
    return load_extra(module, "select", purpose)
