"""The numbers that the page draws of a comparison."""

from __future__ import annotations

from typing import Any

from megatron.experiments.report.comparison import KINDS, OBJECTIVES, Facts, charged, value
from megatron.monitor.report.payload import number

MOST_SWEEP = 400


def task_data(facts: Facts, name: str) -> dict[str, Any]:
    """Return what the page draws of a task."""
    task = facts["tasks"][name]
    objectives = [key for key in OBJECTIVES if key in task["objectives"]]
    return {
        "name": name,
        "baseline": facts["baseline"],
        "objectives": {key: OBJECTIVES[key] for key in objectives},
        "kinds": list(KINDS.values()),
        "domains": list(task["domains"]),
        "methods": [
            _method(method, one, objectives, value(task["budget"]))
            for method, one in task["methods"].items()
        ],
        "sweep": _sweep(task),
    }


def _method(name: str, one: Facts, objectives: list[str], budget: float) -> dict[str, Any]:
    differences = one.get("difference") or {}
    mean = one.get("mean") or {}
    spent = one.get("spent")
    weights = mean.get("weights") or {}
    return {
        "name": name,
        "differences": {key: _difference(differences.get(key)) for key in objectives},
        "means": {
            key: number(value((mean.get("objectives") or {}).get(key)), 7) for key in objectives
        },
        "weights": {domain: number(value(weight)) for domain, weight in weights.items()},
        "charges": [number(amount / budget) for amount in charged(spent).values()]
        if spent and "planned" in one and budget > 0
        else None,
    }


def _difference(found: Facts | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "mean": number(value(found["mean"])),
        "interval": [number(value(end)) for end in found["interval"] or (None, None)],
        "bootstrap": [number(value(end)) for end in found["bootstrap"] or (None, None)],
        "p_holm": number(value(found["p_holm"]), 3),
        "wins": found["wins"],
    }


def _sweep(task: Facts) -> list[dict[str, Any]] | None:
    """Return the oracle's sweep, best first."""
    oracle = task.get("oracle")
    if not oracle:
        return None
    points = [
        {
            "name": f"mixture {place}",
            "mean": number(value(point["loss"]), 7),
            "weights": [number(value(point["weights"].get(name, 0.0))) for name in task["domains"]],
        }
        for place, point in enumerate(oracle["sweep"])
    ]
    ordered = sorted(points, key=lambda point: (point["mean"] is None, point["mean"] or 0.0))
    return ordered[:MOST_SWEEP]
