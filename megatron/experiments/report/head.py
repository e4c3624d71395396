"""The head of a study's report: what it is, what it took, what failed."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape

from megatron.experiments.report.entries import RunEnd
from megatron.experiments.report.files import StudyFiles, beside
from megatron.monitor.report.shell import figures
from megatron.monitor.throughput import duration, short


def head(study: StudyFiles, ends: Sequence[RunEnd]) -> str:
    """Return title, command line, versions and figures."""
    made = study.made
    lines = [
        f"<h1>{escape(study.name)}</h1>",
        f'<p class="made">{escape(str(study.out.resolve()))}',
    ]
    lines.append(f" · {escape(made.date)}" if made.date else "")
    lines.append(f" · {escape(made.machine)}" if made.machine else "")
    versions = ", ".join(f"{name} {text}" for name, text in made.versions.items())
    lines.append(f" · {escape(versions)}</p>" if versions else "</p>")
    if made.command:
        lines.append(f'<pre class="command">{escape(shlex.join(made.command))}</pre>')
    found = tiles(study, ends)
    lines.append(figures(found) if found else "")
    return "".join(lines)


def tiles(study: StudyFiles, ends: Sequence[RunEnd]) -> list[tuple[str, str]]:
    """Return (caption, figure) pairs."""
    result = []
    runs = {run["key"]: run for run in study.planned}
    if runs:
        done = _ended(study)
        keys = {run["key"] for run in study.planned if run["run"] in done}
        result.append(("runs ended", f"{len(keys)} of {len(runs)}"))
        tokens = sum(int(run["tokens"]) for run in runs.values())
        flops = math.fsum(float(run["flops"]) for run in runs.values())
        result.append(("tokens", short(tokens)))
        result.append(("training FLOPs (causal attention)", f"{flops:.3g}"))
    elif ends:
        result.append(("runs", f"{len(ends)}"))
    extra = sum(_at_ends(study, "extra_tokens").values())
    if extra > 0:
        result.append(("extra tokens (not in the FLOPs)", short(extra)))
    seconds = [s for s in _at_ends(study, "run_seconds").values() if math.isfinite(s)]
    if seconds:
        result.append(("time of all runs together", duration(math.fsum(seconds))))
    seeds = sorted({run["seed"] for run in study.planned} or {run.seed for run in ends})
    if seeds:
        more = f" and {len(seeds) - 8} more" if len(seeds) > 8 else ""
        result.append(("seeds", ", ".join(map(str, seeds[:8])) + more))
    domains = {tuple(run["weights"]) for run in runs.values()}
    if len(domains) == 1:
        result.append(("domains", f"{len(domains.pop())}"))
    return result


def _ended(study: StudyFiles) -> set[str]:
    """Return the names of the runs with a held-out loss at their end."""
    return {row["run"] for row in study.rows if row["last"]}


def _at_ends(study: StudyFiles, column: str) -> dict[str, float]:
    """Return a column at the ends of runs, each folder once."""
    return {row["key"]: float(row[column]) for row in study.rows if row["last"]}


def missing(study: StudyFiles) -> dict[str, str]:
    """Return the runs that have no result, with the reason; in the plan's order."""
    done = _ended(study)
    found = {name: why for name, why in study.made.failed.items() if name not in done}
    for run in study.planned:
        if run["run"] not in done and run["run"] not in found:
            found[run["run"]] = "no held-out loss at its end is in the table"
    order = [run["run"] for run in study.planned]
    rank = {name: place for place, name in enumerate(order)}
    return dict(sorted(found.items(), key=lambda item: rank.get(item[0], len(rank))))


def missing_section(study: StudyFiles, gone: Mapping[str, str]) -> str:
    """Return the section of what failed; nothing if nothing did."""
    if not gone:
        return ""
    items = []
    for name, why in list(gone.items())[:100]:
        link = study.link(name)
        shown = f'<a href="{escape(link)}">{escape(name)}</a>' if link else escape(name)
        items.append(f"<li><b>{shown}</b>: {escape(why)}</li>")
    if len(gone) > 100:
        items.append(f"<li>and {len(gone) - 100} more</li>")
    return (
        f'<section id="failed"><h2>Runs without a result: {len(gone)}</h2><p class="hint">They '
        "are in none of the figures below, and their mixtures cannot be the best. The same "
        f"command, given again, tries them once more.</p><ul>{''.join(items)}</ul></section>"
    )


def beside_links(study: StudyFiles) -> str:
    """Return links to the reports of what lies in or above the study's folder."""
    found = []
    for text, folder in (
        ("the law of this study", study.out / "law"),
        ("the study", study.out / ".."),
    ):
        link = beside(study.out, folder) if (folder / "report.html").is_file() else None
        if link:
            found.append(f'<a href="{escape(link)}">report of {text}</a>')
    return f'<p class="hint">Beside this: {", ".join(found)}.</p>' if found else ""
