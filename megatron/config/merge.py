"""Several files and ``--set`` arguments become one tree, without silent winners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron.config.node import Node
from megatron.config.problems import Problems, shorten
from megatron.config.source import read_file, read_override
from megatron.errors import ConfigError

Tree = dict[str, Node]

# Blocks whose keys may be written with hyphens; the value is how many levels deep.
# (Domain names, and what is handed on to other libraries, are taken as they are.)
_HYPHENS = {
    "optimizer": 2,
    "fp16": 1,
    "bf16": 1,
    "zero_optimization": 1,
    "mixing": 1,
}


def find_file(name: str, conf_dir: str | None) -> Path:
    """Find a configuration file by its name, which may leave out the folder and ``.yml``."""
    path = Path(conf_dir or "", name)
    if path.suffix.lower() in {".yml", ".yaml", ".json"}:
        return path
    for suffix in (".yml", ".yaml", ".json"):
        candidate = path.with_name(path.name + suffix)
        if candidate.is_file():
            return candidate
    return path if path.is_file() else path.with_name(path.name + ".yml")


def read_all(
    files: Sequence[str], conf_dir: str | None, overrides: Sequence[str], problems: Problems
) -> Tree:
    """Read and merge files and overrides; contradictions and unreadable ones are problems."""
    tree: Tree = {}
    for name in files:
        try:
            path = find_file(name, conf_dir)
            layer = read_file(path)
        except ConfigError as error:
            problems.add_plain(str(error))
            continue
        merge(tree, underscored(layer, problems), problems)
    for argument in overrides:
        try:
            keys, node = read_override(argument)
        except ConfigError as error:
            problems.add_plain(str(error))
            continue
        for key in reversed(keys[1:]):
            node = Node(value={key: node}, mark=node.mark, name=node.name)
        merge(tree, underscored({keys[0]: node}, problems), problems)
    return tree


def underscored(layer: Tree, problems: Problems, depth: int | None = None) -> Tree:
    """Return the layer with ``-`` replaced by ``_`` in its keys (and those of known blocks)."""
    result: Tree = {}
    for written, node in layer.items():
        key = written.replace("-", "_")
        inner = _HYPHENS.get(key, 0) if depth is None else depth - 1
        if key == "domains" and depth is None and isinstance(node.value, dict):
            node = replace(node, value={k: _domain(v, problems) for k, v in node.value.items()})
        elif inner > 0 and isinstance(node.value, dict):
            node = replace(node, value=underscored(node.value, problems, inner))
        if key in result:
            first = result[key]
            problems.add(
                node, f"written twice, the first time as {first.name} ({first.mark})", show=False
            )
            continue
        result[key] = node
    return result


def _domain(node: Node, problems: Problems) -> Node:
    if not isinstance(node.value, dict):
        return node
    return replace(node, value=underscored(node.value, problems, 0))


def merge(base: Tree, layer: Tree, problems: Problems) -> None:
    """Merge a layer into ``base``, block by block.

    An override wins, and with ``null`` takes away what the files say; between files the same key
    with another value is a problem.
    """
    for key, node in layer.items():
        if key not in base:
            base[key] = node
            continue
        if node.mark.override and node.value is None:
            del base[key]
            continue
        present = base[key]
        if isinstance(present.value, dict) and isinstance(node.value, dict):
            merged = dict(present.value)
            merge(merged, node.value, problems)
            base[key] = replace(present, value=merged)
        elif node.mark.override:
            base[key] = node
        elif not node.same_as(present):
            problems.add(node, _contradiction(node, present), show=False)


def _contradiction(node: Node, present: Node) -> str:
    return (
        f"{shorten(node.plain(), 40)} contradicts {shorten(present.plain(), 40)} "
        f"in {present.mark}; keep one of the two, or give it as --set"
    )
