"""The controls that go around any method: groups inside, the guardrail outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError
from megatron.mixing.controller import Controller
from megatron.mixing.decision import CountLosses, RunContext
from megatron.mixing.earlier_run import validation_losses
from megatron.mixing.grouping import Grouping, Levels, make_grouping, make_levels
from megatron.mixing.groups import Groups
from megatron.mixing.guardrail import Fallback, Guardrail
from megatron.mixing.guardrail_options import GuardrailOptions
from megatron.mixing.held_out_difference import Yardstick
from megatron.mixing.objective import Objective, ObjectiveOptions
from megatron.mixing.observation import FloatArray
from megatron.mixing.options import CommonOptions, bounds
from megatron.mixing.reading import by_domain
from megatron.mixing.simplex import normalise, project
from megatron.mixing.weights import natural_weights, uniform_weights

Build = Callable[..., Controller]


@dataclass(frozen=True, kw_only=True)
class _Site:
    """Where a method is put: what it is built from, and what is around it.

    Attributes:
        domains: names, [K].
        weights: the given weights, [K].
        options: of the method, for the units that it acts on.
        context: the run, for the domains.
        bounded: puts a distribution over the domains within floors and ceilings.
        start: the given mixture within them, [K].
        units: what the objective is over.
        rows: weights of the measured domains in each unit's held-out loss, [units, K + M].
        grouping: the groups, if any.
    """

    domains: tuple[str, ...]
    weights: FloatArray
    options: CommonOptions
    context: RunContext
    bounded: Callable[[FloatArray], FloatArray]
    start: FloatArray
    units: tuple[str, ...]
    rows: npt.NDArray[np.float64]
    grouping: Grouping | None = None


def build_controlled(
    build: Build,
    *,
    method: str,
    domains: tuple[str, ...],
    weights: FloatArray,
    options: CommonOptions,
    context: RunContext,
) -> Controller:
    """Build a method with the controls that its options ask for around it.

    Args:
        build: makes the method of domains, weights, options and context.
        method: its name, for messages.
        domains: names, [K].
        weights: the given weights, at least 0 and not all 0, [K].
        options: the method's.
        context: what is known of the run.

    Raises:
        ConfigError: options that contradict each other or the domains.
        DataError: the guardrail's earlier run cannot be read.
    """
    if options.groups is None and options.guardrail is None:
        return build(domains=domains, weights=weights, options=options, context=context)
    try:
        if options.groups is None:
            site = _plain_site(method, domains, weights, options, context)
            levels = None
        else:
            if not getattr(build, "takes_groups", True):
                raise ConfigError(
                    "groups is given, but the method repeats decisions about domains; leave it out"
                )
            levels, inside, objective = _levels(domains, weights, options, context)
            site = _grouped_site(levels, inside, weights, options, objective, context)
    except ConfigError as error:
        if str(error).startswith("mixing method"):
            raise
        raise ConfigError(f"mixing method '{method}': {error}") from error
    if levels is None:
        inner = build(domains=domains, weights=weights, options=options, context=context)
    else:
        inner = _grouped(build, site, levels, inside)
    if options.guardrail is None:
        return inner
    return _guarded(inner, options.guardrail, site)


def group_levels(
    domains: tuple[str, ...], weights: FloatArray, options: CommonOptions, context: RunContext
) -> Levels | None:
    """Return the groups that the options ask for and the bounds of both levels, if any.

    Raises:
        ConfigError: options that contradict each other or the domains.
    """
    if options.groups is None:
        return None
    return _levels(domains, weights, options, context)[0]


def _plain_site(
    method: str,
    domains: tuple[str, ...],
    weights: FloatArray,
    options: CommonOptions,
    context: RunContext,
) -> _Site:
    floor, ceiling = bounds(options, domains, method)

    def bounded(p: FloatArray) -> FloatArray:
        return project(p, floor, ceiling) if len(p) > 1 else np.ones(1)

    return _Site(
        domains=domains,
        weights=weights,
        options=options,
        context=context,
        bounded=bounded,
        start=bounded(normalise(weights)),
        units=domains,
        rows=np.eye(len(domains) + len(context.targets)),
    )


def _levels(
    domains: tuple[str, ...], weights: FloatArray, options: CommonOptions, context: RunContext
) -> tuple[Levels, FloatArray, ObjectiveOptions]:
    """Return the two levels, each domain's part of its group's held-out loss, the objective."""
    assert options.groups is not None
    sizes = context.samples_per_epoch
    grouping = make_grouping(options.groups, domains=domains, weights=weights, sizes=sizes)
    for name in context.targets:
        if name in grouping.groups:
            raise ConfigError(
                f"groups: '{name}' is a group's name and that of a domain which is only "
                f"measured; rename one of them"
            )
    levels = make_levels(grouping, floor=options.floor, ceiling=options.ceiling)
    inside, objective = _group_objective(options.objective, grouping, context.targets)
    return levels, inside, objective


def _group_objective(
    options: ObjectiveOptions, grouping: Grouping, targets: Sequence[str]
) -> tuple[FloatArray, ObjectiveOptions]:
    """Translate an objective that may name groups, domains inside them, and targets.

    Returns:
        Each domain's part of its group's held-out loss, [K]: its share, or what the
        objective says of the domains of a group; and the objective over the groups.
    """
    parts = grouping.shares.copy()
    named = options.weights if options.above is None else options.above
    if named is None:
        return parts, options
    outside = {name: value for name, value in named.items() if name in targets}
    inside = {name: value for name, value in named.items() if name not in targets}
    groups, domains = grouping.sort("objective", inside)
    for name in domains:
        group = grouping.groups[grouping.slots[grouping.domains.index(name)]]
        if options.above is not None:
            raise ConfigError(
                f"objective: above names the domain '{name}', but the method acts on its group; "
                f"name '{group}'"
            )
        if group in groups:
            raise ConfigError(
                f"objective: weights names the group '{group}' and its domain '{name}'; name the "
                f"one or the other"
            )
    if not domains:
        return parts, options
    weight = by_domain("objective: weights", domains, grouping.domains, missing=0.0)
    total = grouping.total(weight)
    within = grouping.repeat(total)
    parts = np.where(within > 0, weight / np.where(within > 0, within, 1.0), parts)
    sums = {name: float(value) for name, value in zip(grouping.groups, total, strict=True) if value}
    return parts, replace(options, weights={**groups, **sums, **outside})


def _grouped_site(
    levels: Levels,
    inside: FloatArray,
    weights: FloatArray,
    options: CommonOptions,
    objective: ObjectiveOptions,
    context: RunContext,
) -> _Site:
    grouping = levels.grouping
    count, targets = len(grouping.groups), len(context.targets)
    rows = np.zeros((count + targets, len(grouping.domains) + targets))
    rows[grouping.slots, np.arange(len(grouping.domains))] = inside
    rows[count:, len(grouping.domains) :] = np.eye(targets)
    asked = normalise(_summed(grouping, weights))
    start = project(asked, levels.group_floor, levels.group_ceiling)
    return _Site(
        domains=grouping.domains,
        weights=weights,
        options=replace(
            options,
            floor=levels.group_floor.tolist(),
            ceiling=levels.group_ceiling.tolist(),
            objective=objective,
        ),
        context=context,
        bounded=levels.bounded,
        start=levels.spread(start),
        units=grouping.groups,
        rows=rows,
        grouping=grouping,
    )


def _grouped(build: Build, site: _Site, levels: Levels, inside: FloatArray) -> Controller:
    grouping, sizes = levels.grouping, site.context.samples_per_epoch
    if sizes is not None:
        sizes = tuple(grouping.total(np.array(sizes, dtype=np.float64)).tolist())
    inner = build(
        domains=grouping.groups,
        weights=_summed(grouping, site.weights),
        options=site.options,
        context=replace(
            site.context,
            samples_per_epoch=sizes,
            count_losses=grouped_counts(grouping, site.context.count_losses),
        ),
    )
    return Groups(inner, levels, inside)


def grouped_counts(grouping: Grouping, count: CountLosses | None) -> CountLosses | None:
    """Return what counts the text of groups: that of their domains, by the shares inside."""
    if count is None:
        return None

    def count_groups(tokens: FloatArray) -> FloatArray:
        losses = count(tokens[grouping.slots] * grouping.shares)
        return np.asarray(grouping.total(losses * grouping.shares))

    return count_groups


def _summed(grouping: Grouping, weights: FloatArray) -> FloatArray:
    """Add up given weights as they are, [K] to [G]: a rule may start from them (``ema``)."""
    total = grouping.total(weights)
    return total if np.isfinite(total).all() else grouping.total(normalise(weights))


def _guarded(inner: Controller, options: GuardrailOptions, site: _Site) -> Guardrail:
    context, given = site.context, site.options
    measured = site.domains + context.targets
    weights = site.bounded(_fallback_weights(options.fallback, site, inner.method))
    steps: tuple[int, ...] = ()
    losses: npt.NDArray[np.float64] | None = None
    objective = Objective(given.objective, site.units, context.targets)
    if options.reference is not None:
        counts = np.flatnonzero(site.rows[objective.counted].sum(axis=0) > 0)
        required = [measured[place] for place in counts]
        steps, losses = validation_losses(options.reference, measured, required=required)
    return Guardrail(
        inner,
        options=options,
        fallback=Fallback(
            weights=weights,
            name=_fallback_name(options.fallback),
            steps=steps,
            losses=losses,
            draws_first=bool(np.abs(weights - site.start).max() <= 1e-9),
        ),
        yardstick=Yardstick(objective, site.rows),
        measured=measured,
        waits=None if given.shadow else given.warmup_steps,
    )


def _fallback_name(fallback: str | Mapping[str, float]) -> str:
    return f"the {fallback} weights" if isinstance(fallback, str) else "the fallback's weights"


def _fallback_weights(fallback: str | Mapping[str, float], site: _Site, method: str) -> FloatArray:
    if fallback == "given":
        return site.start
    if fallback == "uniform":
        return uniform_weights(len(site.domains))
    if fallback == "natural":
        if site.context.samples_per_epoch is None:
            raise ConfigError(
                f"mixing method '{method}': guardrail: fallback is 'natural', but the sizes of "
                f"the domains are not known; give context=RunContext(samples_per_epoch=…)"
            )
        return natural_weights(site.context.samples_per_epoch)
    try:
        return normalise(_by_name(fallback, site))
    except ConfigError as error:
        raise ConfigError(f"mixing method '{method}': {error}") from error


def _by_name(fallback: Any, site: _Site) -> FloatArray:
    """Read weights by domain, or by groups whose domains share them as always."""
    name, grouping = "guardrail: fallback", site.grouping
    if grouping is None:
        return by_domain(name, fallback, site.domains, missing=None)
    groups, domains = grouping.sort(name, fallback)
    missing = by_domain(name, domains, site.domains, missing=-1.0)
    spread = grouping.repeat(by_domain(name, groups, grouping.groups, missing=-1.0))
    for place, domain in enumerate(site.domains):
        if (missing[place] < 0) == (spread[place] < 0):
            said = "nothing of" if missing[place] < 0 else "two things of"
            raise ConfigError(
                f"{name} says {said} the domain '{domain}'; name it or its group, the one or the "
                f"other (0 leaves it out)"
            )
    return np.where(missing >= 0, missing, spread * grouping.shares)
