"""A method's options: what all have in common, and strict reading of what a user gives.

A method's options are a frozen keyword-only dataclass that inherits
:class:`CommonOptions`; each field carries ``field(metadata={"help": …, "unit": …})``.
The configuration builds its own typed model from it, without importing this package.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from megatron.errors import ConfigError, did_you_mean
from megatron.mixing.observation import FloatArray


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options that every mixing method has.

    Raises:
        ConfigError: a number out of its range.
    """

    floor: float | dict[str, float] | list[float] = field(
        default=0.0,
        metadata={
            "help": "least sampling weight: one number for all domains, a mapping by domain name "
            "(others 0) or a list in the order of the domains; their sum must not exceed 1",
            "unit": "probability",
        },
    )
    ceiling: float | dict[str, float] | list[float] = field(
        default=1.0,
        metadata={
            "help": "greatest sampling weight, given like floor (others 1); their sum must reach 1",
            "unit": "probability",
        },
    )
    warmup_steps: int = field(
        default=0,
        metadata={
            "help": "steps at the start that are drawn from the given weights, and from which "
            "the method learns nothing",
            "unit": "steps",
        },
    )
    update_every: int = field(
        default=1,
        metadata={
            "help": "the weights change after the steps that are multiples of this number",
            "unit": "steps",
        },
    )
    pool: bool = field(
        default=True,
        metadata={
            "help": "with update_every above 1: learn from all steps since the last update, added "
            "up (true), or from the update's own step alone (false)"
        },
    )
    min_tokens: int = field(
        default=0,
        metadata={
            "help": "least evidence: a domain's training losses are held back and added up until "
            "they speak for this many tokens, and only then move its estimate; a loss measured "
            "on held-out data always counts",
            "unit": "tokens",
        },
    )
    shadow: bool = field(
        default=False,
        metadata={
            "help": "train on the given weights and only log what the method would have drawn; "
            "a run that goes on without it hands control over"
        },
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        require("update_every", self.update_every, self.update_every >= 1, "at least 1")
        require("min_tokens", self.min_tokens, self.min_tokens >= 0, "at least 0")


def require(name: str, value: object, condition: bool, rule: str) -> None:
    """Refuse the option ``name`` unless ``condition`` holds.

    Raises:
        ConfigError: naming the option, its value and the rule it must follow.
    """
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {rule}")


OptionsT = TypeVar("OptionsT", bound=CommonOptions)


def read_options(kind: type[OptionsT], method: str, given: Mapping[str, Any]) -> OptionsT:
    """Build a method's options from keywords, strictly: every name and every type is checked.

    Raises:
        ConfigError: an unknown name (with the nearest known one), a value of the wrong
            type, or one out of range.
    """
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    for name, value in given.items():
        if name not in known:
            raise ConfigError(
                f"mixing method '{method}' has no option '{name}'{did_you_mean(name, known)} "
                f"(its options: {', '.join(known)})"
            )
        if not fits(value, hints[name]):
            raise ConfigError(
                f"mixing method '{method}': {name} is {value!r} ({type(value).__name__}); "
                f"it must be {describe_type(hints[name])}"
            )
    try:
        return kind(**{name: _plain(value) for name, value in given.items()})
    except ConfigError as error:
        raise ConfigError(f"mixing method '{method}': {error}") from error


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
        return any(value == choice and type(value) is type(choice) for choice in arguments)
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
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(part) for part in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin is dict:
        return "a mapping"
    if origin is list:
        return "a list"
    return str(hint)


def bounds(
    options: CommonOptions, domains: Sequence[str], method: str
) -> tuple[FloatArray, FloatArray]:
    """Return floor and ceiling per domain, each float64 [K].

    Raises:
        ConfigError: an unknown domain, a bound outside [0, 1], a floor above its
            ceiling, or sums that no distribution can satisfy.
    """
    try:
        floor = by_domain("floor", options.floor, domains, missing=0.0)
        ceiling = by_domain("ceiling", options.ceiling, domains, missing=1.0)
        _check_bounds(floor, ceiling, domains)
    except ConfigError as error:
        raise ConfigError(f"mixing method '{method}': {error}") from error
    return floor, ceiling


def _check_bounds(floor: FloatArray, ceiling: FloatArray, domains: Sequence[str]) -> None:
    for name, low, high in zip(domains, floor, ceiling, strict=True):
        for key, value in (("floor", low), ("ceiling", high)):
            require(f"{key} of domain '{name}'", float(value), 0 <= value <= 1, "between 0 and 1")
        require(f"floor of domain '{name}'", float(low), low <= high, f"at most its ceiling {high}")
    slack = 1e-12  # a third, three times, need not be one
    count = len(domains)
    if floor.sum() > 1 + slack:
        raise ConfigError(
            f"floor: the floors of the {count} domains sum to {floor.sum():.6g}, and the weights "
            f"to 1; lower them (one number for all can be at most {1 / count:.6g})"
        )
    if ceiling.sum() < 1 - slack:
        raise ConfigError(
            f"ceiling: the ceilings of the {count} domains sum to {ceiling.sum():.6g}, and the "
            f"weights to 1; raise them (one number for all must be at least {1 / count:.6g})"
        )


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
