"""The configuration on its way from a user's keys to typed groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.config.node import Node
from megatron.config.problems import Problems, shorten


@dataclass(kw_only=True)
class Draft:
    """Values by group and field, each with its place.

    Attributes:
        groups: field values by group; the group ``""`` holds top-level fields.
        problems: what is wrong so far.
        ignored: known keys without effect, with the reason.
        options: the mixing method's own options that were given.
    """

    problems: Problems
    groups: dict[str, dict[str, Node]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    options: dict[str, Node] = field(default_factory=dict)

    def put(self, group: str, name: str, node: Node) -> None:
        """Set a field; two spellings with different values are a problem, overrides win."""
        fields = self.groups.setdefault(group, {})
        present = fields.get(name)
        if present is None or (node.mark.override and not present.mark.override):
            fields[name] = node
        elif node.mark.override == present.mark.override and not node.same_as(present):
            self.problems.add(
                node,
                f"contradicts {present.name}: {shorten(present.plain(), 40)} in {present.mark}; "
                "both mean the same setting, keep one",
            )

    def get(self, group: str, name: str) -> Node | None:
        """Return a field's node, or ``None``."""
        return self.groups.get(group, {}).get(name)

    def ignore(self, name: str, reason: str) -> None:
        """Note a key without effect."""
        self.ignored[name] = reason

    def block(self, node: Node) -> dict[str, Node]:
        """Return a block's entries; anything but a mapping (or null) is a problem."""
        if isinstance(node.value, dict):
            return node.value
        if node.value is not None:
            self.problems.add(node, "should be a block of 'key: value' lines")
        return {}

    def refuse(self, group: str, name: str, text: str) -> None:
        """Add what is wrong with a field, at its place if it was given."""
        node = self.get(group, name)
        if node is None:
            self.problems.add_plain(f"{name}: {text}")
        else:
            self.problems.add(node, text)

    def refuse_at(self, node: Node | None, name: str, text: str) -> None:
        """Add what is wrong at a place, without showing its value; by name if there is none."""
        if node is None:
            self.problems.add_plain(f"{name}: {text}")
        else:
            self.problems.add(node, text, show=False)
