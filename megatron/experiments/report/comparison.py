"""What a comparison of methods found: who wins where, by how much, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron.experiments.report.entries import Entry, Family, RunEnd
from megatron.experiments.report.files import StudyFiles
from megatron.experiments.report.tables import seeds
from megatron.monitor.report.compare import signed
from megatron.monitor.report.shell import cell, shade

OBJECTIVES = {
    "average": "average loss",
    "worst": "worst domain's loss",
    "average_excess": "average excess over the known entropy",
    "worst_excess": "worst excess over the known entropy",
}
KINDS = {
    "training": "training",
    "probes": "probing steps",
    "validation": "validation",
    "reference": "reference passes",
    "foresight": "foresight",
    "proxies": "proxies",
    "references": "training references",
}

Facts = Mapping[str, Any]


def value(number: Any) -> float:
    """Return a number of ``compare.json``; null is NaN."""
    return float(number) if isinstance(number, int | float) else math.nan


def comparison_families(facts: Facts, ends: Sequence[RunEnd]) -> list[Family]:
    """Return a family for each task: a method is an entry, of the runs that count."""
    by_name = {run.name: run for run in ends}
    return [_family(name, task, by_name) for name, task in facts["tasks"].items()]


def _family(name: str, task: Facts, by_name: Mapping[str, RunEnd]) -> Family:
    entries = []
    measured: dict[str, None] = {}
    for method, one in task["methods"].items():
        runs = [by_name[end["run"]] for end in one["by_seed"].values() if end["run"] in by_name]
        if runs:
            entries.append(Entry(label=method, method=runs[0].method, runs=tuple(runs)))
            measured |= dict.fromkeys(runs[0].losses)
    return Family(
        title=name,
        domains=tuple(task["domains"]),
        measured=tuple(measured),
        entries=tuple(entries),
    )


def comparison_sentences(facts: Facts) -> tuple[list[str], list[str]]:
    """Say who was better and who worse, task by task: (main, rest)."""
    level, main = 1 - float(facts["confidence"]), []
    for name, task in facts["tasks"].items():
        better: list[tuple[float, str]] = []
        worse: list[tuple[float, str]] = []
        for method, one in task["methods"].items():
            found = (one.get("difference") or {}).get("average")
            if found is None or not value(found["p_holm"]) < level:
                continue
            (better if value(found["mean"]) < 0 else worse).append(
                (value(found["mean"]), f"{method} ({signed(value(found['mean']))})")
            )
        said = [
            f"{word} than {facts['baseline']}: {', '.join(text for _, text in sorted(those))}"
            for word, those in (("better", better), ("worse", worse))
            if those
        ]
        told = "; ".join(said) or f"nothing can be told apart from {facts['baseline']}"
        main.append(f"{name} ({task['kind']}): {told}.")
    rest = [
        f"Differences in average {facts['measure']} loss at the end, nats per token, paired by "
        f"seed; called better or worse where p, corrected by Holm over a task's methods, is below "
        f"{level:.2g}. FLOPs are those of matrices and causal attention.",
    ]
    return main, rest


def overview_section(facts: Facts) -> str:
    """Return methods against tasks."""
    tasks = facts["tasks"]
    names = [name for name in _methods(tasks) if name != facts["baseline"]]
    found = {
        (name, task): ((one["methods"].get(name) or {}).get("difference") or {}).get("average")
        for name in names
        for task, one in tasks.items()
    }
    most = max([0.01, *(abs(value(one["mean"])) for one in found.values() if one)])
    heads = "".join(
        f'<th scope="col">{escape(name)}<small>{escape(str(task["kind"]))}</small></th>'
        for name, task in tasks.items()
    )
    level = 1 - float(facts["confidence"])
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(_short(found[name, task], most, level) for task in tasks)
        + "</tr>"
        for name in names
        if any(found[name, task] for task in tasks)
    )
    if not body:
        return ""
    return (
        f'<section id="overview"><h2>Difference to {escape(str(facts["baseline"]))}</h2>'
        '<p class="hint">Average loss, nats per token; blue is lower (better). Bold: the '
        f"corrected p is below {level:.2g}.</p>"
        '<div class="scroll"><table class="sortable"><thead><tr><th scope="col">method</th>'
        f"{heads}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _methods(tasks: Mapping[str, Facts]) -> list[str]:
    return list(dict.fromkeys(name for task in tasks.values() for name in task["methods"]))


def _short(found: Facts | None, most: float, level: float) -> str:
    if found is None or not math.isfinite(value(found["mean"])):
        return "<td>–</td>"
    mean = value(found["mean"])
    text = signed(mean)
    shown = f"<b>{text}</b>" if value(found["p_holm"]) < level else text
    return f'<td data-value="{mean!r}"{shade(mean, most)}>{shown}</td>'


def task_section(study: StudyFiles, facts: Facts, family: Family, index: int) -> str:
    """Return the section of a task, up to its curves."""
    task = facts["tasks"][family.title]
    lost = "".join(
        f"<li>Seed {escape(seed)} is left out of every method: {escape('; '.join(why))}.</li>"
        for seed, why in task["left_out"].items()
    )
    few = "<li>With fewer than two seeds there is no test and no interval.</li>"
    notes = lost + (few if len(task["seeds"]) < 2 else "")
    shown = ", ".join(map(str, task["seeds"])) or "none"
    hint = (
        f"{escape(str(task['kind']))}; {int(task['steps']):,} steps of the baseline, "
        f"{value(task['budget']):.3g} FLOPs; seeds {escape(shown)}."
    )
    return (
        f'<section class="task" data-task="{index}"><h2>{escape(family.title)} '
        f'<span class="switch objective"></span></h2><p class="hint">{hint}</p>'
        f"{_notes(notes)}"
        '<div class="pair"><figure><figcaption>Difference to the baseline <span>left is better; '
        "thin: t interval, thick: bootstrap</span></figcaption>"
        '<div class="chart forest"></div></figure>'
        "<figure><figcaption>What it cost <span>share of the baseline's run</span></figcaption>"
        '<div class="chart charges"></div><div class="keys charge-keys"></div></figure></div>'
        f"{''.join(_objective_table(facts, task, key) for key in _shown_objectives(task))}"
        f"<h3>Losses by domain</h3>{_loss_table(study, task, family)}"
        f"<h3>Charges</h3>{_cost_table(task)}"
        f"{_oracle(task)}</section>"
    )


def _notes(items: str) -> str:
    return f'<ul class="lost">{items}</ul>' if items else ""


def _shown_objectives(task: Facts) -> list[str]:
    return [key for key in OBJECTIVES if key in task["objectives"] and key != "average_excess"]


def _objective_table(facts: Facts, task: Facts, objective: str) -> str:
    heads = (
        ("method", ""), ("mean", "over seeds"), ("difference", "to the baseline, paired by seed"),
        ("t interval", ""), ("bootstrap", "too short with few seeds"), ("p", "two-sided"),
        ("p Holm", "corrected over the methods of the task"), ("wins", "seeds in which it is less"),
        ("seeds for 80 %", "that a test of this difference would need"),
        ("regret", "to the oracle, the best fixed mixture of a sweep"),
        ("gain recovered", "share of the oracle's gain over the baseline"),
    )  # fmt: skip
    differences = [
        value(found["mean"])
        for one in task["methods"].values()
        if (found := (one.get("difference") or {}).get(objective))
    ]
    most = max([0.01, *(abs(d) for d in differences if math.isfinite(d))])
    body = ""
    for name, one in task["methods"].items():
        mean = value(((one.get("mean") or {}).get("objectives") or {}).get(objective))
        found = (one.get("difference") or {}).get(objective)
        regret = (one.get("regret") or {}).get(objective)
        cells = [cell(mean, f"{mean:.4f}"), *_tested(found, len(task["seeds"]), most)]
        base = " <small>baseline</small>" if name == facts["baseline"] else ""
        body += (
            f'<tr><th scope="row">{escape(name)}{base}</th>{"".join(cells)}{_regret(regret)}</tr>'
        )
    return f"<h3>{OBJECTIVES[objective].capitalize()}</h3>{_table(heads, body)}"


def _table(heads: Sequence[tuple[str, str]], body: str) -> str:
    head = "".join(
        f'<th scope="col"{f""" title="{escape(tip)}" """ if tip else ""}>{escape(name)}</th>'
        for name, tip in heads
    )
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _tested(found: Facts | None, count: int, most: float) -> list[str]:
    if found is None:
        return ["<td></td>"] * 7
    mean, needed = value(found["mean"]), found.get("seeds_needed")
    return [
        cell(mean, signed(mean), shade(mean, most)),
        _interval(found["interval"]),
        _interval(found["bootstrap"]),
        cell(value(found["p"]), f"{value(found['p']):.3g}"),
        cell(value(found["p_holm"]), f"{value(found['p_holm']):.3g}"),
        cell(value(found["wins"]), f"{found['wins']} of {count}"),
        "<td>–</td>" if needed is None else cell(value(needed), str(needed)),
    ]


def _interval(ends: Sequence[Any] | None) -> str:
    if ends is None or not all(math.isfinite(value(end)) for end in ends):
        return "<td>–</td>"
    low, high = map(value, ends)
    return f'<td data-value="{low!r}">{signed(low)} to {signed(high)}</td>'


def _regret(regret: Facts | None) -> str:
    if regret is None:
        return "<td></td><td></td>"
    mean, recovered = value(regret["mean"]), value(regret["recovered"])
    return cell(mean, signed(mean)) + cell(recovered, _percent(recovered))


def _percent(part: float) -> str:
    """Return a share in whole percent; no minus before a zero."""
    return (
        f"{part + 0.0:.0%}".replace("-0%", "0%").replace("-", "−") if math.isfinite(part) else "–"
    )


def _loss_table(study: StudyFiles, task: Facts, family: Family) -> str:
    methods = {name: one for name, one in task["methods"].items() if one.get("mean")}
    if not methods:
        return '<p class="hint">No method has a seed that all others have.</p>'
    domains = list(next(iter(methods.values()))["mean"]["loss"])
    runs = {entry.label: seeds(study, entry) for entry in family.entries}
    gaps = [
        abs(value(one["mean"]))
        for method in methods.values()
        for one in (method.get("difference_by_domain") or {}).values()
    ]
    most = max([0.01, *(gap for gap in gaps if math.isfinite(gap))])
    heads = [("method", ""), ("runs", "with links to what lies beside this file")]
    heads += [(name, "loss, and the difference to the baseline") for name in domains]
    heads += [("average perplexity", "")]
    heads += [(f"weight {name}", "mean over the run") for name in task["domains"]]
    body = ""
    for name, one in methods.items():
        mean, apart = one["mean"], one.get("difference_by_domain") or {}
        cells = [f"<td>{runs.get(name, '')}</td>"]
        for domain in domains:
            loss, gap = value(mean["loss"][domain]), value((apart.get(domain) or {}).get("mean"))
            beside = f"<small>{signed(gap)}</small>" if math.isfinite(gap) and gap else ""
            shown = f"{loss:.4f}" if math.isfinite(loss) else "–"
            cells.append(f'<td data-value="{loss!r}"{shade(gap, most)}>{shown}{beside}</td>')
        perplexity = value(mean["objectives"].get("average_perplexity"))
        cells.append(cell(perplexity, f"{perplexity:.4g}"))
        for domain in task["domains"]:
            weight = value(mean["weights"].get(domain, 0.0))
            cells.append(cell(weight, f"{weight:.3f}"))
        body += f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'
    return _table(heads, body)


def _cost_table(task: Facts) -> str:
    heads = [("method", ""), ("steps", "of the run that counts")]
    heads += [(name, "share of the baseline's run") for name in KINDS.values()]
    heads += [("all", ""), ("planned", ""), ("time per step", "to the baseline's; noisy")]
    budget, body = value(task["budget"]), ""
    notes = []
    for name, one in task["methods"].items():
        if not one.get("spent") or "planned" not in one:
            continue
        spent = one["spent"]
        cells = [cell(value(one["train_iters"]), f"{one['train_iters']:,}")]
        cells += [_share(value(amount), budget) for amount in charged(spent).values()]
        cells += [_share(value(spent["total"]), budget)]
        cells += [_share(value(one["planned"]["total"]), budget)]
        ratio = value(one.get("time_ratio"))
        cells.append(cell(ratio, f"×{ratio:.2f}"))
        body += f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'
        if one.get("over_budget"):
            notes.append(f"{name} spent more than its budget: its timetable hung on what it saw.")
        if one.get("uncharged"):
            given = ", ".join(map(str, one["uncharged"]))
            notes.append(f"{name} was given {given}; what finding that took is not charged.")
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return _table(heads, body) + _notes(items)


def _share(flops: float, budget: float) -> str:
    part = flops / budget if budget > 0 else math.nan
    return cell(part, f"{part:.1%}" if flops else "0")


def charged(spent: Facts) -> dict[str, float]:
    """Return FLOPs by kind that add up to the total: probing steps are taken out of training."""
    found = {kind: value(spent.get(kind, 0.0)) for kind in KINDS}
    return {**found, "training": found["training"] - found["probes"]}


def _oracle(task: Facts) -> str:
    oracle = task.get("oracle")
    if not oracle:
        return ""
    best = ", ".join(f"{name} {value(weight):.3g}" for name, weight in oracle["best"].items())
    return (
        '<h3>The oracle\'s sweep</h3><p class="hint">Fixed mixtures of other seeds, best of '
        f"{len(oracle['sweep'])}: {escape(best)}. Rings are where the methods went: their mean "
        'weights, and their own average loss.</p><p class="hint map-hint"></p>'
        '<div class="grid wide map"></div><p class="rest map-more"></p>'
    )
