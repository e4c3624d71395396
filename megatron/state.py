"""State that outlives a process: versioned dictionaries with strict keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from megatron.errors import CheckpointError


@runtime_checkable
class Stateful(Protocol):
    """Anything with memory: its state is JSON-able and the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on from here, JSON-able."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that :meth:`state_dict` gave."""
        ...


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
