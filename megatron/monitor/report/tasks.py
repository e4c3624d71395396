"""What evaluations by tasks found, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TypeVar

from megatron.monitor.report.load import RunData
from megatron.monitor.report.shell import run_head

Item = TypeVar("Item")
_MOST_COLUMNS = 8


def task_section(runs: Sequence[RunData]) -> str:
    """Return the page's section: metrics down, steps of each run across; nothing without any."""
    columns = [
        (index, found)
        for index, run in enumerate(runs)
        for found in evenly(run.tasks, 1 if len(runs) > 1 else _MOST_COLUMNS)
    ]
    if not columns:
        return ""
    names = list(dict.fromkeys(key for _, found in columns for key in found.metrics))
    heads = "".join(
        run_head(index, runs[index].name, f"step {found.step:,}") for index, found in columns
    )
    body = "".join(
        f'<tr><th scope="row">{escape(task)}<small>{escape(metric)}</small></th>'
        + "".join(_cell(found.metrics.get((task, metric))) for _, found in columns)
        + "</tr>"
        for task, metric in names
    )
    return (
        '<section id="tasks"><h2>Tasks</h2>'
        '<p class="hint">Metrics of lm-eval, on the model as it was after that step.</p>'
        f'<div class="scroll"><table><thead><tr><th scope="col">task</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def evenly(found: Sequence[Item], most: int) -> list[Item]:
    """Return at most ``most`` items, evenly chosen, the last among them."""
    count = len(found)
    if count <= most:
        return list(found)
    return [
        found[count - 1 - (most - 1 - n) * (count - 1) // max(1, most - 1)] for n in range(most)
    ]


def _cell(value: float | None) -> str:
    return "<td>–</td>" if value is None else f"<td>{value:.4g}</td>"
