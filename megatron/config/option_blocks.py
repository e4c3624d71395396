"""Typed models of dataclasses that other layers register, blocks within blocks included.

A block of options is a frozen dataclass.  One that has a shorter form says so with two
class attributes: ``shorthand``, the type of what may be given instead, and ``expand``,
which turns that into the block's mapping.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model


def block_model(block: type[Any], name: str) -> type[BaseModel]:
    """Build the strict model of a dataclass."""
    hints = typing.get_type_hints(block)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(block):
        if not field.init:
            continue
        annotation = _annotation(hints[field.name], f"{name}_{field.name}")
        info: dict[str, Any] = {"description": describe(field)}
        if field.default is not dataclasses.MISSING:
            info["default"] = _default(field.default, annotation)
        elif field.default_factory is not dataclasses.MISSING:
            info["default_factory"] = field.default_factory
        fields[field.name] = (annotation, Field(**info))
    settings = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)
    return create_model(name, __config__=settings, **fields)


def describe(field: dataclasses.Field[Any]) -> str:
    """Return an option's help with its unit."""
    text = str(field.metadata.get("help", "")).strip()
    unit = field.metadata.get("unit")
    return f"{text} ({unit})" if unit else text


def prepared(block: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return a block's plain values as its model takes them.

    Shorter forms are expanded, whole floats are whole numbers where those are wanted, and
    hyphens in a block's keys are underscores (those of the outermost were before).
    """
    hints = typing.get_type_hints(block)
    read: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        name = name if key not in hints and name in hints and name not in given else key
        read[name] = _prepared(hints[name], value) if name in hints else value
    return read


def built(block: type[Any], plain: dict[str, Any]) -> Any:
    """Build the dataclass from what its model holds; its own checks run.

    Raises:
        NeomixError, ValueError, TypeError: from those checks.
    """
    hints = typing.get_type_hints(block)
    return block(**{name: _rebuilt(hints[name], value) for name, value in plain.items()})


def keys_at(block: type[Any], path: Iterable[str | int]) -> list[str]:
    """Name the keys of the block that a path leads to; none if it leads to no block."""
    hint: Any = block
    for part in path:
        if _is_block(hint):
            hint = typing.get_type_hints(hint).get(str(part))
        elif get_args(hint):
            hint = get_args(hint)[-1]
        hint = _inner(hint)
    return [f.name for f in dataclasses.fields(hint) if f.init] if _is_block(hint) else []


def _is_block(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _inner(hint: Any) -> Any:
    """Return the alternative of a union that holds a block, or the type as it is."""
    if not _is_union(hint):
        return hint
    return next((part for part in get_args(hint) if _holds_block(part)), hint)


def _holds_block(hint: Any) -> bool:
    return _is_block(hint) or any(_holds_block(part) for part in get_args(hint))


def _annotation(hint: Any, name: str) -> Any:
    """Return a type with the models of the blocks in their place."""
    if not _holds_block(hint):
        return hint
    if _is_block(hint):
        model = block_model(hint, name)
        shorthand = getattr(hint, "shorthand", None)
        return model if shorthand is None else Annotated[model, _Shorthand(shorthand)]
    parts = tuple(_annotation(part, name) for part in get_args(hint))
    return Union[parts] if _is_union(hint) else get_origin(hint)[parts]  # noqa: UP007


@dataclasses.dataclass(frozen=True)
class _Shorthand:
    """Says in a JSON Schema what may stand in a block's place."""

    accepted: Any

    def __get_pydantic_json_schema__(
        self, core: Any, handler: Callable[[Any], dict[str, Any]]
    ) -> dict[str, Any]:
        """See pydantic."""
        return {"anyOf": [handler(core), TypeAdapter(self.accepted).json_schema()]}


def _default(value: Any, annotation: Any) -> Any:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return TypeAdapter(annotation).validate_python(dataclasses.asdict(value))


def _prepared(hint: Any, value: Any) -> Any:
    if not _holds_block(hint):
        return _whole(hint, value)
    hint = _inner(hint)
    if _is_block(hint):
        mapping = hint.expand(value) if hasattr(hint, "expand") else value
        return prepared(hint, mapping) if isinstance(mapping, dict) else mapping
    within = get_args(hint)[-1]
    if isinstance(value, dict):
        return {key: _prepared(within, item) for key, item in value.items()}
    return [_prepared(within, item) for item in value] if isinstance(value, list) else value


def _whole(hint: Any, value: Any) -> Any:
    if not isinstance(value, float) or not value.is_integer():
        return value
    accepted = {hint, *get_args(hint)}
    return int(value) if int in accepted and float not in accepted else value


def _rebuilt(hint: Any, value: Any) -> Any:
    """Turn the mappings of blocks back into their dataclasses."""
    if value is None or not _holds_block(hint):
        return value
    hint = _inner(hint)
    if _is_block(hint):
        return built(hint, value)
    within = get_args(hint)[-1]
    if isinstance(value, dict):
        return {key: _rebuilt(within, item) for key, item in value.items()}
    return [_rebuilt(within, item) for item in value]
