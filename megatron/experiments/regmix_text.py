"""What RegMix has found, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def search_text(facts: Mapping[str, Any], failed: Sequence[str] = ()) -> str:
    """Return the summary of a search.

    Args:
        facts: of :func:`megatron.experiments.regmix.search_facts`.
        failed: runs that failed, each with the reason.
    """
    seeds = len(facts["seeds"])
    each = f", {seeds} seeds each" if seeds > 1 else ""
    lines = [f"# RegMix over {facts['mixtures']} mixtures{each}", ""]
    for warning in facts["warnings"]:
        lines += [f"**Warning.** {warning}", ""]
    lines += [*_mixture(facts), "", *_ranks(facts), "", *_unseen(facts)]
    for title, names in (
        ("Failed, and not fitted to:", list(failed)),
        ("Left out, because their mixtures lack a seed:", facts["left_out"]),
    ):
        if names:
            lines += ["", title, "", *(f"- {name}" for name in names)]
    return "\n".join(lines) + "\n"


def failure_text(failed: Sequence[str], why: str) -> str:
    """Return the summary of a study of which too little is left to search."""
    lines = ["# RegMix", "", f"No mixture was found: {why}", "", "Failed:", ""]
    return "\n".join([*lines, *(f"- {line}" for line in failed)]) + "\n"


def _mixture(facts: Mapping[str, Any]) -> list[str]:
    proxy = facts["best_proxy"]
    lines = [
        f"The mean of the best {facts['best']:,} of {facts['simulated']:,} simulated mixtures, by "
        f"`{facts['regressor']}` fitted to all {facts['mixtures']} mixtures, those held out below "
        "among them (nobody has ranked this last fit):",
        "",
        "| domain | weight | sd among the best | in the best proxy |",
        "|---|---|---|---|",
    ]
    for name, weight in facts["mixture"].items():
        spread, other = facts["spread"][name], proxy["mixture"][name]
        lines.append(f"| {name} | {weight:.4f} | {spread:.4f} | {other:.4f} |")
    counted = ", ".join(f"{n} {w:.3g}" for n, w in facts["objective"].items() if w > 0)
    lines += [
        "",
        f"Predicted objective: {facts['value']:.4f} nats per token; {facts['value_of_even']:.4f} "
        f"for the even mixture. The best proxy, {proxy['run']}, was measured to reach "
        f"{proxy['value']:.4f} (the lowest of many noisy numbers is lower than it would be again). "
        f"The objective is the weighted mean of the held-out losses of: {counted}.",
    ]
    return lines


def _ranks(facts: Mapping[str, Any]) -> list[str]:
    ranks: Mapping[str, Any] = facts["rank_correlation"]
    held_out = len(facts["held_out"])
    several = " The one that ranks the objective best found the mixture." if len(ranks) > 1 else ""
    lines = [
        f"Spearman's rank correlation of predicted and measured losses, over {held_out} mixtures "
        f"that were held out of a fit to the other {facts['mixtures'] - held_out}.{several} A "
        "domain whose loss hardly varies cannot be ranked well, and need not be.",
        "",
        f"| measured | {' | '.join(ranks)} | sd of its loss over mixtures | predicted loss |",
        "|---|" + "---|" * (len(ranks) + 2),
        f"| objective | {_cells(r['objective'] for r in ranks.values())} | | "
        f"{facts['value']:.4f} |",
    ]
    for name in facts["measured"]:
        cells = _cells(r["domains"][name] for r in ranks.values())
        deviation, loss = facts["deviation"][name], facts["losses"][name]
        lines.append(f"| {name} | {cells} | {deviation:.4f} | {loss:.4f} |")
    return lines


def _unseen(facts: Mapping[str, Any]) -> list[str]:
    kinds = list(facts["rank_correlation"])
    lines = [
        "Mixtures held out, by their measured objective:",
        "",
        f"| run | measured | {' | '.join(f'predicted by {kind}' for kind in kinds)} |",
        "|---|---|" + "---|" * len(kinds),
    ]
    for one in sorted(facts["held_out"], key=lambda one: one["measured"]):
        cells = " | ".join(f"{one['predicted'][kind]:.4f}" for kind in kinds)
        lines.append(f"| {one['run']} | {one['measured']:.4f} | {cells} |")
    return lines


def _cells(values: Any) -> str:
    return " | ".join(f"{value:.3f}" for value in values)
