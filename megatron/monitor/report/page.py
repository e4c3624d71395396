"""The report's HTML: everything that can be read without a script is written here."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron.monitor.report.compare import (
    Comparison,
    compare,
    conditions,
    group_runs,
    signed,
    verdicts,
)
from megatron.monitor.report.cost import cost_section
from megatron.monitor.report.groups import group_rows
from megatron.monitor.report.held_out import averages_section, checkpoint_section
from megatron.monitor.report.load import RunData, load_runs
from megatron.monitor.report.payload import MOST_VALIDATIONS, domain_order, payload
from megatron.monitor.report.shell import (
    asset,
    cell,
    figures,
    fill,
    run_head,
    shade,
    shell,
    verdict,
    write_page,
)
from megatron.monitor.report.summary import (
    DomainRow,
    domain_rows,
    percent,
    progress,
    run_sentences,
    tiles,
)
from megatron.monitor.report.tasks import task_section
from megatron.monitor.throughput import short


def write_report(
    folders: Sequence[Path | str], output: Path | str | None = None, baseline: str | None = None
) -> Path:
    """Write the report of the runs in ``folders`` and return its path.

    Args:
        folders: run folders; the first holds the report unless ``output`` is given.
        output: the file to write.
        baseline: name or folder of the run that the others are compared with.

    Raises:
        RunError: a folder is no run, or the file cannot be written.
        ConfigError: ``baseline`` names none of the runs.
    """
    runs = load_runs(folders)
    comparison = compare(runs, baseline)
    path = Path(output) if output is not None else runs[0].path / "report.html"
    write_page(path, page(runs, comparison))
    return path


def words(folders: Sequence[Path | str], baseline: str | None = None) -> str:
    """Return what the report of ``folders`` says in words, for the console.

    Raises:
        RunError: a folder is no run.
        ConfigError: ``baseline`` names none of the runs.
    """
    runs = load_runs(folders)
    comparison = compare(runs, baseline)
    lines: list[str] = (
        [] if comparison is None else [*verdicts(comparison), *conditions(comparison)]
    )
    for run in runs:
        lines += [*([""] if lines else []), f"{run.name} ({run.mixing or 'method not known'}):"]
        lines += [f"  {sentence}" for sentence in run_sentences(run, domain_rows(run))]
    return "\n".join(lines)


def page(runs: Sequence[RunData], comparison: Comparison | None) -> str:
    """Return the whole page."""
    groups = comparison.groups if comparison is not None else tuple(group_runs(runs)[0])
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    parts = {
        "HEAD": head(runs, comparison, title),
        "COMPARISON": comparison_table(runs, comparison) if comparison is not None else "",
        "TABLES": "\n".join(run_table(run, i, len(runs)) for i, run in enumerate(runs)),
        "AVERAGES": averages_section(runs),
        "CHECKPOINTS": checkpoint_section(runs),
        "TASKS": task_section(runs),
        "COST": cost_section(runs),
        "NOTES": notes(runs),
    }
    body = fill(asset("page.html"), parts)
    against = comparison.against if comparison is not None else None
    return shell(
        f"{title} · mixture report", body, payload(runs, groups, against), [asset("page.js")]
    )


def head(runs: Sequence[RunData], comparison: Comparison | None, title: str) -> str:
    """Return title, verdict and figures."""
    now = datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    places = ", ".join(str(run.path.resolve()) for run in runs[:3]) + (
        " …" if len(runs) > 3 else ""
    )
    lines = [f'<h1>{escape(title)}</h1><p class="made">{escape(places)} · report made {now}</p>']
    if len(runs) == 1:
        run = runs[0]
        lines.append(figures(tiles(run)))
        main, *rest = run_sentences(run, domain_rows(run))
        lines.append(verdict([main], [*rest, ALONE]))
    elif comparison is not None:
        lines.append(verdict(verdicts(comparison), conditions(comparison)))
    else:
        lines.append(verdict([], [INCOMPARABLE]))
    return "\n".join(lines)


ALONE = (
    "One run cannot say whether its mixing helped. To know, give the report a run with the same "
    "budget and static weights as well: tools/report.py RUN BASELINE."
)
INCOMPARABLE = (
    "These runs cannot be compared yet: each needs held-out losses measured in training, on at "
    "least one common domain."
)


def comparison_table(runs: Sequence[RunData], comparison: Comparison) -> str:
    """Return the table of held-out losses at equal tokens, a column for each run."""
    base = comparison.baseline
    own = comparison.groups[base]
    # A run without a partner is compared with the baseline; the baseline's own group with nothing.
    partner = [
        i if comparison.groups[i] == own else base if other is None else other
        for i, other in enumerate(comparison.against)
    ]
    losses = {
        name: [v.loss[name] for v in comparison.at]
        for name in domain_order(runs)
        if name in comparison.domains
    }
    # Faint while all is small: the strongest shade means a hundredth of a nat or more.
    gaps = (abs(row[i] - row[partner[i]]) for row in losses.values() for i in range(len(runs)))
    spread = max(0.01, *gaps)
    heads = "".join(
        run_head(i, run.name, "baseline" if comparison.groups[i] == own else progress(run))
        for i, run in enumerate(runs)
    )
    rows = [_comparison_row(name, row, partner, spread) for name, row in losses.items()]
    averages = [comparison.average(i) for i in range(len(runs))]
    mean = _comparison_row("mean of domains", averages, partner, spread)
    at = "".join(f"<td>step {v.step:,}, {short(v.tokens)} tokens</td>" for v in comparison.at)
    pairing = " of the same seed" if comparison.groups.count(own) > 1 else ""
    return (
        '<section id="comparison"><h2>Held-out loss at equal tokens</h2>'
        f'<p class="hint">Nats per token, with the difference to the baseline{pairing}: blue is '
        "lower (better), red is higher.</p>"
        '<div class="scroll"><table class="sortable compare"><thead><tr>'
        f'<th scope="col">domain</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
        f'<tfoot>{mean}<tr class="faint"><th scope="row">measured at</th>{at}</tr>'
        "</tfoot></table></div></section>"
    )


def _comparison_row(
    name: str, losses: Sequence[float], partner: Sequence[int], spread: float
) -> str:
    cells = []
    for index, loss in enumerate(losses):
        difference = loss - losses[partner[index]]
        beside = "" if partner[index] == index else f"<small>{signed(difference)}</small>"
        tint = shade(difference, spread)
        cells.append(f'<td data-value="{loss!r}"{tint}>{loss:.4f}{beside}</td>')
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


COLUMNS = (
    ("domain", ""),
    ("asked", "mean of the sampling probabilities"),
    ("drawn", "share of the samples that were trained on"),
    ("of tokens", "share of the tokens that counted in the loss"),
    ("first → last", "sampling probability at the first and the last step"),
    ("tokens", ""),
    ("epochs", "passes over the domain's training data"),
    ("loss at start", "first held-out loss, nats per token"),
    ("at end", "last held-out loss, nats per token"),
    ("change", "of the held-out loss"),
    ("bits / byte", "last held-out loss per byte of text: comparable between domains"),
)


def run_table(run: RunData, index: int, count: int) -> str:
    """Return the table of domains of one run; with several, the first is open."""
    rows = domain_rows(run)
    most = max((row.tokens for row in rows), default=1.0) or 1.0
    order = {name: i for i, name in enumerate(domain_order([run]))}
    body = "".join(_domain_row(row, most) for row in sorted(rows, key=lambda r: order[r.name]))
    heads = "".join(
        f'<th scope="col"{f""" title="{escape(tip)}" """ if tip else ""}>{escape(name)}</th>'
        for name, tip in COLUMNS
    )
    table = (
        f'<div class="scroll"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody><tfoot>{_total_row(run, rows)}</tfoot></table></div>"
    )
    table = _group_table(run, rows, heads) + table
    if count == 1:
        return table
    words = "".join(f"<li>{escape(sentence)}</li>" for sentence in run_sentences(run, rows))
    return (
        f"<details{' open' if index == 0 else ''}>"
        f"<summary><b>{escape(run.name)}</b> {escape(run.mixing)} · "
        f"{escape(progress(run))}</summary><ul>{words}</ul>{table}</details>"
    )


def _group_table(run: RunData, rows: Sequence[DomainRow], heads: str) -> str:
    """Return the table of groups, above that of domains; nothing if the run has none."""
    groups = group_rows(run, rows)
    if not groups:
        return ""
    most = max(row.tokens for row in groups) or 1.0
    body = "".join(_domain_row(row, most) for row in groups)
    return (
        '<p class="hint">Groups, on which the method acted: shares are sums, losses are means '
        "weighted by what was asked of each domain.</p>"
        f'<div class="scroll"><table class="sortable groups"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _domain_row(row: DomainRow, most: float) -> str:
    cells = [
        cell(row.asked, f"{row.asked:.2%}"),
        cell(row.realised, f"{row.realised:.2%}"),
        cell(row.token_share, f"{row.token_share:.2%}"),
        cell(row.last - row.first, f"{row.first:.1%} → {row.last:.1%}"),
        f'<td data-value="{row.tokens!r}" class="bar" style="--part:{row.tokens / most:.4f}">'
        f"{short(row.tokens)}</td>",
        cell(row.epochs, f"{row.epochs:.3f}"),
        cell(row.start, f"{row.start:.4f}"),
        cell(row.end, f"{row.end:.4f}"),
        cell(row.change, percent(row.change), shade(row.change, 1.0)),
        cell(row.bits_per_byte, f"{row.bits_per_byte:.4f}"),
    ]
    return f'<tr><th scope="row">{escape(row.name)}</th>{"".join(cells)}</tr>'


def _total_row(run: RunData, rows: Sequence[DomainRow]) -> str:
    both = [row for row in rows if math.isfinite(row.start) and math.isfinite(row.end)]
    start = sum(row.start for row in both) / len(both) if both else math.nan
    end = sum(row.end for row in both) / len(both) if both else math.nan
    bits = [row.bits_per_byte for row in rows if math.isfinite(row.bits_per_byte)]
    mean_bits = sum(bits) / len(bits) if len(bits) == len(rows) else math.nan
    change = end / start - 1 if both else math.nan
    cells = [
        *("<td>100%</td>" for _ in range(3)),
        "<td></td>",
        cell(0.0, short(float(run.ledger.tokens.sum()))),
        "<td></td>",
        cell(start, f"{start:.4f}"),
        cell(end, f"{end:.4f}"),
        cell(change, percent(change)),
        cell(mean_bits, f"{mean_bits:.4f}"),
    ]
    return f'<tr><th scope="row">all · mean of domains</th>{"".join(cells)}</tr>'


def notes(runs: Sequence[RunData]) -> str:
    """Return what a careful reader wants to know about the figures."""
    lines = []
    for run in runs:
        width = run.ledger.width
        points = (
            "every step is drawn"
            if width == 1
            else f"a point of the step curves stands for {width:,} steps: losses are the mean over "
            "their tokens, probabilities the mean over the steps, the band of the training loss "
            "spans the lowest and highest single step"
        )
        lines.append(f"{run.name}: {len(run.ledger.steps):,} steps; {points}.")
        if len(run.validations) > MOST_VALIDATIONS:
            lines.append(
                f"{run.name}: {MOST_VALIDATIONS} of {len(run.validations)} validations are drawn; "
                "the tables use the first and the last."
            )
        lines += [f"{run.name}: {note}." for note in run.notes]
    lines.append(
        "Training loss is the mean over tokens, whatever weights the loss had, so that runs with "
        "different methods can be compared. It depends on the mixture that was drawn: a run that "
        "draws easier domains shows a lower training loss without having learned more. The "
        "held-out losses, on the same windows each time, do not."
    )
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>"
