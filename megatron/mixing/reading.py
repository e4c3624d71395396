"""Strict reading of what a user gives: options by name and type, vectors by domain.

An option may be a block of options itself: a field whose type is another frozen
dataclass (or that or None, or a mapping or list of them).  It is given as a mapping; a
:class:`Block` may also be given in a shorter form.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from megatron.errors import ConfigError, did_you_mean
from megatron.mixing.observation import FloatArray

ReadT = TypeVar("ReadT")


class Block:
    """Base of the dataclasses of a block of options; a block may have a shorter form."""

    shorthand: ClassVar[Any] = None
    """The type of what may be given in place of the block; None = nothing may."""

    @classmethod
    def expand(cls, value: Any) -> Any:
        """Return the mapping that a shorter form stands for; anything else as it is."""
        return value


def require(name: str, value: object, condition: bool, rule: str) -> None:
    """Refuse the option ``name`` unless ``condition`` holds.

    Raises:
        ConfigError: naming the option, its value and the rule it must follow.
    """
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {rule}")


def read_dataclass(kind: type[ReadT], owner: str, given: Mapping[str, Any]) -> ReadT:
    """Build a dataclass from keywords, strictly: every name and every type is checked.

    Args:
        kind: a frozen dataclass of options.
        owner: what has the options, for messages ("mixing method 'odm'").
        given: values by name; a block as a mapping, in its shorter form, or built.

    Raises:
        ConfigError: an unknown name (with the nearest known one), a value of the wrong
            type, or one out of range.
    """
    hints = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind) if field.init]  # type: ignore[arg-type]
    read = {}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(
                f"{owner} has no option '{name}'{did_you_mean(str(name), known)} "
                f"(its options: {', '.join(known)})"
            )
        place = f"{owner}: {name}"
        read[name] = built = _built(hints[name], value, place)
        if not fits(built, hints[name]):
            raise ConfigError(
                f"{place} is {value!r} ({type(value).__name__}); "
                f"it must be {describe_type(hints[name])}"
            )
    try:
        return kind(**{name: _plain(value) for name, value in read.items()})
    except ConfigError as error:
        raise ConfigError(f"{owner}: {error}") from error


def _built(hint: Any, value: Any, place: str) -> Any:
    """Build the blocks within a value, where its type has any; the rest stays."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_block(hint):
        given = hint.expand(value) if issubclass(hint, Block) else value
        return read_dataclass(hint, place, given) if isinstance(given, Mapping) else value
    if origin in (Union, types.UnionType):
        blocks = [part for part in arguments if has_block(part)]
        return _built(blocks[0], value, place) if blocks and value is not None else value
    if origin is dict and isinstance(value, Mapping) and has_block(arguments[1]):
        return {k: _built(arguments[1], item, f"{place}.{k}") for k, item in value.items()}
    if origin is list and isinstance(value, list) and has_block(arguments[0]):
        return [_built(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value)]
    return value


def is_block(hint: Any) -> bool:
    """Whether a type is a dataclass of options."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def has_block(hint: Any) -> bool:
    """Whether a type is a block of options or contains one."""
    return is_block(hint) or any(has_block(part) for part in get_args(hint))


def fits(value: object, hint: Any) -> bool:
    """Whether ``value`` is of the annotated type: an int is a float, a bool is no number."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint is int:
        return isinstance(value, int | np.integer) and not isinstance(value, bool)
    if hint is float:
        return _is_number(value)
    if origin is dict:
        return isinstance(value, Mapping) and all(
            fits(k, arguments[0]) and fits(v, arguments[1]) for k, v in value.items()
        )
    if origin is list:
        return (
            isinstance(value, Sequence | np.ndarray)
            and not isinstance(value, str | bytes)
            and all(fits(item, arguments[0]) for item in value)
        )
    return isinstance(value, hint)


def describe_type(hint: Any) -> str:
    """Name an annotated type in a user's words."""
    origin, arguments = get_origin(hint), get_args(hint)
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "a text",
        type(None): "null",
    }
    if hint in names:
        return names[hint]
    if is_block(hint):
        keys = ", ".join(field.name for field in dataclasses.fields(hint) if field.init)
        shorter = hint.shorthand if issubclass(hint, Block) else None
        block = f"a mapping of {keys}"
        return block if shorter is None else f"{describe_type(shorter)} or {block}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(part) for part in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin is dict:
        return "a mapping"
    if origin is list:
        return "a list"
    return str(hint)


def by_domain(
    name: str, value: Any, domains: Sequence[str], *, missing: float | None
) -> FloatArray:
    """Spread a number, a list in the order of the domains, or a mapping by name to float64 [K].

    Args:
        name: what the value is called in an error.
        value: the number, list or mapping.
        domains: names of the domains.
        missing: value of the domains that a mapping leaves out; None = none may be left out.

    Raises:
        ConfigError: another number of entries, an unknown or a missing domain, or
            something that is no finite number.
    """
    if isinstance(value, Mapping):
        for key in value:
            if key not in domains:
                raise ConfigError(
                    f"{name} names the domain {key!r}, which does not exist"
                    f"{did_you_mean(str(key), domains)} (domains: {', '.join(domains)})"
                )
        absent = [domain for domain in domains if domain not in value]
        if missing is None and absent:
            raise ConfigError(
                f"{name} says nothing of the domain '{absent[0]}'; name every domain "
                f"(0 leaves one out)"
            )
        value = [value.get(domain, missing) for domain in domains]
    elif _is_number(value):
        value = [value] * len(domains)
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        raise ConfigError(f"{name} is {value!r}; give a number, a list or a mapping by domain")
    for item in value:
        require(name, item, _is_number(item), "made of finite numbers")
    if len(value) != len(domains):
        raise ConfigError(
            f"{name} has {len(value)} values for {len(domains)} domains ({', '.join(domains)}); "
            f"give one for each, in this order, or a mapping by name"
        )
    return np.array(value, dtype=np.float64)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # a whole number beyond the range of floats
        return False


def _plain(value: Any) -> Any:
    """Turn NumPy's scalars and arrays into Python's, so that options compare and print plainly."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
