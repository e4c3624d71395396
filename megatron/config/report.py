"""Pydantic's errors as problems with a place and words of ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from megatron.config.data import DomainConfig
from megatron.config.draft import Draft
from megatron.config.node import Mark, Node
from megatron.config.option_blocks import keys_at
from megatron.config.suggest import did_you_mean

# How the path of a value that is missing is written, where it is no flat key.
_SPELLING = {"optimizer.lr": "optimizer.params.lr"}
_BLOCK = "should be a block of 'key: value' lines"
_TEXTS = {
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "dict_type": _BLOCK,
    "dict_attributes_type": _BLOCK,
    "finite_number": "should be a finite number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "int_from_float": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_parsing_size": "is too large a number",
    "int_type": "should be a whole number",
    "list_type": "should be a list",
    "mapping_type": _BLOCK,
    "model_type": _BLOCK,
    "model_attributes_type": _BLOCK,
    "string_type": "should be a text (put a number in quotes to make it one)",
    "string_too_short": "should not be empty",
    "tuple_type": "should be a list",
}


def report_group_errors(draft: Draft, errors: Iterable[Any], files: Sequence[str]) -> None:
    """Report the errors of the whole configuration; their paths start with the group."""
    placed: dict[int, tuple[Node, list[str]]] = {}
    for entry in errors:
        group, path = str(entry["loc"][0]), list(entry["loc"][1:])
        if entry["type"] == "rule":
            path = [entry["ctx"]["field"]]
        top = draft.groups.get("", {}).get(group)
        root = top or Node(value=dict(draft.groups.get(group, {})), mark=Mark(source=""), name="")
        node = _walk(root, path)
        if node is root and (top is None or entry["type"] == "rule"):
            _report_absent(draft, group, path, entry, files)
        else:
            _, texts = placed.setdefault(id(node), (node, []))
            texts.append(_text(entry))
    _report_placed(draft, placed)


def report_option_errors(
    draft: Draft, errors: Iterable[Any], given: dict[str, Node], options: type[Any]
) -> None:
    """Report the errors of a mixing method's options."""
    root = Node(value=dict(given), mark=Mark(source=""), name="mixing")
    placed: dict[int, tuple[Node, list[str]]] = {}
    for entry in errors:
        node = _walk(root, entry["loc"])
        if node is root:
            draft.problems.add_plain(f"mixing.{'.'.join(map(str, entry['loc']))}: {_text(entry)}")
        else:
            text = _text(entry, keys_at(options, entry["loc"][:-1]))
            placed.setdefault(id(node), (node, []))[1].append(text)
    _report_placed(draft, placed)


def _report_placed(draft: Draft, placed: dict[int, tuple[Node, list[str]]]) -> None:
    for node, texts in placed.values():
        unique = list(dict.fromkeys(texts))
        first, rest = unique[0], [text.removeprefix("should be ") for text in unique[1:]]
        silent = all("unknown key" in text or "is missing" in text for text in unique)
        draft.problems.add(node, ", or ".join([first, *rest]), show=not silent)


def _report_absent(
    draft: Draft, group: str, path: Sequence[Any], entry: Any, files: Sequence[str]
) -> None:
    """Report what has no place: a required value that no file gives, or a rule about a default."""
    dotted = ".".join(str(part) for part in (group, *path))
    name = _SPELLING.get(dotted, str(path[-1]) if path else group)
    if entry["type"] == "missing":
        shown = ", ".join(files)
        draft.problems.add_plain(f"{name}: required, and given in none of the files ({shown})")
    else:
        draft.problems.add_plain(f"{name}: {_text(entry)}")


def _walk(root: Node, path: Iterable[Any]) -> Node:
    """Follow a path, leaving out pydantic's names of a union's alternatives."""
    node = root
    for part in path:
        node = node.at([part])
    return node


def _text(entry: Any, known: Iterable[str] = ()) -> str:
    kind, loc = entry["type"], entry["loc"]
    if kind == "missing":
        return f"'{loc[-1]}' is missing"
    if kind == "extra_forbidden":
        known = DomainConfig.model_fields if loc[0] == "domains" else known
        return f"unknown key{did_you_mean(str(loc[-1]), known)}"
    if kind in _TEXTS:
        return _TEXTS[kind]
    text = str(entry["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    if kind == "literal_error" and isinstance(entry["input"], str):
        choices = re.findall(r"'([^']*)'", str(entry["ctx"]["expected"]))
        text += did_you_mean(entry["input"], choices)
    return text
