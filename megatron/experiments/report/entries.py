"""The runs of a study put together: seeds of one mixture or method are one entry."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.experiments.children import CHILD
from megatron.experiments.table import Row, tag

_SEED = re.compile(r"[-_/ ]*\bseed[-_ ]?\d+")


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """A run and where it ended; losses are NaN where they were not measured.

    Attributes:
        name: of the run.
        label: of its entry.
        family: what its losses can be compared within: its task, and what was measured.
        method: that mixed.
        seed: of the run.
        ended: whether there is a held-out loss at its end.
        weights: mean sampling weights by domain that was trained on.
        losses: held-out losses by measured domain, at the last step there is.
    """

    name: str
    label: str
    family: tuple[str, tuple[str, ...]]
    method: str
    seed: int
    ended: bool
    weights: Mapping[str, float]
    losses: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Plain mean over the measured domains."""
        return _mean(list(self.losses.values()))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: what they are called.
        method: that mixed.
        runs: one or more.
    """

    label: str
    method: str
    runs: tuple[RunEnd, ...]

    @property
    def weights(self) -> dict[str, float]:
        """Weights by domain, means over seeds."""
        names = self.runs[0].weights
        return {
            name: _mean([run.weights.get(name, math.nan) for run in self.runs]) for name in names
        }

    @property
    def losses(self) -> dict[str, float]:
        """Losses by domain, means over seeds."""
        names = self.runs[0].losses
        return {
            name: _mean([run.losses.get(name, math.nan) for run in self.runs]) for name in names
        }

    @property
    def mean(self) -> float:
        """Mean over seeds of the average loss."""
        return _mean([run.mean for run in self.runs])

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds; NaN below two."""
        values = [run.mean for run in self.runs]
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class Family:
    """Entries whose losses can be compared.

    Attributes:
        title: of the task; empty if the study has one.
        domains: trained on, K.
        measured: held-out losses, M.
        entries: best first; what has no loss comes last.
    """

    title: str
    domains: tuple[str, ...]
    measured: tuple[str, ...]
    entries: tuple[Entry, ...]


def run_ends(rows: Sequence[Row]) -> list[RunEnd]:
    """Return the ends of all runs of a table, in its order; children of other runs are left out.

    A child ends where its parent's next steps do: its losses are of no budget of its own.
    """
    by_run: dict[str, list[Row]] = {}
    for row in rows:
        if row["split"] == "valid" and tag(row, "role") != CHILD:
            by_run.setdefault(row["run"], []).append(row)
    return [_run_end(mine) for mine in by_run.values()]


def _run_end(rows: Sequence[Row]) -> RunEnd:
    end = max(row["step"] for row in rows)
    last = {row["domain"]: row for row in rows if row["step"] == end}
    first = next(iter(last.values()))
    tags: dict[str, Any] = json.loads(first["tags"] or "{}")
    weights: dict[str, float] = json.loads(first["weights"] or "{}")
    name = first["run"]
    label = f"point {tags['point']}" if "point" in tags else _SEED.sub("", name) or name
    return RunEnd(
        name=name,
        label=label,
        family=(str(tags.get("task", "")), tuple(last)),
        method=first["method"],
        seed=first["seed"],
        ended=first["last"],
        weights=weights or {domain: row["weight"] for domain, row in last.items()},
        losses={domain: row["loss"] for domain, row in last.items()},
    )


def families(ends: Sequence[RunEnd]) -> list[Family]:
    """Return the families of a study, in its order, their entries best first.

    A run that has not come to its end is left out: its loss is of another budget.
    """
    found: dict[tuple[str, tuple[str, ...]], dict[str, list[RunEnd]]] = {}
    for run in ends:
        if run.ended:
            found.setdefault(run.family, {}).setdefault(run.label, []).append(run)
    return [_family(key, grouped, len(found)) for key, grouped in found.items()]


def _family(
    key: tuple[str, tuple[str, ...]], grouped: Mapping[str, Sequence[RunEnd]], count: int
) -> Family:
    task, measured = key
    entries = [
        Entry(label=label, method=runs[0].method, runs=tuple(runs))
        for label, runs in grouped.items()
    ]
    trained = {
        name: None
        for entry in entries
        for name, weight in entry.weights.items()
        if weight > 0 or name in measured
    }
    title = task or (", ".join(measured[:4]) + (" …" if len(measured) > 4 else ""))
    return Family(
        title=title if count > 1 else "",
        domains=tuple(trained),
        measured=measured,
        entries=tuple(sorted(entries, key=lambda entry: (math.isnan(entry.mean), entry.mean))),
    )


def _mean(values: Sequence[float]) -> float:
    """Return the mean, NaN if there is nothing or one is not known."""
    return (
        math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else math.nan
    )
