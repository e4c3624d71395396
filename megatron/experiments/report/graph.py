"""Skill-It's graph: who helps whom."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from megatron.experiments.report.figures import table
from megatron.monitor.report.shell import cell, shade


def graph_section(facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the section of a graph: a row for each domain that was trained on alone."""
    names = list(dict.fromkeys(str(name) for row in facts.values() for name in row))
    values = [float(value) for row in facts.values() for value in row.values()]
    most = max([0.01, *(abs(value) for value in values if math.isfinite(value))])
    rows = []
    for source, row in facts.items():
        cells = []
        for name in names:
            value = float(row.get(name, math.nan))
            cells.append(cell(value, f"{value:.4f}".replace("-", "−"), shade(-value, most)))
        rows.append((str(source), cells))
    hint = (
        "Training on the row's domain alone takes this share off the column's held-out loss: "
        "blue helps, red harms."
    )
    return (
        f'<section id="graph"><h2>The graph</h2><p class="hint">{escape(hint)}</p>'
        f"{table(['trained on', *names], rows)}</section>"
    )


def graph_sentences(facts: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Say who helps others the most, and who harms: (main, rest)."""
    across = [
        (float(value), str(source), str(name))
        for source, row in facts.items()
        for name, value in row.items()
        if source != name and math.isfinite(float(value))
    ]
    if not across:
        return [], ["No domain's effect on another was measured."]
    value, source, name = max(across)
    harms = sum(value < 0 for value, _, _ in across)
    return [f"{source} helps {name} the most: {value:.1%} off its held-out loss."], [
        f"Of {len(across)} effects on other domains {harms} are harmful."
    ]
