"""All problems of a configuration at once, each with its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.config.node import Mark, Node
from megatron.errors import ConfigError

_SHOWN = 30


@dataclass(kw_only=True)
class Problems:
    """Collects problems in the order of the files, and raises them as one error."""

    found: list[tuple[Mark | None, str]] = field(default_factory=list)

    def add(self, node: Node, text: str, *, show: bool = True) -> None:
        """Add a problem of a value: ``file:line: name: value: text``."""
        shown = f"{shorten(node.plain())}: " if show else ""
        self.found.append((node.mark, f"{node.mark}: {node.name}: {shown}{text}"))

    def add_plain(self, text: str, mark: Mark | None = None) -> None:
        """Add a problem that no single value has."""
        self.found.append((mark, f"{mark}: {text}" if mark else text))

    def raise_if_any(self) -> None:
        """Raise what was found.

        Raises:
            ConfigError: one problem as it is, several as a list.
        """
        if not self.found:
            return
        order = {m.source: i for i, m in reversed(list(enumerate(m for m, _ in self.found if m)))}

        def place(entry: tuple[Mark | None, str]) -> tuple[int, int]:
            mark = entry[0]
            return (order[mark.source], mark.line or 0) if mark else (len(self.found), 0)

        texts = list(dict.fromkeys(text for _, text in sorted(self.found, key=place)))
        if len(texts) == 1:
            raise ConfigError(texts[0])
        more = [f"… and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
        lines = "".join(f"\n  {text}" for text in [*texts[:_SHOWN], *more])
        raise ConfigError(f"{len(texts)} problems in the configuration:{lines}")


def shorten(value: Any, limit: int = 80) -> str:
    """Show a value as it would be written, cut to ``limit`` characters."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        text = "a number of thousands of digits"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
