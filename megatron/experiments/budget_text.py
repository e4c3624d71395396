"""What the joint search says, in Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.experiments.budget_mixing import MixingOption
from megatron.experiments.budget_search import Aim, Candidate
from megatron.selection.gains import Gains

MOST_ROWS = 20


def budget_text(
    gains: Gains,
    aim: Aim,
    found: Sequence[Candidate],
    mixing: Sequence[MixingOption],
    left_out: Sequence[str],
) -> str:
    """Return the ranking in Markdown, with what was measured and what was not."""
    percent = f"{gains.confidence:.0%}"
    lines = [
        f"# {aim.budget:.3g} FLOPs for {aim.task}",
        "",
        f"{len(found)} ways to spend them; the best share of each is shown, {gains.unit} "
        f"({gains.better} is better).",
        "",
        f"| model | selector | share | passes | mixing | choosing | beside training | {gains.unit} "
        f"| {percent} | best in | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found[:MOST_ROWS]:
        lines.append(
            f"| {one.model.name} | {one.selector} | {one.share:.2%} | {one.epochs:.2f} "
            f"| {one.mixing.name} | {one.choosing / aim.budget:.1%} "
            f"| {one.beside / aim.budget:.1%} | {one.performance:.4f} "
            f"| {one.low:.4f} to {one.high:.4f} | {one.best_in:.0%} | {'; '.join(one.notes)} |"
        )
    if len(found) > MOST_ROWS:
        lines += ["", f"{len(found) - MOST_ROWS} more are in budget.json."]
    lines += ["", "## Measured", ""]
    lines += [f"- {line}" for line in measured(gains, aim, mixing)]
    lines += ["", "## Not measured", ""]
    lines += [f"- {line}" for line in assumed(gains, aim, found)]
    lines += [f"- Left out: {line}." for line in left_out]
    return "\n".join(lines) + "\n"


def measured(gains: Gains, aim: Aim, mixing: Sequence[MixingOption]) -> list[str]:
    """Return sentences that say which runs the ranking rests on."""
    lines = [
        f"{one.name}: {len(one.flops)} runs, up to {one.flops.max() / one.total:.0%} of the corpus."
        for one in gains.of(aim.task)
    ]
    return lines + [
        f"{one.name}: {one.effect:+.4f} nats ({one.how}); {one.overhead:.1%} of its budget goes "
        "beside training."
        for one in mixing
        if one.how
    ]


def assumed(gains: Gains, aim: Aim, found: Sequence[Candidate]) -> list[str]:
    """Return sentences that say what nobody has measured."""
    lines = []
    if any(one.mixing.effect for one in found):
        lines += [
            "That the effect of a mixing method adds to the gain of a selector: no run had both.",
            "That a mixing method's effect is the same at this budget and size, and on what was "
            "chosen, as where it was compared.",
        ]
        if gains.better == "higher":
            lines.append(f"That a nat of held-out loss is worth {aim.per_nat:g} {gains.unit}.")
    away = sorted({one.model.name for one in found if any("size " in note for note in one.notes)})
    if away:
        lines.append(
            f"{', '.join(away)}: no run of this size; its laws lie between those of two sizes "
            "(interpolated) or are the nearest size's (extrapolated: what it is better at is not "
            "seen, only what it costs)."
        )
    far = sum(any("compute than the runs" in note for note in one.notes) for one in found)
    if far:
        lines.append(f"{far} of {len(found)} rows: more or less compute than their runs had.")
    if any(one.epochs > 1 + 1e-6 for one in found):
        lines.append("More passes than one: by a published law of repeats, not by these runs.")
    lines.append(
        "Intervals hold the uncertainty of the laws' numbers and of the methods' differences "
        "(resampled together), and none of the assumptions above."
    )
    return lines


def budget_facts(
    gains: Gains,
    aim: Aim,
    found: Sequence[Candidate],
    mixing: Sequence[MixingOption],
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Return everything that the search found, JSON-able."""
    return {
        "format": 1,
        "budget": aim.budget,
        "task": aim.task,
        "unit": gains.unit,
        "better": gains.better,
        "confidence": gains.confidence,
        "ranking": [
            {
                "model": one.model.name,
                "parameters": one.model.parameters,
                "selector": one.selector,
                "share": one.share,
                "epochs": one.epochs,
                "mixing": one.mixing.name,
                "choosing": one.choosing,
                "beside": one.beside,
                "training": one.training,
                "performance": one.performance,
                "low": one.low,
                "high": one.high,
                "best_in": one.best_in,
                "notes": list(one.notes),
            }
            for one in found
        ],
        "measured": measured(gains, aim, mixing),
        "not_measured": assumed(gains, aim, found),
        "left_out": list(left_out),
    }
