"""The table of a study's mixtures or methods, best first, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from megatron.experiments.report.entries import Entry, Family
from megatron.experiments.report.files import StudyFiles
from megatron.monitor.report.compare import signed
from megatron.monitor.report.shell import cell, shade

MOST_ROWS = 400
MOST_COLUMNS = 24
_ALIKE = 5e-4


def entries_table(study: StudyFiles, family: Family) -> str:
    """Return the table of a family's entries.

    Weights are shown for as many domains as are read with ease, losses likewise.
    """
    if not family.entries:
        return '<p class="hint">No run has ended with a held-out loss.</p>'
    domains, measured = family.domains[:MOST_COLUMNS], family.measured[:MOST_COLUMNS]
    best = family.entries[0].mean
    worst = max((e.mean for e in family.entries if math.isfinite(e.mean)), default=best)
    spread = max(0.01, worst - best)
    several = any(len(entry.runs) > 1 for entry in family.entries)
    methods = len({entry.method for entry in family.entries}) > 1
    heads = [
        _head("", rows=1),
        *([_head("method")] if methods else []),
        _head("mean loss", "plain mean over domains, then over seeds; nats per token"),
        _head("to the best"),
        *([_head("sd", "standard deviation over seeds")] if several else []),
        _head("runs", "seeds, with links to what lies beside this file"),
        *(_head(name, "mean sampling weight over the run", "weight") for name in domains),
        *(_head(name, "held-out loss at the end, nats per token", "loss") for name in measured),
    ]
    lows = {
        name: min(
            (e.losses[name] for e in family.entries if math.isfinite(e.losses[name])),
            default=math.nan,
        )
        for name in measured
    }
    body = []
    for entry in family.entries[:MOST_ROWS]:
        cells = [
            *([f"<td>{escape(entry.method)}</td>"] if methods else []),
            cell(entry.mean, f"{entry.mean:.4f}"),
            cell(entry.mean - best, signed(entry.mean - best), shade(entry.mean - best, spread)),
            *([cell(entry.deviation, f"{entry.deviation:.4f}")] if several else []),
            f"<td>{seeds(study, entry)}</td>",
            *(_weight(entry.weights.get(name, 0.0)) for name in domains),
            *(_loss(entry.losses[name], lows[name]) for name in measured),
        ]
        body.append(f'<tr><th scope="row">{escape(entry.label)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{_left_out(family)}"
    )


def _head(name: str, tip: str = "", below: str = "", *, rows: int = 0) -> str:
    title = f' title="{escape(tip)}"' if tip else ""
    small = f"<small>{below}</small>" if below else ""
    return f'<th scope="col"{title}>{escape(name)}{small}</th>'


def _weight(weight: float) -> str:
    if not math.isfinite(weight):
        return "<td>–</td>"
    part = f' class="bar" style="--part:{min(1.0, max(0.0, weight)):.4f}"'
    return f'<td data-value="{weight!r}"{part}>{weight:.4g}</td>'


def _loss(loss: float, least: float) -> str:
    best = ' class="best"' if loss - least < _ALIKE / 10 else ""
    return cell(loss, f"{loss:.4f}", best)


def seeds(study: StudyFiles, entry: Entry) -> str:
    """Return the seeds of an entry, each a link to its run where that lies beside."""
    parts = []
    for run in entry.runs:
        link, text = study.link(run.name), f"seed {run.seed}"
        title = escape(run.name)
        parts.append(
            f'<a href="{escape(link)}" title="{title}">{text}</a>'
            if link is not None
            else f'<span title="{title}">{text}</span>'
        )
    return ", ".join(parts)


def _left_out(family: Family) -> str:
    notes = []
    if len(family.entries) > MOST_ROWS:
        notes.append(f"the best {MOST_ROWS} of {len(family.entries)} are shown")
    if max(len(family.domains), len(family.measured)) > MOST_COLUMNS:
        notes.append(
            f"the first {MOST_COLUMNS} of {max(len(family.domains), len(family.measured))} domains "
            "are shown"
        )
    return f'<p class="hint">{"; ".join(notes)}: table.csv has all.</p>' if notes else ""


def sentences(family: Family) -> tuple[list[str], list[str]]:
    """Say which entry is best, by how much, and what to make of it: (main, rest)."""
    known = [entry for entry in family.entries if math.isfinite(entry.mean)]
    if not known:
        return [], ["No run has ended with a held-out loss on every domain, so none is the best."]
    best = known[0]
    at = f" on {family.title}" if family.title else ""
    mixture = ", ".join(f"{name} {weight:.4g}" for name, weight in list(best.weights.items())[:8])
    more = ", …" if len(best.weights) > 8 else ""
    main = [f"Lowest mean held-out loss{at}: {best.label}, {best.mean:.4f} nats per token."]
    rest = [f"Its mean weights: {mixture}{more}."]
    if len(known) > 1:
        rest.append(
            f"Next is {known[1].label}, {signed(known[1].mean - best.mean)}; the last of "
            f"{len(known)} is {known[-1].label}, {signed(known[-1].mean - best.mean)}."
        )
        even = _even(known)
        if even is not None and even is not best:
            rest.append(f"Even weights ({even.label}) are at {signed(even.mean - best.mean)}.")
        if len(best.runs) > 1:
            rest.append(
                f"Over its {len(best.runs)} seeds the standard deviation is {best.deviation:.4f}."
            )
        rest.append(
            "The best of many noisy numbers looks better than it is: train it with fresh seeds "
            "before you believe in its margin."
        )
    return main, rest


def _even(entries: Sequence[Entry]) -> Entry | None:
    for entry in entries:
        values = list(entry.weights.values())
        if values and max(abs(value - 1 / len(values)) for value in values) < _ALIKE:
            return entry
    return None
