"""A study's report, put together from the sections that its files allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron.experiments.report import nearness, regression
from megatron.experiments.report.comparison import (
    comparison_families,
    comparison_sentences,
    overview_section,
    task_section,
)
from megatron.experiments.report.comparison_data import task_data
from megatron.experiments.report.curves import MOST_DOMAINS, drawn, family_data
from megatron.experiments.report.entries import Family, families, run_ends
from megatron.experiments.report.figures import Figure
from megatron.experiments.report.files import (
    COMPARE,
    FIDELITY,
    GRAPH,
    LAW,
    REGMIX,
    REPORT,
    StudyFiles,
    load_study,
)
from megatron.experiments.report.graph import graph_section, graph_sentences
from megatron.experiments.report.head import beside_links, head, missing, missing_section
from megatron.experiments.report.law import law_data, law_section
from megatron.experiments.report.made import make_note
from megatron.experiments.report.nearness import (
    fidelity_figures,
    fidelity_section,
    fidelity_sentences,
)
from megatron.experiments.report.regression import (
    regression_figures,
    regression_section,
    regression_sentences,
)
from megatron.experiments.report.rounds import round_sentences, rounds, rounds_data, rounds_section
from megatron.experiments.report.tables import entries_table, sentences
from megatron.monitor.report.shell import asset, script_json, shell, verdict, write_page

OWN = "megatron.experiments.report"
# Results whose sections need nothing but their own file; those that a reader wants first are
# above the runs.
SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    REGMIX: regression_section,
    GRAPH: graph_section,
    FIDELITY: fidelity_section,
}
SENTENCES: Mapping[str, Callable[[Mapping[str, Any]], tuple[list[str], list[str]]]] = {
    REGMIX: regression_sentences,
    GRAPH: graph_sentences,
    FIDELITY: fidelity_sentences,
}
FIGURES: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], list[Figure]]]] = {
    REGMIX: (regression.NAME, regression_figures),
    FIDELITY: (nearness.NAME, fidelity_figures),
}
SCRIPTS = ("color.js", "scatter.js", "bars.js", "study.js")


def write_report(
    out: Path, *, command: Sequence[str] | None = None, failed: Mapping[str, str] | None = None
) -> Path:
    """Write ``report.html`` into a study's folder from the files there; return its path.

    Args:
        out: the folder (``--out``) of a command.
        command: the command line that has just ended, noted in ``made.json`` with date and
            versions; None: the note stays as it is.
        failed: why runs failed in it, by name.

    Raises:
        RunError: the folder holds no study, a file of it is damaged, or the disk refuses.
    """
    if command is not None:
        make_note(out, command, failed or {})
    path = out / REPORT
    write_page(path, page(load_study(out)))
    return path


def page(study: StudyFiles) -> str:
    """Return the whole page of a study."""
    ends = run_ends(study.rows)
    contest = study.results.get(COMPARE)
    found = comparison_families(contest, ends) if contest else families(ends)
    gone = missing(study)
    course = rounds(study)
    law = study.results.get(LAW)
    sections = [
        f'<header class="top">{head(study, ends)}{_verdict(study, found, course)}'
        f"{beside_links(study)}</header>",
        '<nav id="controls" aria-label="What the charts show" hidden></nav><main>',
        missing_section(study, gone),
        rounds_section(course) if course else "",
        overview_section(contest) if contest else "",
        *(make(study.results[name]) for name, make in SECTIONS.items() if name in study.results),
        *(_family_section(study, family, index) for index, family in enumerate(found)),
        law_section(law) if law else "",
        _notes(study, found),
        '</main><noscript><p class="noscript">The charts need JavaScript; the tables do not.</p>'
        "</noscript>",
    ]
    data: dict[str, Any] = {
        "families": [family_data(family, study.rows) for family in found],
        "tasks": [task_data(contest, family.title) for family in found] if contest else [],
        "law": law_data(law) if law else None,
        "figures": {
            host: figures(study.results[name])
            for name, (host, figures) in FIGURES.items()
            if name in study.results
        },
        "rounds": rounds_data(course) if course else None,
    }
    return shell(
        f"{study.name} · study",
        "\n".join(part for part in sections if part),
        script_json(data),
        [asset(name, OWN) for name in SCRIPTS],
        asset("study.css", OWN),
    )


def _verdict(
    study: StudyFiles, found: Sequence[Family], course: Sequence[Mapping[str, float]]
) -> str:
    if COMPARE in study.results:
        return verdict(*comparison_sentences(study.results[COMPARE]))
    if course:
        return verdict(*round_sentences(course))
    for name, said_of in SENTENCES.items():
        if name in study.results:
            return verdict(*said_of(study.results[name]))
    said = [sentences(family) for family in found]
    if not said:
        return ""
    if len(said) == 1:
        return verdict(*said[0])
    return verdict([line for main, _ in said for line in main], [])


def _family_section(study: StudyFiles, family: Family, index: int) -> str:
    title = f": {escape(family.title)}" if family.title else ""
    contest = study.results.get(COMPARE)
    before = (
        task_section(study, contest, family, index)
        if contest
        else f"<h2>Best first{title}</h2>{entries_table(study, family)}"
        f'<h2>Loss by mixture{title} <span class="switch by"></span></h2>'
        '<p class="hint map-hint"></p><div class="grid wide map"></div>'
        '<p class="rest map-more"></p>'
    )
    return (
        f'<section class="family" data-family="{index}">{before}'
        f'<h2>Held-out loss by step{title} <span class="switch curve-what"></span></h2>'
        '<p class="hint">Nats per token; the mouse names a line.</p>'
        '<figure><figcaption>Mean over domains</figcaption><div class="chart curve-mean"></div>'
        '<div class="keys curve-keys"></div></figure><div class="grid curves"></div>'
        '<p class="rest curves-more"></p>'
        f'<div class="moving" hidden><h2>Weights by step{title}</h2><p class="hint">Means between '
        'two validations, over the seeds.</p><div class="rivers"></div></div></section>'
    )


def _notes(study: StudyFiles, found: Sequence[Family]) -> str:
    lines = []
    if study.planned:
        lines.append(
            "FLOPs are those of the training steps, with causal attention counted (half of the "
            "full square); validations and extra tokens are not among them."
        )
    if found:
        lines.append(
            "A mean loss is the plain mean over the measured domains, then over seeds. Weights "
            "are means of the sampling probabilities over the run."
        )
    for family in found:
        shown = len(drawn(family.entries))
        if shown < len(family.entries):
            lines.append(
                f"The charts show {shown} of {len(family.entries)} mixtures: the best, and some "
                "of the others."
            )
        if max(len(family.domains), len(family.measured)) > MOST_DOMAINS:
            lines.append(f"The charts show the first {MOST_DOMAINS} domains.")
    if study.rows:
        lines.append("table.csv and table.parquet beside this file hold every number.")
    items = "".join(f"<li>{escape(line)}</li>" for line in dict.fromkeys(lines))
    if not items:
        return ""
    return f'<section id="notes"><h2>How to read this</h2><ul>{items}</ul></section>'
