"""What a fitted law says, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from megatron.experiments.bounds import FloatArray
from megatron.experiments.carried import carried_text
from megatron.experiments.report.curves import MOST_DOMAINS
from megatron.experiments.static_law import StaticLaw
from megatron.monitor.report.payload import number, numbers
from megatron.monitor.report.shell import cell

MOST_FITTED = 1000
_LINE = 81


def static_law(facts: Mapping[str, Any]) -> StaticLaw:
    """Return the law that ``law.json`` holds."""
    return StaticLaw(constant=np.array(facts["c"]), rate=np.array(facts["A"]))


def law_section(facts: Mapping[str, Any]) -> str:
    """Return the section of a law: its best mixture, its fit, its numbers."""
    sure = f"{float(facts['confidence']):.0%}"
    return (
        '<section id="law"><h2>The law</h2>'
        f'<p class="hint">{escape(str(facts["form"]))}, fitted to {int(facts["runs"])} runs. '
        f"Intervals are {sure} bootstrap intervals, each for itself. Where the R² of runs that "
        "were left out is low, or the intervals are wide, the optimum means little.</p>"
        f'<div class="pair">{_mixture_table(facts, sure)}'
        "<figure><figcaption>Best mixture <span>weight with its interval; │ even</span>"
        '</figcaption><div class="chart" id="chart-optimum"></div></figure></div>'
        f"<h3>Measured against predicted</h3>{_fit_table(facts)}"
        f'<div class="grid" id="law-grid"></div>{_carried(facts)}</section>'
    )


def _carried(facts: Mapping[str, Any]) -> str:
    """Return how the losses were carried to other steps or sizes; nothing if they were not."""
    told = [line for line in carried_text(facts.get("carried")) if line]
    return "".join(f'<p class="hint">{escape(line)}</p>' for line in told)


def _mixture_table(facts: Mapping[str, Any], sure: str) -> str:
    rows = zip(
        facts["domains"], facts["mixture"], facts["mixture_low"], facts["mixture_high"], strict=True
    )
    body = "".join(
        f'<tr><th scope="row">{escape(str(name))}</th>'
        + "".join(cell(float(value), f"{value:.4f}") for value in values)
        + "</tr>"
        for name, *values in rows
    )
    value, low, high = (
        f"{float(facts[key]):.4f}" for key in ("objective", "objective_low", "objective_high")
    )
    return (
        '<div><div class="scroll"><table class="sortable"><thead><tr><th scope="col">domain</th>'
        '<th scope="col">weight</th><th scope="col">low</th><th scope="col">high</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f'<p class="hint">Predicted objective there: {value} ({sure}: {low} to {high}) nats per '
        f"token; the lowest average loss of a run was {float(facts['best_run']):.4f}.</p></div>"
    )


def _fit_table(facts: Mapping[str, Any]) -> str:
    unseen = facts["r2_held_out"] or [math.nan] * len(facts["measured"])
    names = [str(name) for name in facts["domains"]]
    heads = ["measured", "c", "R²", "R² of runs left out", "predicted at the best"]
    shown = names if len(names) <= MOST_DOMAINS else []
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads) + "".join(
        f'<th scope="col" title="how fast weight on it lowers the loss">'
        f"{escape(name)}<small>A</small></th>"
        for name in shown
    )
    body = ""
    rows = zip(
        facts["measured"], facts["c"], facts["r2"], unseen, facts["losses"], facts["A"], strict=True
    )
    for name, constant, r2, left_out, loss, rate in rows:
        cells = [
            cell(float(constant), f"{constant:.4f}"),
            cell(float(r2), f"{r2:.3f}"),
            cell(float(left_out), f"{left_out:.3f}"),
            cell(float(loss), f"{loss:.4f}"),
            *(cell(float(value), f"{value:.3g}") for value in rate[: len(shown)]),
        ]
        body += f'<tr><th scope="row">{escape(str(name))}</th>{"".join(cells)}</tr>'
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def law_data(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page draws of a law."""
    fitted: Sequence[Mapping[str, Any]] = list(facts.get("fitted") or [])[:MOST_FITTED]
    measured = [str(name) for name in facts["measured"]][:MOST_DOMAINS]
    law = static_law(facts)
    actual = _rows([run["losses"] for run in fitted], len(facts["measured"]))
    mixtures = _rows([run["mixture"] for run in fitted], len(facts["domains"]))
    predicted = law.predict(mixtures)
    # A law of other steps or sizes does not go through the runs' own losses.
    two = len(facts["domains"]) == 2 and not facts.get("carried")
    line = np.linspace(0.0, 1.0, _LINE)
    curve = law.predict(np.stack([line, 1.0 - line], axis=1)) if two else None
    return {
        "domains": [str(name) for name in facts["domains"]],
        "measured": measured,
        "mixture": [number(value) for value in facts["mixture"]],
        "low": [number(value) for value in facts["mixture_low"]],
        "high": [number(value) for value in facts["mixture_high"]],
        "losses": [number(value, 7) for value in facts["losses"]],
        "runs": [str(run["run"]) for run in fitted],
        "actual": [numbers(column, 7) for column in actual.T[: len(measured)]],
        "predicted": [numbers(column, 7) for column in predicted.T[: len(measured)]],
        "line": None if curve is None else numbers(line),
        "curve": None if curve is None else [numbers(c, 7) for c in curve.T[: len(measured)]],
        "curve_mean": None if curve is None else numbers(curve.mean(axis=1), 7),
    }


def _rows(values: Sequence[Sequence[float]], columns: int) -> FloatArray:
    return np.array(values, dtype=np.float64).reshape(len(values), columns)
