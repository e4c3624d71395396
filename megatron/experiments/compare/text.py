"""What a comparison found, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megatron.experiments.compare.study_parts import ORACLE
from megatron.experiments.compare.task_facts import Facts

_RULES = {
    "equal": "Every method has the FLOPs of the baseline's run, and pays from them for its "
    "validations, probes, gradients, references and proxies: what costs more trains less.",
    "restricted": "The run that counts has the baseline's steps for every method; what was learnt "
    "before it comes on top, within {extra:g} of a baseline's run (Aioli paper's restricted "
    "setting).",
    "unrestricted": "The run that counts has the baseline's steps for every method; what was "
    "learnt before it comes on top, within {extra:g} baseline runs (Aioli paper's unrestricted "
    "setting).",
}


def compare_text(facts: Facts) -> str:
    """Return the summary of what :func:`..results.compare_facts` returned."""
    confidence = f"{facts['confidence']:.0%}"
    lines = [
        f"# {facts['study']}",
        "",
        *([f"**{facts['label']}**", ""] if facts["label"] else []),
        _RULES[facts["budget"]["setting"]].format(**facts["budget"]),
        f"FLOPs are those of matrices and causal attention. Losses are {facts['measure']} losses "
        f"at the end of a run, nats per token, a plain mean over domains; differences are to "
        f"'{facts['baseline']}', paired by seed, below 0 is better. Intervals are {confidence} by "
        f"Student's t and by bootstrap over seeds (too short with few); p is corrected by Holm "
        f"over a task's methods.",
        "",
        *_overview(facts),
    ]
    for name, task in facts["tasks"].items():
        lines += ["", f"## {name} ({task['kind']})", "", *_task(facts, task)]
    if facts["failed"]:
        lines += ["", "## Failed runs", "", *(f"- {line}" for line in facts["failed"])]
    lines += ["", "## Made with", "", *_made(facts["made"])]
    return "\n".join(lines) + "\n"


def _made(made: Facts) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return [f"- `{made['command']}`", f"- {made['date']}, {made['machine']}", f"- {versions}"]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table in Markdown; the first column is text, the others are numbers."""
    return [
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _overview(facts: Facts) -> list[str]:
    """Return methods against tasks; differences whose corrected p is small are bold."""
    others = [name for name in facts["methods"] if name != facts["baseline"]]
    oracle = any(task["oracle"] for task in facts["tasks"].values())
    tasks = facts["tasks"]
    head = ["method", *(f"{name} ({task['kind']})" for name, task in tasks.items())]
    rows = [
        [name, *(_short(facts, task["methods"].get(name)) for task in tasks.values())]
        for name in (*others, *([ORACLE] if oracle else []))
    ]
    if len(tasks) > 1:
        head += ["mean of room", "worst control"]
        rows = [[*row, *_across(facts, row[0])] for row in rows]
    return [
        "Difference in average loss; bold where the corrected p is below "
        f"{1 - facts['confidence']:.2g}.",
        "",
        *table(head, rows),
    ]


def _across(facts: Facts, name: str) -> list[str]:
    """Return a method's mean difference where there is room, and its greatest where none is."""
    found: dict[str, list[float]] = {"room": [], "control": []}
    for task in facts["tasks"].values():
        difference = task["methods"].get(name, {}).get("difference", {}).get("average")
        found[task["kind"]].append(math.nan if difference is None else difference["mean"])
    room, control = found["room"], found["control"]
    across = [sum(room) / len(room) if room else math.nan, max(control, default=math.nan)]
    if any(map(math.isnan, control)):
        across[1] = math.nan
    return ["–" if math.isnan(value) else f"{value:+.4f}" for value in across]


def _short(facts: Facts, method: Facts | None) -> str:
    if method is None:
        return ""
    found = method["difference"].get("average")
    if found is None:
        return "–"
    p = found["p_holm"]
    text = f"{found['mean']:+.4f}"
    return f"**{text}**" if p is not None and p < 1 - facts["confidence"] else text


def _task(facts: Facts, task: Facts) -> list[str]:
    lines = [
        f"{task['steps']} steps of the baseline, {task['budget']:.3g} FLOPs; seeds "
        f"{', '.join(map(str, task['seeds'])) or 'none'}.",
    ]
    for seed, why in task["left_out"].items():
        lines.append(f"**Seed {seed} is left out of every method**: {'; '.join(why)}.")
    if len(task["seeds"]) < 2:
        lines.append("With fewer than two seeds there is no test and no interval.")
    for objective in ("average", "average_excess", "worst_excess", "worst"):
        if objective in task["objectives"] and objective != "average_excess":
            lines += ["", f"### {_TITLES[objective]}", "", *_differences(facts, task, objective)]
    lines += ["", "### Losses by domain", "", *_losses(task)]
    lines += ["", "### What it cost", "", *_costs(task)]
    if task["oracle"]:
        best = ", ".join(f"{name} {weight:.3g}" for name, weight in task["oracle"]["best"].items())
        lines += ["", f"The oracle's mixture, best of {len(task['oracle']['sweep'])}: {best}."]
    return lines


_TITLES = {
    "average": "Average loss",
    "worst": "Worst domain's loss",
    "worst_excess": "Worst excess over the known entropy",
}


def _differences(facts: Facts, task: Facts, objective: str) -> list[str]:
    head = ["method", "mean", "difference", "t interval", "bootstrap", "p", "p Holm", "wins"]
    head += ["seeds for 80 %", "regret", "gain recovered"]
    rows = []
    for name, method in task["methods"].items():
        if method["mean"] is None:
            rows.append([name, *["–"] * (len(head) - 1)])
            continue
        found = method["difference"].get(objective)
        regret = (method["regret"] or {}).get(objective)
        rows.append(
            [
                name,
                f"{method['mean']['objectives'][objective]:.4f}",
                *_tested(found, len(task["seeds"])),
                *_regretted(regret),
            ]
        )
    return table(head, rows)


def _tested(found: Facts | None, seeds: int) -> list[str]:
    if found is None:
        return [""] * 7
    return [
        f"{found['mean']:+.4f}",
        _interval(found["interval"]),
        _interval(found["bootstrap"]),
        _p(found["p"]),
        _p(found["p_holm"]),
        f"{found['wins']} of {seeds}",
        "–" if found["seeds_needed"] is None else str(found["seeds_needed"]),
    ]


def _regretted(regret: Facts | None) -> list[str]:
    if regret is None:
        return ["", ""]
    recovered = regret["recovered"]
    known = recovered is not None and recovered == recovered
    return [f"{regret['mean']:+.4f}", f"{recovered:.0%}" if known else "–"]


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f"{ends[0]:+.4f} to {ends[1]:+.4f}"


def _losses(task: Facts) -> list[str]:
    methods = {name: one for name, one in task["methods"].items() if one["mean"] is not None}
    if not methods:
        return ["No method has a seed that all others have."]
    domains = list(next(iter(methods.values()))["mean"]["loss"])
    head = ["method", *domains, "average perplexity", *(f"weight {d}" for d in task["domains"])]
    rows = [
        [
            name,
            *(f"{one['mean']['loss'][domain]:.4f}" for domain in domains),
            f"{one['mean']['objectives']['average_perplexity']:.4g}",
            *(f"{one['mean']['weights'].get(domain, 0.0):.3f}" for domain in task["domains"]),
        ]
        for name, one in methods.items()
    ]
    return table(head, rows)


def _costs(task: Facts) -> list[str]:
    kinds = ("training", "validation", "reference", "foresight", "proxies", "references")
    head = ["method", "steps", *kinds, "total", "planned", "probes", "time per step (noisy)"]
    rows = []
    notes = []
    for name, method in task["methods"].items():
        spent, budget = method["spent"], task["budget"]
        if name == ORACLE or spent is None:
            continue
        planned = method["planned"]["total"]
        rows.append(
            [
                name,
                str(method["train_iters"]),
                *(_share(spent[kind], budget) for kind in kinds),
                _share(spent["total"], budget),
                _share(planned, budget),
                _share(spent["probes"], budget),
                _ratio(method["time_ratio"]),
            ]
        )
        if method["over_budget"]:
            notes.append(
                f"**{name} spent more than its budget**: its timetable hung on what it "
                f"saw. At most {spent['most'] / budget:.1%} of the baseline's run."
            )
        if method["uncharged"]:
            notes.append(
                f"{name} was given {', '.join(method['uncharged'])}; what finding that "
                f"took is not charged."
            )
    lines = ["Shares of the baseline's run, means over seeds; probes are part of training.", ""]
    return [*lines, *table(head, rows), *(part for note in notes for part in ("", note))]


def _share(flops: float, budget: float) -> str:
    return f"{flops / budget:.1%}" if flops else "0"


def _ratio(value: Any) -> str:
    return f"×{value:.2f}" if isinstance(value, float) and value == value else "–"
