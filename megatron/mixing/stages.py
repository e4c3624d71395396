"""The stages of a schedule: reading them strictly, and turning durations into steps."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from megatron.errors import ConfigError, did_you_mean
from megatron.mixing.base import RunContext
from megatron.mixing.observation import FloatArray
from megatron.mixing.options import by_domain
from megatron.mixing.simplex import is_distribution, normalise
from megatron.mixing.weights import uniform_weights

DURATIONS: Final = ("steps", "tokens", "fraction")
_MULTIPLES: Final[Mapping[str, float]] = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True, kw_only=True, eq=False)
class Stage:
    """One stage, resolved.

    Attributes:
        start: the step it starts with, from 1.
        weights: its distribution, [K].
    """

    start: int
    weights: FloatArray


def read_stages(
    stages: Sequence[Mapping[str, Any]],
    *,
    domains: Sequence[str],
    given: FloatArray,
    context: RunContext,
) -> list[Stage]:
    """Resolve the stages of a schedule.

    Durations add up before they are rounded to whole steps, so rounding never drifts.

    Args:
        stages: each a mapping of ``weights`` (by name, in the order of the domains,
            or ``given`` or ``uniform``) and one of ``steps``, ``tokens`` (a number or
            "2B") and ``fraction`` (of the run's steps), which the last may leave out.
        domains: names of the domains.
        given: the run's given weights, normalised, [K].
        context: the run's length, for fractions, and tokens per step, for tokens.

    Raises:
        ConfigError: naming the stage (from 1), the key, the value and the remedy.
    """
    if not stages:
        raise ConfigError("stages is empty; give at least one stage, or leave stages out")
    resolved: list[Stage] = []
    position, fractions = 0.0, 0.0
    for index, stage in enumerate(stages, start=1):
        where = f"stage {index}"
        _check_keys(where, stage)
        weights = _stage_weights(f"{where}: weights", stage["weights"], domains, given)
        start = round(position) + 1
        if resolved and start <= resolved[-1].start:
            raise ConfigError(f"stage {index - 1} lasts less than one step; make it longer")
        resolved.append(Stage(start=start, weights=weights))
        duration = _duration(where, stage, context)
        if duration is None and index < len(stages):
            raise ConfigError(
                f"{where} has no duration; give one of {', '.join(DURATIONS)} (only the last "
                f"stage may go without: it lasts to the end)"
            )
        position += duration or 0.0
        fractions += float(stage.get("fraction") or 0.0)
    if fractions > 1 + 1e-9:
        raise ConfigError(f"the fractions of the stages sum to {fractions:.6g}, more than the run")
    return resolved


def _check_keys(where: str, stage: object) -> None:
    known = ("weights", *DURATIONS)
    if not isinstance(stage, Mapping):
        raise ConfigError(f"{where} is {stage!r}; give a mapping of {', '.join(known)}")
    for key in stage:
        if key not in known:
            raise ConfigError(
                f"{where} has no key {key!r}{did_you_mean(str(key), known)} "
                f"(its keys: {', '.join(known)})"
            )
    if "weights" not in stage:
        raise ConfigError(f"{where} has no weights; give them by domain name")


def _stage_weights(
    where: str, value: object, domains: Sequence[str], given: FloatArray
) -> FloatArray:
    if isinstance(value, str):
        named = {"given": given, "uniform": uniform_weights(len(domains))}
        if value not in named:
            raise ConfigError(
                f"{where} is {value!r}{did_you_mean(value, named)}; give a mapping by domain, "
                f"or one of {', '.join(named)}"
            )
        return named[value]
    weights = by_domain(where, value, domains, missing=None)
    if (weights < 0).any() or not weights.any():
        raise ConfigError(
            f"{where} is {weights.tolist()}; they must be at least 0, and one of them above 0"
        )
    return weights if is_distribution(weights) else normalise(weights)


def _duration(where: str, stage: Mapping[str, Any], context: RunContext) -> float | None:
    """Return a stage's length in steps, not rounded; None if it has none."""
    given = [key for key in DURATIONS if stage.get(key) is not None]
    if not given:
        return None
    if len(given) > 1:
        raise ConfigError(f"{where} gives both {' and '.join(given)}; give one of them")
    key = given[0]
    value = read_count(f"{where}: {key}", stage[key])
    if key == "steps":
        if value != int(value):
            raise ConfigError(f"{where}: steps is {stage[key]!r}; it must be a whole number")
        return value
    if key == "tokens":
        if context.tokens_per_step is None:
            raise ConfigError(
                f"{where} lasts {stage[key]!r} tokens, but the tokens of a step are not known; "
                f"give the duration in steps, or context=RunContext(tokens_per_step=…)"
            )
        return value / context.tokens_per_step
    if value > 1:
        raise ConfigError(f"{where}: fraction is {stage[key]!r}; it must be at most 1")
    if context.total_steps is None:
        raise ConfigError(
            f"{where} lasts the fraction {stage[key]!r} of the run, but the run's length is not "
            f"known; give the duration in steps, or context=RunContext(total_steps=…)"
        )
    return value * context.total_steps


def read_count(name: str, value: object) -> float:
    """Read a positive number, plain or with a multiple: 2000, "500M", "2B", "1.5T".

    Raises:
        ConfigError: it is anything else.
    """
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str):
        match = re.fullmatch(r"\s*(\d[\d_]*\.?\d*(?:[eE]\+?\d+)?)\s*([kKmMbBtT]?)\s*", value)
        if match:
            number = float(match.group(1)) * _MULTIPLES[match.group(2).upper()]
    if not (math.isfinite(number) and number > 0):
        raise ConfigError(f"{name} is {value!r}; it must be a number above 0, such as 2000 or '2B'")
    return number
