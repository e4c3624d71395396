"""Groups of domains: who belongs to which, and which part of a group each domain is.

Groups are a level above the domains.  A method acts on the groups; inside a group the
domains' shares are fixed.  Bounds may be named at both levels: :class:`Levels` keeps both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from megatron.errors import ConfigError, did_you_mean
from megatron.mixing.observation import FloatArray
from megatron.mixing.reading import by_domain, require
from megatron.mixing.simplex import normalise, project
from megatron.mixing.weights import temperature_weights

IntArray = npt.NDArray[np.int64]

_SLACK: Final = 1e-12  # a third, three times, need not be one


@dataclass(frozen=True, kw_only=True)
class GroupsOptions:
    """The block ``groups``: the method acts on groups of domains.

    Raises:
        ConfigError: a number out of its range.
    """

    members: dict[str, list[str]] | None = field(
        default=None,
        metadata={
            "help": "the domains of each group, by the group's name; a domain that is in none is "
            "a group of its own. null = by the part of a domain's name before its first slash "
            "(web/high and web/low are the group web)"
        },
    )
    shares: Literal["given", "natural", "temperature"] | dict[str, float] = field(
        default="given",
        metadata={
            "help": "what a domain gets of its group: given = by the given weights; natural = by "
            "training samples; temperature = by training samples to the power of alpha; or "
            "numbers by domain, of any scale (a group of which none is named keeps the given)"
        },
    )
    alpha: float = field(default=0.3, metadata={"help": "exponent of shares: temperature"})

    def __post_init__(self) -> None:
        """Check the ranges."""
        require("alpha", self.alpha, self.alpha >= 0, "at least 0 (1 = natural, 0 = uniform)")


@dataclass(frozen=True, kw_only=True, eq=False)
class Grouping:
    """K domains in G groups.

    Attributes:
        domains: names, [K].
        groups: names in the order of their first domains, [G].
        slots: each domain's group, an index into ``groups``, [K].
        shares: each domain's part of its group, summing to 1 in every group, [K].
    """

    domains: tuple[str, ...]
    groups: tuple[str, ...]
    slots: IntArray
    shares: FloatArray

    def total(self, values: FloatArray) -> FloatArray:
        """Add up the domains of each group, [K] to [G]."""
        found = np.bincount(self.slots, weights=values, minlength=len(self.groups))
        return found.astype(np.float64)

    def mean(self, values: FloatArray, weights: FloatArray) -> FloatArray:
        """Return each group's weighted mean of what is not NaN, [K] to [G]; NaN if all is."""
        counted = np.where(np.isnan(values), 0.0, weights)
        found = np.full(len(self.groups), np.nan)
        for group, members in enumerate(self.members):
            known = members[counted[members] > 0]
            if len(known) == 1:
                found[group] = values[known[0]]
            elif len(known):
                found[group] = normalise(counted[known]) @ values[known]
        return found

    def repeat(self, values: FloatArray) -> FloatArray:
        """Give every domain its group's value, [G] to [K]."""
        return values[self.slots]

    @property
    def members(self) -> list[IntArray]:
        """The domains of each group, as indices."""
        return [np.flatnonzero(self.slots == group) for group in range(len(self.groups))]

    def names(self) -> dict[str, list[str]]:
        """Return the names of each group's domains, by the group's name."""
        return {
            group: [self.domains[place] for place in members]
            for group, members in zip(self.groups, self.members, strict=True)
        }

    def sort(self, name: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Divide a mapping into what names groups and what names domains inside groups.

        A domain that is a group of its own counts as a group.

        Raises:
            ConfigError: a name that neither has.
        """
        groups: dict[str, Any] = {}
        domains: dict[str, Any] = {}
        for key, value in values.items():
            if key in self.groups:
                groups[key] = value
            elif key in self.domains:
                domains[key] = value
            else:
                known = [*self.groups, *self.domains]
                raise ConfigError(
                    f"{name} names {key!r}, which is no group and no domain"
                    f"{did_you_mean(str(key), known)} (groups: {', '.join(self.groups)}; domains: "
                    f"{', '.join(self.domains)})"
                )
        return groups, domains


def make_grouping(
    options: GroupsOptions,
    *,
    domains: Sequence[str],
    weights: FloatArray,
    sizes: Sequence[float] | None,
) -> Grouping:
    """Find the groups and the shares.

    Args:
        options: the block ``groups``.
        domains: names of the domains.
        weights: the given weights, [K].
        sizes: training samples of each domain, [K]; None = not known.

    Raises:
        ConfigError: no group of at least two domains, a name that is used twice or for
            nothing, or shares that cannot be found.
    """
    names = tuple(domains)
    group_of = _by_slash(names) if options.members is None else _by_members(options.members, names)
    groups = tuple(dict.fromkeys(group_of))
    if len(groups) == len(names):
        raise ConfigError(
            "groups: every group has one domain alone; name domains as group/part (web/high, "
            "web/low), give members, or leave groups out"
        )
    for name, group in zip(names, group_of, strict=True):
        if name == group and group_of.count(group) > 1:
            raise ConfigError(
                f"groups: '{name}' is a domain and a group's name too, so that nobody can tell "
                f"which is meant; rename one of them"
            )
    slots = np.array([groups.index(group) for group in group_of], dtype=np.int64)
    raw = _raw_shares(options, names, weights, sizes)
    shares = np.empty(len(names))
    for place, group in enumerate(groups):
        members = slots == place
        part, given = raw[members], weights[members]
        if np.isnan(part).all():  # a mapping that says nothing of this group
            part = given
        elif np.isnan(part).any():
            absent = names[int(np.flatnonzero(members)[int(np.argmax(np.isnan(part)))])]
            raise ConfigError(
                f"groups: shares names some domains of the group '{group}', but not '{absent}'; "
                f"name all of them (0 leaves one out)"
            )
        shares[members] = normalise(part if part.any() else np.ones(len(part)))
    return Grouping(domains=names, groups=groups, slots=slots, shares=shares)


def _by_slash(domains: tuple[str, ...]) -> list[str]:
    return [name.partition("/")[0] or name for name in domains]


def _by_members(members: Mapping[str, Sequence[str]], domains: tuple[str, ...]) -> list[str]:
    group_of: dict[str, str] = {}
    for group, names in members.items():
        if not group:
            raise ConfigError("groups: members holds a group without a name")
        if not names:
            raise ConfigError(f"groups: the group '{group}' has no members; name some, or drop it")
        for name in names:
            if name not in domains:
                raise ConfigError(
                    f"groups: the group '{group}' names the domain '{name}', which does not exist"
                    f"{did_you_mean(name, domains)} (domains: {', '.join(domains)})"
                )
            if name in group_of:
                raise ConfigError(
                    f"groups: the domain '{name}' is named in '{group_of[name]}' and in '{group}'; "
                    f"a domain is in one group"
                )
            group_of[name] = group
    for name in domains:
        if name in members and group_of.get(name) != name:
            raise ConfigError(
                f"groups: the group '{name}' has the name of a domain that is not in it; rename "
                f"one of them"
            )
    return [group_of.get(name, name) for name in domains]


def _raw_shares(
    options: GroupsOptions,
    domains: tuple[str, ...],
    weights: FloatArray,
    sizes: Sequence[float] | None,
) -> FloatArray:
    """Return each domain's share before scaling, [K]; NaN where a mapping says nothing."""
    if isinstance(options.shares, Mapping):
        named = by_domain("groups: shares", options.shares, domains, missing=-1.0)
        for name, value in options.shares.items():
            require(f"groups: the share of '{name}'", value, value >= 0, "at least 0")
        return np.where(named < 0, np.nan, named)
    if options.shares == "given":
        return weights
    if sizes is None:
        raise ConfigError(
            f"groups: shares is '{options.shares}', but the sizes of the domains are not known; "
            f"give context=RunContext(samples_per_epoch=…)"
        )
    counts = np.array(sizes, dtype=np.float64)
    return counts if options.shares == "natural" else temperature_weights(counts, options.alpha)


@dataclass(frozen=True, kw_only=True, eq=False)
class Levels:
    """Floors and ceilings of groups and of the domains inside them.

    A group's bounds leave room for those of its domains, so that a mixture of groups within
    them can always be spread over domains.

    Attributes:
        grouping: the groups.
        group_floor: [G].
        group_ceiling: [G].
        floor: [K].
        ceiling: [K].
    """

    grouping: Grouping
    group_floor: FloatArray
    group_ceiling: FloatArray
    floor: FloatArray
    ceiling: FloatArray

    def spread(self, weights: FloatArray) -> FloatArray:
        """Return the domains' weights under the groups' ``weights``, [G] to [K].

        They follow the shares as closely as the domains' bounds allow (Euclidean), and the
        groups keep their weights.
        """
        return self._within(weights, self.grouping.shares)

    def bounded(self, weights: FloatArray) -> FloatArray:
        """Return a distribution over the domains near ``weights`` that both levels allow, [K]."""
        asked = self.grouping.total(weights)
        total = project(asked, self.group_floor, self.group_ceiling)
        parts = self.grouping.shares.copy()
        for group, members in enumerate(self.grouping.members):
            if asked[group] > 0:
                parts[members] = normalise(weights[members])
        return self._within(total, parts)

    def _within(self, total: FloatArray, parts: FloatArray) -> FloatArray:
        found = self.grouping.repeat(total) * parts
        if ((found >= self.floor) & (found <= self.ceiling)).all():
            return found
        for group, members in enumerate(self.grouping.members):
            whole = total[group]
            if whole <= 0 or len(members) == 1:
                continue
            with np.errstate(over="ignore"):  # above 1 means nothing to a part
                low = np.minimum(self.floor[members] / whole, 1.0)
                high = np.minimum(self.ceiling[members] / whole, 1.0)
            found[members] = whole * project(parts[members], low, np.maximum(low, high))
        return found


def make_levels(grouping: Grouping, *, floor: Any, ceiling: Any) -> Levels:
    """Read floors and ceilings at both levels.

    Args:
        grouping: the groups.
        floor: a number for every group, a mapping by names of groups and domains, or a
            list in the order of the domains.
        ceiling: given like ``floor``.

    Raises:
        ConfigError: an unknown name, a bound outside [0, 1], or bounds that contradict
            each other within a level or between the two.
    """
    group_floor, low = _both("floor", floor, grouping, missing=0.0)
    group_ceiling, high = _both("ceiling", ceiling, grouping, missing=1.0)
    _check_each("domain", grouping.domains, low, high)
    _check_each("group", grouping.groups, group_floor, group_ceiling)
    least, most = grouping.total(low), np.minimum(grouping.total(high), 1.0)
    for name, asked, allowed in zip(grouping.groups, least, group_ceiling, strict=True):
        if asked > allowed + _SLACK:
            raise ConfigError(
                f"ceiling of the group '{name}' is {allowed:.6g}, but the floors of its domains "
                f"sum to {asked:.6g}; raise the one or lower the others"
            )
    for name, asked, allowed in zip(grouping.groups, group_floor, most, strict=True):
        if asked > allowed + _SLACK:
            raise ConfigError(
                f"floor of the group '{name}' is {asked:.6g}, but the ceilings of its domains sum "
                f"to {allowed:.6g}; lower the one or raise the others"
            )
    group_floor = np.maximum(group_floor, least)
    group_ceiling = np.maximum(np.minimum(group_ceiling, most), group_floor)
    if group_floor.sum() > 1 + _SLACK:
        raise ConfigError(
            f"floor: the floors of the {len(grouping.groups)} groups (each at least the sum of "
            f"its domains') sum to {group_floor.sum():.6g}, and the weights to 1; lower them"
        )
    if group_ceiling.sum() < 1 - _SLACK:
        raise ConfigError(
            f"ceiling: the ceilings of the {len(grouping.groups)} groups (each at most the sum of "
            f"its domains') sum to {group_ceiling.sum():.6g}, and the weights to 1; raise them"
        )
    return Levels(
        grouping=grouping,
        group_floor=group_floor,
        group_ceiling=group_ceiling,
        floor=low,
        ceiling=high,
    )


def _both(
    name: str, value: Any, grouping: Grouping, *, missing: float
) -> tuple[FloatArray, FloatArray]:
    """Return a bound of the groups, [G], and of the domains, [K]."""
    if isinstance(value, Mapping):
        groups, domains = grouping.sort(name, value)
        return (
            by_domain(name, groups, grouping.groups, missing=missing),
            by_domain(name, domains, grouping.domains, missing=missing),
        )
    free = np.full(len(grouping.groups), missing)
    if isinstance(value, Sequence | np.ndarray):
        return free, by_domain(name, value, grouping.domains, missing=missing)
    number = by_domain(name, value, grouping.groups, missing=missing)
    return number, np.full(len(grouping.domains), missing)


def _check_each(kind: str, names: Sequence[str], floor: FloatArray, ceiling: FloatArray) -> None:
    for name, low, high in zip(names, floor, ceiling, strict=True):
        for key, value in (("floor", low), ("ceiling", high)):
            require(f"{key} of the {kind} '{name}'", float(value), 0 <= value <= 1, "from 0 to 1")
        require(f"floor of the {kind} '{name}'", float(low), low <= high, f"at most {high}")
