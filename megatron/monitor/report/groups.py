"""The groups of a run's domains in figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from megatron.monitor.report.load import RunData
from megatron.monitor.report.summary import DomainRow


def group_rows(run: RunData, rows: Sequence[DomainRow]) -> list[DomainRow]:
    """Return a row for each group; none where the run's method acted on domains.

    Shares and tokens are added; passes are those over the group's data together; held-out
    losses are means weighted by what was asked of each domain.

    Args:
        run: of which ``config.yml`` tells the groups.
        rows: of its domains.
    """
    mixing = run.config.get("mixing")
    groups = mixing.get("groups") if isinstance(mixing, Mapping) else None
    if not isinstance(groups, Mapping):
        return []
    members = _members(groups.get("members"), [row.name for row in rows])
    by_name = {row.name: row for row in rows}
    return [
        _together(group, [by_name[name] for name in names], run) for group, names in members.items()
    ]


def _members(given: object, domains: Sequence[str]) -> dict[str, list[str]]:
    """Return the domains of each group, in the order of their first domains."""
    group_of = {name: name.partition("/")[0] or name for name in domains}
    if isinstance(given, Mapping):
        group_of = {name: name for name in domains}
        group_of |= {name: group for group, names in given.items() for name in names}
    found: dict[str, list[str]] = {}
    for name in domains:
        found.setdefault(group_of[name], []).append(name)
    return found


def _together(name: str, rows: Sequence[DomainRow], run: RunData) -> DomainRow:
    def added(of: Callable[[DomainRow], float]) -> float:
        return math.fsum(of(row) for row in rows)

    def mean(of: Callable[[DomainRow], float]) -> float:
        known = [(row.asked, of(row)) for row in rows if math.isfinite(of(row))]
        weight = math.fsum(share for share, _ in known)
        if len(known) < len(rows) or weight <= 0:
            return known[0][1] if len(rows) == len(known) == 1 else math.nan
        return math.fsum(share * value for share, value in known) / weight

    return DomainRow(
        name=name,
        first=added(lambda row: row.first),
        last=added(lambda row: row.last),
        asked=added(lambda row: row.asked),
        realised=added(lambda row: row.realised),
        token_share=added(lambda row: row.token_share),
        tokens=added(lambda row: row.tokens),
        epochs=_epochs(rows, run),
        start=mean(lambda row: row.start),
        end=mean(lambda row: row.end),
        bits_per_byte=mean(lambda row: row.bits_per_byte),
    )


def _epochs(rows: Sequence[DomainRow], run: RunData) -> float:
    """Return the passes over the data of all rows together; NaN if a size cannot be told."""
    samples = dict(zip(run.ledger.domains, run.ledger.samples.tolist(), strict=True))
    if len(rows) == 1:
        return rows[0].epochs
    if any(row.epochs <= 0 for row in rows):
        return math.nan
    size = math.fsum(samples[row.name] / row.epochs for row in rows)
    return math.fsum(samples[row.name] for row in rows) / size if size > 0 else math.nan
