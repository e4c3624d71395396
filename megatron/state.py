"""State that outlives a process: versioned dictionaries with strict keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron.errors import CheckpointError


def check_state(owner: str, state: Mapping[str, Any], *, version: int, keys: Iterable[str]) -> None:
    """Check that ``state`` is of ``version`` and holds exactly ``keys`` (beside ``version``).

    Raises:
        CheckpointError: naming the owner, and the version or the keys that differ.
    """
    if state.get("version") != version:
        raise CheckpointError(
            f"the state of {owner} has version {state.get('version')!r}, this software reads "
            f"version {version}; resume with the release that wrote it"
        )
    expected = {"version", *keys}
    missing, unknown = sorted(expected - state.keys()), sorted(state.keys() - expected)
    if missing or unknown:
        raise CheckpointError(
            f"the state of {owner} does not fit: missing {missing or 'nothing'}, "
            f"unknown {unknown or 'nothing'}"
        )
