"""Named, extensible sets: the only module-level state of the project.

A registry lets a higher layer (the configuration, a command) know what a lower
one offers without importing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from megatron.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name, in the order of registration."""

    def __init__(self, kind: str) -> None:
        """Make an empty registry; ``kind`` names its entries in messages ("mixing method")."""
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str, entry: T) -> T:
        """Add ``entry`` under ``name``; a name is registered once."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        """Return the entry called ``name``.

        Raises:
            ConfigError: nothing has that name; the message lists what there is.
        """
        if name not in self._entries:
            raise ConfigError(
                f"unknown {self.kind} '{name}'{did_you_mean(name, self._entries)} "
                f"(available: {', '.join(sorted(self._entries))})"
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        """Tell whether something is registered under ``name``."""
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._entries)


@dataclass(frozen=True, kw_only=True)
class MixingMethod:
    """What the configuration and the training loop need to know of a mixing method.

    Attributes:
        name: the value of ``mixing.method``.
        options: frozen keyword-only dataclass of the method's own options.
        needs: names of the signals it reads (``megatron.mixing.base.Signal`` values).
        build: ``build(domains=…, weights=…, options=…, context=…) -> Mixer``.
    """

    name: str
    options: type[Any]
    needs: frozenset[str]
    build: Callable[..., Any]


mixing_methods: Registry[MixingMethod] = Registry("mixing method")
