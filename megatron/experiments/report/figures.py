"""Figures that the page draws from a description: points, intervals, lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from megatron.monitor.report.payload import number

Figure = dict[str, Any]
Point = tuple[str, float, float]


def scatter(title: str, axes: tuple[str, str], points: Iterable[Point]) -> Figure:
    """Return named points (name, x, y) beside the line on which x is y; ``axes`` says what."""
    drawn = [{"name": name, "x": number(x, 7), "y": number(y, 7)} for name, x, y in points]
    note = f"{axes[1]} by {axes[0]}"
    return {"kind": "scatter", "title": title, "note": note, "axes": axes, "points": drawn}


def intervals(
    title: str,
    note: str,
    rows: Iterable[tuple[str, float, float, float]],
    *,
    zero: float | None = None,
) -> Figure:
    """Return rows (name, value, low, high) beside an upright line at ``zero``; all are shares."""
    drawn = [
        {"name": name, "value": number(value), "low": number(low), "high": number(high)}
        for name, value, low, high in rows
    ]
    return {"kind": "intervals", "title": title, "note": note, "rows": drawn, "zero": zero}


def lines(
    title: str, note: str, series: Iterable[tuple[str, Sequence[float], Sequence[float]]]
) -> Figure:
    """Return lines (name, steps, values)."""
    drawn = [
        {"name": name, "x": [number(v, 8) for v in x], "y": [number(v) for v in y]}
        for name, x, y in series
    ]
    return {"kind": "lines", "title": title, "note": note, "series": drawn}


def figures_host(name: str) -> str:
    """Return the place of the figures that the page's data has under a name."""
    return f'<div class="grid wide figures" data-figures="{name}"></div>'


def table(heads: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Return a table that sorts.

    Args:
        heads: of the columns, not escaped yet.
        rows: name, not escaped yet, and cells in HTML.
    """
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>' for name, cells in rows
    )
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
