"""What RegMix found, beside how well it ranks mixtures that it was not fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from megatron.experiments.report.figures import Figure, figures_host, intervals, scatter, table
from megatron.monitor.report.shell import cell

NAME = "regression"


def regression_section(facts: Mapping[str, Any]) -> str:
    """Return the section of a search by regression."""
    best = facts["best_proxy"]
    hint = (
        f"The mean of the best {int(facts['best']):,} of {int(facts['simulated']):,} simulated "
        f"mixtures, by {facts['regressor']} over {facts['mixtures']} mixtures. Predicted "
        f"objective: {float(facts['value']):.4f} nats per token; even weights: "
        f"{float(facts['value_of_even']):.4f}; the best proxy ({best['run']}) measured "
        f"{float(best['value']):.4f}."
    )
    return (
        f'<section id="regression"><h2>The mixture found</h2><p class="hint">{escape(hint)}</p>'
        f"{_mixture(facts)}"
        "<h3>How well mixtures held out are ranked</h3>"
        '<p class="hint">Spearman\'s rank correlation of predicted and measured losses: 1 is the '
        "right order, 0 a guess.</p>"
        f"{_ranks(facts)}{figures_host(NAME)}</section>"
    )


def regression_sentences(facts: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Say what was found, and what speaks against it: (main, rest)."""
    shown = list(facts["mixture"].items())
    mixture = ", ".join(f"{name} {weight:.4g}" for name, weight in shown[:8])
    more = ", …" if len(shown) > 8 else ""
    rank = float(facts["rank_correlation"][facts["regressor"]]["objective"])
    return [f"Found by regression: {mixture}{more}."], [
        f"Mixtures held out are ranked with a correlation of {rank:.2f} ({facts['regressor']}).",
        *map(str, facts["warnings"]),
        "What the mixture is worth, a run on it shows.",
    ]


def _mixture(facts: Mapping[str, Any]) -> str:
    spread = facts["spread"]
    rows = [
        (str(name), [cell(float(w), f"{w:.4f}"), cell(float(spread[name]), f"{spread[name]:.4f}")])
        for name, w in facts["mixture"].items()
    ]
    return table(["domain", "weight", "sd over the mixtures averaged"], rows)


def _ranks(facts: Mapping[str, Any]) -> str:
    measured = [str(name) for name in facts["measured"]]
    rows = []
    for name, ranks in facts["rank_correlation"].items():
        values = [ranks["objective"], *(ranks["domains"][domain] for domain in measured)]
        rows.append((str(name), [cell(float(value), f"{value:.3f}") for value in values]))
    return table(["regressor", "objective", *measured], rows)


def regression_figures(facts: Mapping[str, Any]) -> list[Figure]:
    """Return the figures of a search by regression."""
    spread = facts["spread"]
    shares = [
        (str(name), float(w), max(0.0, w - spread[name]), min(1.0, w + spread[name]))
        for name, w in facts["mixture"].items()
    ]
    found = intervals(
        "Best mixture", "± sd; │ even", shares, zero=1 / max(1, len(facts["mixture"]))
    )
    return [
        found,
        *(
            scatter(
                f"Held out, {name}",
                ("predicted", "measured"),
                [
                    (str(one["run"]), float(one["predicted"][name]), float(one["measured"]))
                    for one in facts["held_out"]
                ],
            )
            for name in facts["rank_correlation"]
        ),
    ]
