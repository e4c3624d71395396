"""YAML with places: reads a file, or the value of ``--set``, into :class:`Node` trees.

Beside YAML's own errors, a key written twice is one; ``1e-4`` is a number, ``2024-01-01``,
``010``, ``12:30``, ``.inf`` and ``1e999`` are texts, and keys are always texts, so that a
domain may be called ``no`` or ``2023``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron.config.node import Mark, Node, Value
from megatron.errors import ConfigError

_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_HEX = re.compile(r"[-+]?0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9][0-9_]*|[0-9][0-9_]*\.?)(?:[eE][-+]?[0-9]+)?")
_STANDARD = "tag:yaml.org,2002:"
_MAX_NODES = 50_000
_MAX_DIGITS = 4000
_SCALARS = frozenset({"str", "int", "float", "bool", "null"})


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and parser alone: scalars are resolved by :func:`scalar`."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]


def scalar(text: str) -> bool | int | float | str | None:
    """Read an unquoted scalar; no setting is infinite or not a number, so such are texts."""
    if text in _NULLS:
        return None
    if text.lower() in _BOOLS and text in (text.lower(), text.upper(), text.capitalize()):
        return _BOOLS[text.lower()]
    if len(text) <= _MAX_DIGITS:
        if _INT.fullmatch(text):
            return int(text.replace("_", ""))
        if _HEX.fullmatch(text):
            return int(text, 16)
        if _FLOAT.fullmatch(text) and not (text.isdigit() and text[0] == "0"):
            number = float(text.replace("_", ""))
            return number if math.isfinite(number) else text
    return text


class _Builder:
    """Turns PyYAML's node graph into a :class:`Node` tree."""

    def __init__(self, source: str, override: bool) -> None:
        self.source = source
        self.override = override
        self.count = 0
        self.open: set[int] = set()

    def mark(self, node: yaml.Node) -> Mark:
        line = None if self.override else node.start_mark.line + 1
        return Mark(source=self.source, line=line, override=self.override)

    def fail(self, node: yaml.Node, text: str) -> ConfigError:
        return ConfigError(f"{self.mark(node)}: {text}")

    def build(self, node: yaml.Node, mark: Mark, name: str) -> Node:
        self.count += 1
        if self.count > _MAX_NODES:
            raise self.fail(node, f"more than {_MAX_NODES} values (nested aliases?)")
        if id(node) in self.open:
            raise self.fail(node, "an alias refers to the value that it is part of")
        self.open.add(id(node))
        value = self.value(node, name)
        self.open.discard(id(node))
        return Node(value=value, mark=mark, name=name)

    def value(self, node: yaml.Node, name: str) -> Value:
        tag = str(node.tag).removeprefix(_STANDARD)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self.mapping(node, name)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [
                self.build(item, self.mark(item), f"{name}[{index}]")
                for index, item in enumerate(node.value)
            ]
        if isinstance(node, yaml.ScalarNode) and tag in _SCALARS:
            return scalar(node.value) if node.style is None else str(node.value)
        raise self.fail(node, f"the tag '{node.tag}' is not allowed in a configuration")

    def pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """Yield a mapping's own pairs, then those of ``<<`` that it does not have itself."""
        own = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == "<<" and key.style is None:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                yield key, value
        for other in merged:
            if not isinstance(other, yaml.MappingNode) or id(other) in self.open:
                raise self.fail(other, "'<<' wants a mapping, or a list of them")
            for key, value in other.value:
                if isinstance(key, yaml.ScalarNode) and key.value not in own:
                    own.add(key.value)
                    yield key, value

    def mapping(self, node: yaml.MappingNode, name: str) -> dict[str, Node]:
        result: dict[str, Node] = {}
        for key, value in self.pairs(node):
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a key must be a plain text")
            text = str(key.value)
            if text in result:
                raise self.fail(
                    key, f"{text}: written twice (first in line {result[text].mark.line})"
                )
            result[text] = self.build(value, self.mark(key), f"{name}.{text}" if name else text)
        return result


def _parse(text: str, builder: _Builder, name: str) -> Node | None:
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is None:
            return None
        return builder.build(root, builder.mark(root), name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        what = ", ".join(part for part in (error.context, error.problem) if part)
        hint = "; indent with spaces, not tabs" if _tab_before(text, line) else ""
        place = builder.source if builder.override else f"{builder.source}:{line}"
        raise ConfigError(f"{place}: not valid YAML: {what}{hint}") from None
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise ConfigError(f"{builder.source}: not valid YAML: {what}") from None
    except RecursionError:
        raise ConfigError(f"{builder.source}: values are nested too deeply") from None
    except ValueError as error:
        raise ConfigError(f"{builder.source}: not valid YAML: {error}") from None


def _tab_before(text: str, line: int) -> bool:
    lines = text.splitlines()[max(0, line - 2) : line]
    return any("\t" in part[: len(part) - len(part.lstrip())] for part in lines)


def read_file(path: str | Path) -> dict[str, Node]:
    """Read a configuration file.

    Raises:
        ConfigError: missing, unreadable, empty, not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text ({error.reason})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    root = _parse(text, _Builder(str(path), override=False), "")
    if root is None or root.value is None:
        raise ConfigError(f"{path}: the file is empty; it should hold 'key: value' lines")
    if not isinstance(root.value, dict):
        raise ConfigError(f"{root.mark}: should hold 'key: value' lines, not {_kind(root.value)}")
    return root.value


def read_override(argument: str) -> tuple[list[str], Node]:
    """Read ``a.b=value`` (the value as YAML) into its path and its value.

    Raises:
        ConfigError: no ``=``, an empty name, or a value that is not YAML.
    """
    shown = argument if len(argument) <= 60 else f"{argument[:59]}…"
    key, equals, text = argument.partition("=")
    path = [part.strip() for part in key.split(".")]
    if not equals or not all(path):
        raise ConfigError(f"--set {shown}: should be KEY=VALUE, such as optimizer.params.lr=1e-4")
    source = f"--set {shown}"
    node = _parse(text, _Builder(source, override=True), ".".join(path))
    if node is None:
        node = Node(value=None, mark=Mark(source=source, override=True), name=".".join(path))
    return path, node


def _kind(value: Value) -> str:
    return "a list" if isinstance(value, list) else "a single value"
