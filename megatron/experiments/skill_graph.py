"""Skill-It's graph, measured: what training on each domain alone takes off every loss.

"Skill-It! A Data-Driven Skills Framework" (arXiv 2307.14430):
A_ij = (loss on j before - loss on j after) / (loss on j before), from a run on domain i alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from megatron.errors import RunError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.table import Row


class Negative(StrEnum):
    """What becomes of a domain that raises another's loss."""

    KEEP = "keep"
    """It counts against the domain, as the formula has it."""
    ZERO = "zero"
    """It counts nothing: the graph has edges where training helps, and no others."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SkillGraph:
    """Who helps whom.

    Attributes:
        domains: names of what was trained on alone, the rows, K.
        measured: names of what was measured, the columns: the domains, then the targets, M.
        seeds: that were averaged over, S.
        edges: the measured A_ij by seed, [S, K, M].
        before: losses before the first step by seed, [S, K, M].
        after: losses at the end by seed, [S, K, M].
        tokens: that the runs trained on, [S, K].
        negative: what became of edges below 0.
    """

    domains: tuple[str, ...]
    measured: tuple[str, ...]
    seeds: tuple[int, ...]
    edges: FloatArray
    before: FloatArray
    after: FloatArray
    tokens: FloatArray
    negative: Negative

    @property
    def matrix(self) -> FloatArray:
        """The graph: means over seeds, [K, M]."""
        mean = self.edges.mean(axis=0)
        return np.asarray(np.maximum(mean, 0.0) if self.negative is Negative.ZERO else mean)

    @property
    def deviation(self) -> FloatArray | None:
        """Standard deviations of the edges over seeds, [K, M]; None of one seed."""
        return np.asarray(self.edges.std(axis=0, ddof=1)) if len(self.seeds) > 1 else None

    def named(self) -> dict[str, dict[str, float]]:
        """Return the graph as the option ``graph`` of ``skillit`` takes it: rows by name."""
        rows = self.matrix.tolist()
        return {
            name: dict(zip(self.measured, row, strict=True))
            for name, row in zip(self.domains, rows, strict=True)
        }


def skill_graph(
    rows: Sequence[Row], runs: Mapping[tuple[int, str], str], negative: Negative
) -> SkillGraph:
    """Return the graph of a table of runs on one domain alone.

    Args:
        rows: of the table.
        runs: name of the run of every seed and domain.
        negative: what becomes of edges below 0; decided after the mean over seeds.

    Raises:
        RunError: a loss is missing, not finite, or 0 before the first step.
    """
    seeds = tuple(dict.fromkeys(seed for seed, _ in runs))
    domains = tuple(dict.fromkeys(domain for _, domain in runs))
    losses = {name: _Losses(rows, name) for name in runs.values()}
    first = losses[runs[seeds[0], domains[0]]].before
    measured = (*domains, *(name for name in first if name not in domains))
    found = [[losses[runs[seed, domain]] for domain in domains] for seed in seeds]
    before = np.array([[one.of(one.before, measured) for one in row] for row in found])
    after = np.array([[one.of(one.after, measured) for one in row] for row in found])
    return SkillGraph(
        domains=domains,
        measured=measured,
        seeds=seeds,
        edges=(before - after) / before,
        before=before,
        after=after,
        tokens=np.array([[one.tokens for one in row] for row in found], dtype=np.float64),
        negative=negative,
    )


class _Losses:
    """The held-out losses of a run before its first step and at its end."""

    def __init__(self, rows: Sequence[Row], name: str) -> None:
        mine = [row for row in rows if row["run"] == name and row["split"] == "valid"]
        self._name = name
        self.before = {row["domain"]: row["loss"] for row in mine if row["step"] == 0}
        self.after = {row["domain"]: row["loss"] for row in mine if row["last"]}
        self.tokens = max((row["tokens"] for row in mine), default=0)
        if not (self.before and self.after):
            when = "at its end" if self.before else "before its first step"
            raise RunError(
                f"run '{name}' has no held-out losses {when}, and the graph compares the two; let "
                "it start at step 0 (`finetune: true` where it starts from a checkpoint), with "
                "eval_iters above 0"
            )

    def of(self, losses: Mapping[str, float], measured: Sequence[str]) -> list[float]:
        """Return the losses of what is measured.

        Raises:
            RunError: one is missing, not finite, or not above 0 where it is divided by.
        """
        when = "before its first step" if losses is self.before else "at its end"
        for name in measured:
            loss = losses.get(name, math.nan)
            if not math.isfinite(loss) or (losses is self.before and loss <= 0):
                raise RunError(
                    f"run '{self._name}': the held-out loss of {name} {when} is {loss}; the graph "
                    "needs finite losses of every domain, above 0 at the start (look at the run's "
                    "learning rate and at the domain's validation data)"
                )
        return [losses[name] for name in measured]


def graph_text(
    graph: SkillGraph | None, failed: Sequence[str] = (), left_out: Sequence[int] = ()
) -> str:
    """Return the summary of a graph in Markdown.

    Args:
        graph: that was measured; None: no seed has all its runs.
        failed: runs that failed, each with the reason.
        left_out: seeds that were left out because a run of them failed.
    """
    lines = ["# Who helps whom", ""]
    if graph is None:
        lines.append("No graph: no seed has a finished run for every domain.")
    else:
        lines += _graph_lines(graph)
    if left_out:
        named = ", ".join(map(str, left_out))
        lines += ["", f"Left out, because a run of it failed: seed {named}."]
    if failed:
        lines += ["", "Failed:", "", *(f"- {line}" for line in failed)]
    return "\n".join(lines) + "\n"


def _graph_lines(graph: SkillGraph) -> list[str]:
    seeds = len(graph.seeds)
    mean = f", means over {seeds} seeds with their standard deviations" if seeds > 1 else ""
    kept = {
        Negative.KEEP: "Below 0: training on the row's domain raises the column's loss.",
        Negative.ZERO: "Where training on the row's domain raises the column's loss, 0 is written.",
    }[graph.negative]
    lines = [
        "The share of the column's held-out loss that training on the row's domain alone takes "
        f"away: (before − after) / before{mean}. {kept} Skill-It's first weights grow with the "
        "sum of a row over the losses that count.",
        "",
        f"| trained on | {' | '.join(graph.measured)} |",
        "|---|" + "---|" * len(graph.measured),
    ]
    deviation = graph.deviation
    for i, name in enumerate(graph.domains):
        cells = [f"{value:.4f}" for value in graph.matrix[i]]
        if deviation is not None:
            pairs = zip(cells, deviation[i], strict=True)
            cells = [f"{cell} ± {sd:.4f}" for cell, sd in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "Held-out losses, nats per token:",
        "",
        f"| trained on | tokens | {' | '.join(graph.measured)} |",
        "|---|---|" + "---|" * len(graph.measured),
        _loss_row("(nothing)", 0.0, graph.before.mean(axis=(0, 1))),
    ]
    after, tokens = graph.after.mean(axis=0), graph.tokens.mean(axis=0)
    lines += [_loss_row(*row) for row in zip(graph.domains, tokens, after, strict=True)]
    if np.ptp(graph.tokens) > 0:
        lines += [
            "",
            "**Warning.** The runs differ in the tokens they trained on (data that is used up ends "
            "a run under `on_exhausted: stop`), so that their rows are not comparable.",
        ]
    return lines


def _loss_row(name: str, tokens: float, losses: FloatArray) -> str:
    cells = " | ".join(f"{loss:.4f}" for loss in losses)
    return f"| {name} | {tokens:,.0f} | {cells} |"
