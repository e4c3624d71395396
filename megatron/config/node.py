"""Values that remember where they were written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

Value: TypeAlias = "bool | int | float | str | list[Node] | dict[str, Node] | None"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A place: a file and line, or an argument of the command line.

    Attributes:
        source: file name, or ``--set key=value``.
        line: line counted from 1, or ``None`` for an argument.
        override: whether it wins over the files.
    """

    source: str
    line: int | None = None
    override: bool = False

    def __str__(self) -> str:
        """Return ``file:line``."""
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A value with its place and the name under which the user wrote it.

    Attributes:
        value: a scalar, a list of nodes, or a mapping from text to nodes.
        mark: where the key (or the list's entry) stands.
        name: dotted path in the user's own spelling, for messages.
    """

    value: Value
    mark: Mark
    name: str

    def plain(self) -> Any:
        """Return the value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def at(self, path: Iterable[str | int]) -> Node:
        """Return the node that a path leads to, or the deepest one on the way."""
        node = self
        for part in path:
            if isinstance(node.value, dict) and part in node.value:
                node = node.value[str(part)]
            elif isinstance(node.value, list) and isinstance(part, int):
                if not 0 <= part < len(node.value):
                    break
                node = node.value[part]
            else:
                break
        return node

    def same_as(self, other: Node) -> bool:
        """Tell whether both hold the same value (``true`` is not ``1``)."""
        return same(self.plain(), other.plain())


def same(first: Any, second: Any) -> bool:
    """Compare plain values; a boolean equals only a boolean."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, bool) != isinstance(second, bool):
        return False
    return bool(first == second)


def node_of(value: Any, mark: Mark, name: str) -> Node:
    """Wrap a plain value whose parts all stand at ``mark``."""
    if isinstance(value, dict):
        parts: Value = {str(k): node_of(v, mark, f"{name}.{k}") for k, v in value.items()}
        return Node(value=parts, mark=mark, name=name)
    if isinstance(value, (list, tuple)):
        entries: Value = [node_of(v, mark, f"{name}[{i}]") for i, v in enumerate(value)]
        return Node(value=entries, mark=mark, name=name)
    return Node(value=value, mark=mark, name=name)
