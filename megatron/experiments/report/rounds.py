"""DoReMi's rounds: what each reference was trained on, and what the last proxy found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron.experiments.report.files import StudyFiles
from megatron.monitor.report.compare import signed
from megatron.monitor.report.payload import number
from megatron.monitor.report.shell import cell


def rounds(study: StudyFiles) -> list[Mapping[str, float]]:
    """Return the mixtures by round, the first reference's first; empty if there are no rounds."""
    # References and proxies of other studies have no rounds.
    staged = [run for run in study.planned if "round" in run["tags"]]
    staged.sort(key=lambda run: int(run["tags"]["round"]))
    references = [run["weights"] for run in staged if run["tags"].get("role") == "reference"]
    proxies = [run for run in staged if run["tags"].get("role") == "proxy"]
    if not references:
        return []
    found = len(proxies) >= len(references) and bool(study.mixture)
    return [*references, study.mixture] if found else references


def rounds_section(course: Sequence[Mapping[str, float]]) -> str:
    """Return the section of the rounds."""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in course[0])
    body = "".join(
        f'<tr><th scope="row">{number}</th>'
        + "".join(
            cell(float(weights.get(name, 0.0)), f"{weights.get(name, 0.0):.4f}")
            for name in course[0]
        )
        + "</tr>"
        for number, weights in enumerate(course)
    )
    return (
        '<section id="rounds"><h2>Weights by round</h2><p class="hint">Round 0 is the first '
        "reference's mixture; every other round is the mean of a proxy's domain weights.</p>"
        '<div class="pair"><figure><figcaption>Weight <span>by round</span></figcaption>'
        '<div class="chart" id="chart-rounds"></div><div class="keys" id="keys-rounds"></div>'
        "</figure></div>"
        '<div class="scroll"><table><thead><tr><th scope="col">round</th>'
        f"{heads}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def round_sentences(course: Sequence[Mapping[str, float]]) -> tuple[list[str], list[str]]:
    """Say what was found, and whether it still moved: (main, rest)."""
    number = len(course) - 1
    last = {name: course[-1].get(name, 0.0) for name in course[0]}
    mixture = ", ".join(f"{name} {weight:.4g}" for name, weight in list(last.items())[:8])
    more = ", …" if len(last) > 8 else ""
    if not number:
        return [], [f"No proxy has ended yet. The first reference's mixture: {mixture}{more}."]
    plural = "s" if number > 1 else ""
    moved = {name: weight - course[-2].get(name, 0.0) for name, weight in last.items()}
    most = max(moved, key=lambda name: abs(moved[name]))
    return [f"Found in {number} round{plural}: {mixture}{more}."], [
        f"The last round moved {most} the most, by {signed(moved[most])}.",
        "A proxy's own losses are not those of a model to use: it was trained to tell domains "
        "apart. What the mixture is worth, a run on it shows.",
    ]


def rounds_data(course: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return what the page draws of the rounds."""
    return {
        "domains": list(course[0]),
        "weights": [[number(w.get(name, 0.0)) for w in course] for name in course[0]],
    }
