"""How near what methods act on is to what their domains do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from megatron.experiments.report.figures import Figure, figures_host, lines, scatter, table
from megatron.monitor.report.shell import cell

NAME = "fidelity"
MOST_POINTS = 24


def fidelity_section(facts: Mapping[str, Any]) -> str:
    """Return the section of methods' fidelity along their runs."""
    methods = [
        (
            str(name),
            [
                _cell(one["fidelity"]),
                cell(float(one["points"]), str(one["points"])),
                cell(float(one["with_estimate"]), str(one["with_estimate"])),
            ],
        )
        for name, one in facts["methods"].items()
    ]
    points = [
        (
            str(one["run"]),
            [
                cell(float(one["step"]), f"{one['step']:,}"),
                _cell(one["fidelity"]),
                _cell(min(one["r2"]) if one["r2"] else None),
            ],
        )
        for one in facts["points"]
    ]
    hint = (
        f"{facts['law']}, from children of {facts['child_steps']} steps. Fidelity is half the "
        "cosine, half Spearman's rank correlation of the column sums of the A that a method acts "
        "on and of the measured one: 1 is the same, 0 unrelated. R² is the least of the linear "
        "law over the losses: where it is low, the measured A is no truth either."
    )
    return (
        f'<section id="fidelity"><h2>Fidelity</h2><p class="hint">{escape(hint)}</p>'
        f"{table(['method', 'mean fidelity', 'points', 'with an estimate'], methods)}"
        f"<h3>Along the runs</h3>{table(['run', 'step', 'fidelity', 'R²'], points)}"
        f"{figures_host(NAME)}</section>"
    )


def fidelity_sentences(facts: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Say how near each method is: (main, rest)."""
    known = [
        (float(one["fidelity"]), str(name))
        for name, one in facts["methods"].items()
        if one["fidelity"] is not None
    ]
    if not known:
        return [], ["No method had an estimate at a point whose children are whole."]
    said = ", ".join(f"{name} {value:.3f}" for value, name in sorted(known, reverse=True))
    without = [str(name) for name, one in facts["methods"].items() if one["fidelity"] is None]
    rest = [f"No estimate: {', '.join(without)}."] if without else []
    return [f"Mean fidelity: {said}."], [*rest, "1 is the measured direction, 0 unrelated."]


def _cell(value: float | None) -> str:
    known = math.nan if value is None else float(value)
    return cell(known, f"{known:.3f}".replace("-", "−"))


def fidelity_figures(facts: Mapping[str, Any]) -> list[Figure]:
    """Return the course of fidelity, and the sums that it compares, of length 1 each."""
    courses: dict[str, list[Mapping[str, Any]]] = {}
    for one in facts["points"]:
        courses.setdefault(str(one["run"]), []).append(one)
    course = lines(
        "Fidelity by step",
        "of each run",
        [
            (run, [one["step"] for one in mine], [_number(one["fidelity"]) for one in mine])
            for run, mine in courses.items()
        ],
    )
    known = [one for one in facts["points"] if one["A_method_sums"] is not None][:MOST_POINTS]
    return [
        course,
        *(
            scatter(
                f"{one['run']}, step {one['step']}",
                ("measured sum", "the method's"),
                zip(
                    map(str, one["domains"]),
                    _unit(one["A_star_sums"]),
                    _unit(one["A_method_sums"]),
                    strict=True,
                ),
            )
            for one in known
        ),
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _unit(sums: Sequence[float]) -> list[float]:
    vector = np.array(sums, dtype=np.float64)
    length = float(np.linalg.norm(vector))
    return list((vector / length if length > 0 else vector).tolist())
