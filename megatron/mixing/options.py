"""A method's options: what all have in common, and strict reading of what a user gives.

A method's options are a frozen keyword-only dataclass that inherits
:class:`CommonOptions`; each field carries ``field(metadata={"help": …, "unit": …})``.
The configuration builds its own typed model from it, without importing this package.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron.errors import ConfigError
from megatron.mixing.grouping import GroupsOptions
from megatron.mixing.guardrail_options import GuardrailOptions
from megatron.mixing.objective import ObjectiveOptions
from megatron.mixing.observation import FloatArray
from megatron.mixing.reading import by_domain, describe_type, fits, read_dataclass, require

__all__ = [
    "CommonOptions",
    "bounds",
    "by_domain",
    "describe_type",
    "fits",
    "read_options",
    "require",
]


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
    max_epochs: float | dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "greatest number of passes over a domain's data in the whole run: one number "
            "for all, or a mapping by name (others without limit). The weights keep to what the "
            "rest of the run can hold, whatever decides them; a floor above that gives way",
            "unit": "epochs",
        },
    )
    objective: ObjectiveOptions = field(
        default=ObjectiveOptions(),
        metadata={
            "help": "which losses count and how much, for methods that have a notion of it: "
            "uniform, worst, weights by name, or a block"
        },
    )
    groups: GroupsOptions | None = field(
        default=None,
        metadata={
            "help": "let the method act on groups of domains, inside which shares are fixed ({} = "
            "groups by name, shares as given); then floor, ceiling and objective may name groups "
            "and domains, one number for all is for groups, and the method's own options name "
            "groups"
        },
    )
    guardrail: GuardrailOptions | None = field(
        default=None,
        metadata={
            "help": "let a fixed mixture draw when the objective's held-out loss shows that the "
            "method makes the run worse ({} = with the defaults)"
        },
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        require("update_every", self.update_every, self.update_every >= 1, "at least 1")
        tokens = self.min_tokens
        require("min_tokens", tokens, 0 <= tokens < 2**63, "at least 0 and below 2^63")


OptionsT = TypeVar("OptionsT", bound=CommonOptions)


def read_options(kind: type[OptionsT], method: str, given: Mapping[str, Any]) -> OptionsT:
    """Build a method's options from keywords, strictly: every name and every type is checked.

    Raises:
        ConfigError: an unknown name (with the nearest known one), a value of the wrong
            type, or one out of range.
    """
    return read_dataclass(kind, f"mixing method '{method}'", given)


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
