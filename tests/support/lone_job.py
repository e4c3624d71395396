"""A job of one rank, for what asks others."""

from __future__ import annotations

from typing import Any


class Alone:
    """A job of one rank."""

    rank = 0

    def broadcast(self, value: Any) -> Any:
        """Return what the only rank has."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank has."""
        return [value]
