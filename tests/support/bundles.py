"""The rank-free state of a run, written into a checkpoint that a test makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.checkpoint.bundle import STATE_NAME, bundle_bytes


def write_bundle(directory: Path, **state: Any) -> Path:
    """Write a state, see :func:`megatron.checkpoint.bundle.bundle_bytes`; return the file."""
    path = directory / STATE_NAME
    path.write_bytes(bundle_bytes(**state))
    return path
