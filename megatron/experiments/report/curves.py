"""The numbers that the page draws of a study's runs, few enough for a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron.experiments.bounds import FloatArray
from megatron.experiments.report.entries import Entry, Family
from megatron.experiments.table import Row
from megatron.monitor.report.payload import number, numbers

MOST_NUMBERS = 120_000
MOST_RUNS = 200
MOST_DOMAINS = 60
LEAST_POINTS = 6
MOST_POINTS = 200


def family_data(family: Family, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what the page draws of a family.

    Args:
        family: its entries, best first.
        rows: of the whole study.
    """
    domains = family.domains[:MOST_DOMAINS]
    measured = family.measured[:MOST_DOMAINS]
    shown = drawn(family.entries)
    return {
        "title": family.title,
        "domains": list(domains),
        "measured": list(measured),
        "entries": [
            {
                "name": entry.label,
                "method": entry.method,
                "mean": number(entry.mean, 7),
                "weights": [number(entry.weights.get(name, 0.0)) for name in domains],
                "losses": [number(entry.losses[name], 7) for name in measured],
                "seeds": [
                    {"name": run.name, "seed": run.seed, "mean": number(run.mean, 7)}
                    for run in entry.runs
                ],
            }
            for entry in shown
        ],
        "curves": _curves(shown, measured, domains, rows),
    }


def drawn(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries that are drawn: all, or the better half of them and some of the rest."""
    runs = sum(len(entry.runs) for entry in entries)
    if runs <= MOST_RUNS:
        return list(entries)
    most = max(2, MOST_RUNS * len(entries) // runs)
    best = most // 2
    places = np.linspace(best, len(entries) - 1, most - best).round().astype(int)
    return [*entries[:best], *(entries[i] for i in dict.fromkeys(places.tolist()))]


def points_each(curves: int) -> int:
    """Return how many points a curve may have when there are so many."""
    return int(np.clip(MOST_NUMBERS // max(1, curves), LEAST_POINTS, MOST_POINTS))


def _curves(
    entries: Sequence[Entry],
    measured: Sequence[str],
    domains: Sequence[str],
    rows: Sequence[Row],
) -> list[dict[str, Any]]:
    """Return held-out losses and weights by step, for every run."""
    owner = {run.name: index for index, entry in enumerate(entries) for run in entry.runs}
    courses: dict[str, dict[int, dict[str, Row]]] = {name: {} for name in owner}
    for row in rows:
        if row["split"] == "valid" and row["run"] in owner:
            courses[row["run"]].setdefault(row["step"], {})[row["domain"]] = row
    moving = {name for name, course in courses.items() if _moves(course)}
    count = len(owner) * (len(measured) + 1) + len(moving) * len(domains)
    most = points_each(count)
    return [
        _curve(name, owner[name], courses[name], measured, domains, most, name in moving)
        for name in owner
    ]


def _curve(
    name: str,
    entry: int,
    course: dict[int, dict[str, Row]],
    measured: Sequence[str],
    domains: Sequence[str],
    most: int,
    moves: bool,
) -> dict[str, Any]:
    steps = thin(sorted(course), most)
    at = [next(iter(course[step].values())) for step in steps]

    def losses(step: int) -> list[float]:
        return [row["loss"] for row in course[step].values()]

    weights = _between(steps, at, domains) if moves else None
    return {
        "name": name,
        "entry": entry,
        "seed": at[0]["seed"],
        "steps": steps,
        "tokens": [row["tokens"] for row in at],
        "mean": numbers(np.array([np.mean(losses(step)) for step in steps]), 6),
        "loss": [
            [
                number(course[step][domain]["loss"], 6) if domain in course[step] else None
                for step in steps
            ]
            for domain in measured
        ],
        "weights": None if weights is None else [numbers(column, 4) for column in weights.T],
    }


def _between(steps: Sequence[int], at: Sequence[Row], domains: Sequence[str]) -> FloatArray:
    """Return the mean weights since the step before, [steps, domains]; the table has them so far.

    The first row is that of the first step itself.
    """
    so_far = [json.loads(row["weights"] or "{}") for row in at]
    means = np.array([[float(w.get(name, 0.0)) for name in domains] for w in so_far])
    ends = np.array(steps, dtype=np.float64)[:, None]
    result = means.copy()
    if len(steps) > 1:
        result[1:] = np.diff(means * ends, axis=0) / np.diff(ends, axis=0)
    return np.asarray(np.clip(result, 0.0, 1.0))


def _moves(course: dict[int, dict[str, Row]]) -> bool:
    """Tell whether a run's mean weights changed."""
    texts = {next(iter(found.values()))["weights"] for found in course.values()}
    if len(texts) < 2:
        return False
    first, *others = (json.loads(text or "{}") for text in texts)
    return any(
        abs(other.get(name, 0.0) - weight) > 1e-4
        for other in others
        for name, weight in first.items()
    )


def thin(steps: list[int], most: int) -> list[int]:
    """Return at most so many of the steps, the first and the last among them."""
    if len(steps) <= most:
        return steps
    places = np.linspace(0, len(steps) - 1, most).round().astype(int)
    return [steps[i] for i in places.tolist()]
