"""What a fit and a plan say, in Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.selection.break_even import BreakEven
from megatron.selection.budget_plan import Choice
from megatron.selection.cost_model import size_name
from megatron.selection.gains import Gain, Gains, methods_of
from megatron.selection.laws_at import MEASURED
from megatron.selection.prices import Prices

HOW = {
    "covariance": "of the linearised fit by Student's t (λ on its logarithm)",
    "bootstrap": "of refits to resampled residuals, moved out to Student's t",
}


def fit_text(gains: Gains) -> str:
    """Return the fitted laws in Markdown."""
    counted = (
        "choosing and training" if gains.compute == "total" else "training, after the choosing"
    )
    lines = [
        f"# Gains of {len(gains.gains)} choices",
        "",
        "Performance(C) = P0 + (P̄ − P0) (1 − exp(−λ C / C_total)); C is the compute of "
        f"{counted}. {gains.unit.capitalize()}: {gains.better} is better. Intervals of "
        f"{gains.confidence:.0%} are {HOW[gains.intervals]}.",
        "",
        "| task | size | selector | runs | P0 | λ | P̄ | R² | C_total | choosing |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_fit_row(one) for one in gains.gains]
    for name, why in gains.left_out.items():
        lines += ["", f"Not fitted: {name}: {why}."]
    return "\n".join(lines) + "\n"


def _fit_row(one: Gain) -> str:
    def span(place: int) -> str:
        if place == 2 and one.fixed:
            return f"{one.law[2]:.4g} (given)"
        return f"{one.law[place]:.4g} ({one.low[place]:.4g} to {one.high[place]:.4g})"

    cells = (
        one.task,
        size_name(one.size),
        one.method,
        str(len(one.flops)),
        span(0),
        span(1),
        span(2),
        f"{one.r2:.3f}",
        f"{one.total:.3g}",
        f"{one.choosing:.3g}",
    )
    return "| " + " | ".join(cells) + " |"


def plan_text(
    gains: Gains,
    task: str,
    choices: Sequence[Choice],
    sizes: Sequence[BreakEven],
    budgets: Mapping[tuple[str, str], float],
    prices: Prices,
) -> str:
    """Return a plan in Markdown.

    Args:
        gains: the laws that it rests on.
        task: of them.
        choices: best first for each size and budget.
        sizes: break-even sizes.
        budgets: break-even budgets by the trained model's name and method.
        prices: of the selectors.
    """
    lines = [f"# Plan: {task}", ""]
    for model, budget in dict.fromkeys((one.model.name, one.budget) for one in choices):
        mine = [one for one in choices if (one.model.name, one.budget) == (model, budget)]
        lines += _choice_lines(gains, model, budget, mine)
    lines += _size_lines(sizes, gains.confidence) + _budget_lines(budgets)
    lines += ["## What this rests on", ""]
    laws = gains.of(task)
    lines += [f"- {name}: {prices.said(name, laws)}." for name in methods_of(laws)]
    lines += [f"- {line}" for line in honest_lines(gains, choices)]
    return "\n".join(lines) + "\n"


def _choice_lines(gains: Gains, model: str, budget: float, mine: Sequence[Choice]) -> list[str]:
    best = mine[0]
    whole = (
        " The budget pays for training on all of it: the laws tell an order there, no choice."
        if any("nothing is left" in note for note in best.notes)
        else ""
    )
    said = (
        f"Compute-optimal: **{best.method}**, {best.choosing_share:.1%} of the budget on choosing, "
        f"training on {best.corpus_share:.1%} of the corpus.{whole}"
        if best.affordable
        else "No selector leaves anything to train with."
    )
    lines = [
        f"## {model}, {budget:.3g} FLOPs",
        "",
        said,
        "",
        f"| selector | choosing | of the budget | training | of the corpus | {gains.unit} | "
        f"{gains.confidence:.0%} | best in | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in mine:
        value = f"{one.performance:.4f}" if one.affordable else "–"
        span = f"{one.low:.4f} to {one.high:.4f}" if one.affordable else "–"
        lines.append(
            f"| {one.method} | {one.choosing:.3g} | {one.choosing_share:.1%} | {one.training:.3g} "
            f"| {one.corpus_share:.1%} | {value} | {span} | {one.best_in:.0%} "
            f"| {'; '.join(one.notes)} |"
        )
    return [*lines, ""]


def _size_lines(found: Sequence[BreakEven], confidence: float) -> list[str]:
    if not found:
        return []
    lines = [
        "## Break-even sizes",
        "",
        f"From which size of the trained model on a selector beats {found[0].against}, if the "
        "budget is a part of what training on the whole corpus takes:",
        "",
        f"| selector | budget | trained model | {confidence:.0%} | by the scoring model |",
        "|---|---|---|---|---|",
    ]
    for one in found:
        ratio = "–" if one.ratio is None else times(one.ratio)
        lines.append(
            f"| {one.method} | {one.share:.0%} | {least(one.size)} | {least(one.low)} to "
            f"{least(one.high)} | {ratio} |"
        )
    return [*lines, ""]


def _budget_lines(budgets: Mapping[tuple[str, str], float]) -> list[str]:
    if not budgets:
        return []
    lines = [
        "## Break-even budgets",
        "",
        "| trained model | selector | pays from |",
        "|---|---|---|",
    ]
    for (model, method), budget in budgets.items():
        shown = f"{budget:.3g} FLOPs" if math.isfinite(budget) else "no budget"
        lines.append(f"| {model} | {method} | {shown} |")
    return [*lines, ""]


def honest_lines(gains: Gains, choices: Sequence[Choice]) -> list[str]:
    """Return sentences that say what was measured and what was not."""
    away = [one for one in choices if any(note.startswith("size ") for note in one.notes)]
    lines = [
        "Intervals are those of the laws' numbers; that the law has the right form is assumed.",
    ]
    if away:
        names = ", ".join(dict.fromkeys(one.model.name for one in away))
        lines.append(
            f"No run of {names} was fitted: its laws are those of the nearest sizes. Compare "
            "selectors at one size by them, not sizes."
        )
    else:
        lines.append(f"Every size was {MEASURED}.")
    far = [one for one in choices if any("compute than its runs" in note for note in one.notes)]
    if far:
        lines.append(
            f"{len(far)} of {len(choices)} predictions are for more or less compute than any run "
            "of theirs had."
        )
    lines.append(f"Intervals are {HOW[gains.intervals]}.")
    return lines


def least(size: float) -> str:
    """Return a break-even size in words."""
    if size == 0:
        return "any size"
    return size_name(size) if math.isfinite(size) else "never"


def times(ratio: float) -> str:
    """Return a ratio of sizes in words."""
    if ratio == 0:
        return "any"
    return f"{ratio:.2g}×" if math.isfinite(ratio) else "never"


def plan_facts(
    gains: Gains,
    task: str,
    choices: Sequence[Choice],
    sizes: Sequence[BreakEven],
    budgets: Mapping[tuple[str, str], float],
    prices: Prices,
) -> dict[str, Any]:
    """Return a plan, JSON-able; what does not exist, and what never comes, is null."""
    laws = gains.of(task)
    return {
        "format": 1,
        "task": task,
        "unit": gains.unit,
        "better": gains.better,
        "confidence": gains.confidence,
        "prices": {
            name: {"flops": prices.choosing(name, laws), "how": prices.said(name, laws)}
            for name in methods_of(laws)
        },
        "choices": [_choice_facts(one) for one in choices],
        "break_even_sizes": [
            {
                "method": one.method,
                "against": one.against,
                "share": one.share,
                "selector_parameters": one.selector,
                "parameters": number(one.size),
                "low": number(one.low),
                "high": number(one.high),
                "ratio": None if one.ratio is None else number(one.ratio),
            }
            for one in sizes
        ],
        "break_even_budgets": [
            {"model": model, "method": method, "flops": number(budget)}
            for (model, method), budget in budgets.items()
        ],
        "notes": honest_lines(gains, choices),
    }


def _choice_facts(one: Choice) -> dict[str, Any]:
    return {
        "model": one.model.name,
        "parameters": one.model.parameters,
        "budget": one.budget,
        "method": one.method,
        "best": one.best,
        "best_in": one.best_in,
        "choosing": one.choosing,
        "choosing_share": one.choosing_share,
        "training": one.training,
        "corpus_share": one.corpus_share,
        "performance": number(one.performance),
        "low": number(one.low),
        "high": number(one.high),
        "notes": list(one.notes),
    }


def number(value: float) -> float | None:
    """Return a number for JSON; None for what is not finite."""
    return float(value) if math.isfinite(value) else None
