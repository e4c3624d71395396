"""Averages over domains, and what ``evaluate.py`` measured of checkpoints, as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from megatron.monitor.charts import perplexity
from megatron.monitor.report.load import RunData
from megatron.monitor.report.measured import AVERAGES, CheckpointLosses, Validation
from megatron.monitor.report.shell import cell, run_head
from megatron.monitor.report.tasks import evenly

_TITLES = dict(
    zip(
        AVERAGES,
        ("mean loss", "mean perplexity", "weighted loss", "weighted perplexity"),
        strict=True,
    )
)
_SPLITS = {"valid": "validation", "test": "test"}
_MOST_COLUMNS = 8


def averages_section(runs: Sequence[RunData]) -> str:
    """Return the page's section of averages over domains; nothing where none are recorded."""
    body = "".join(
        _averages_row(index, run.name, split, measured)
        for index, run in enumerate(runs)
        for split, measured in _measured(run)
    )
    if not body:
        return ""
    heads = "".join(
        f'<th scope="col" title="validation/{key}">{title}</th>' for key, title in _TITLES.items()
    )
    return (
        '<section id="averages"><h2>Averages over domains</h2>'
        '<p class="hint">Held-out losses in nats per token and perplexities, at the end and, '
        "small, at the start. Plain: every domain counts alike. Weighted: by valid_weight and "
        "test_weight of the domains or, without them, by the weights that the run started with. A "
        "mean perplexity is the mean of the domains’ perplexities.</p>"
        '<div class="scroll"><table><thead><tr><th scope="col">measured</th>'
        f'<th scope="col">step</th>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
        "</section>"
    )


def _measured(run: RunData) -> Iterator[tuple[str, Sequence[Validation]]]:
    for split, measured in (("valid", run.validations), ("test", run.tests)):
        if any(one.averages for one in measured):
            yield split, measured


def _averages_row(index: int, name: str, split: str, measured: Sequence[Validation]) -> str:
    first, last = measured[0], measured[-1]
    cells = []
    for key in AVERAGES:
        value, before = (one.averages.get(key, math.nan) for one in (last, first))
        beside = f"<small>{before:.4f}</small>" if math.isfinite(before) and last != first else ""
        cells.append(
            f'<td data-value="{value!r}">{value:.4f}{beside}</td>'
            if math.isfinite(value)
            else "<td>–</td>"
        )
    start = f"<small>{first.step:,}</small>" if last != first else ""
    return (
        f"<tr>{run_head(index, name, _SPLITS[split], scope='row')}"
        f"<td>{last.step:,}{start}</td>{''.join(cells)}</tr>"
    )


def checkpoint_section(runs: Sequence[RunData]) -> str:
    """Return the page's section of checkpoints: domains down, checkpoints across."""
    columns = [
        (index, found)
        for index, run in enumerate(runs)
        for split in _SPLITS
        for found in evenly(
            [one for one in run.checkpoints if one.split == split],
            2 if len(runs) > 1 else _MOST_COLUMNS,
        )
    ]
    if not columns:
        return ""
    heads = "".join(
        run_head(index, runs[index].name, f"step {found.losses.step:,}, {_SPLITS[found.split]}")
        for index, found in columns
    )
    domains = list(dict.fromkeys(name for _, found in columns for name in found.losses.loss))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(_perplexity(found, name) for _, found in columns)
        + "</tr>"
        for name in domains
    )
    foot = "".join(
        f'<tr><th scope="row">{_TITLES[key]}</th>'
        + "".join(
            cell(value := found.losses.averages.get(key, math.nan), f"{value:.4f}")
            for _, found in columns
        )
        + "</tr>"
        for key in AVERAGES
        if any(key in found.losses.averages for _, found in columns)
    )
    return (
        '<section id="checkpoints"><h2>Perplexity of checkpoints</h2>'
        '<p class="hint">Measured by evaluate.py --eval_perplexity on the held-out data of every '
        "domain; small, the loss in nats per token.</p>"
        '<div class="scroll"><table class="sortable"><thead><tr><th scope="col">domain</th>'
        f"{heads}</tr></thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table></div></section>"
    )


def _perplexity(found: CheckpointLosses, domain: str) -> str:
    loss = found.losses.loss.get(domain, math.nan)
    value = perplexity(loss)
    if not math.isfinite(value):
        return "<td>–</td>"
    return f'<td data-value="{value!r}">{value:.4g}<small>{loss:.4f}</small></td>'
