"""How near what a method acts on is to what its domains do, along its own run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.checkpoint.bundle import read_bundle
from megatron.errors import RunError
from megatron.experiments.acted_on import ActedOn, Point, acted_on, row_weights
from megatron.experiments.bounds import FloatArray
from megatron.experiments.children import CHILD, checkpoint_at
from megatron.experiments.dynamic_law import DynamicLaw, fidelity, fit_dynamic_law
from megatron.experiments.study import PlannedRun
from megatron.experiments.table import Row, tag
from megatron.monitor.jsonl import MIXTURE
from megatron.monitor.report.lines import LineCount, read_lines


@dataclass(frozen=True, kw_only=True, eq=False)
class Children:
    """The children of one point, in numbers.

    Attributes:
        measured: names of the losses, M.
        before: the losses at the checkpoint, [M].
        mixtures: shares of the samples that each child trained on, [R, K].
        after: the losses at the children's ends, [R, M].
    """

    measured: tuple[str, ...]
    before: FloatArray
    mixtures: FloatArray
    after: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class PointFidelity:
    """What was found at one point of a run.

    Attributes:
        run: name of the run.
        label: the method, as the study calls it.
        seed: of the run.
        step: of the point.
        domains: trained on, K.
        measured: names of the losses, M.
        law: the measured A*.
        sums: A*'s column sums, rows counted as the objective does, [K].
        acted_on: the method's Ã; None: it acts on none (yet).
    """

    run: str
    label: str
    seed: int
    step: int
    domains: tuple[str, ...]
    measured: tuple[str, ...]
    law: DynamicLaw
    sums: FloatArray
    acted_on: ActedOn | None

    @property
    def fidelity(self) -> float:
        """Half cosine, half Spearman of the column sums; NaN without an Ã."""
        return math.nan if self.acted_on is None else fidelity(self.acted_on.sums, self.sums)

    @property
    def r2(self) -> float:
        """Least R² of the linear law over the losses; NaN where no child is left to show it."""
        if len(self.law.residual) <= len(self.domains):
            return math.nan
        return float(self.law.r2.min())


def point_fidelity(
    parent: PlannedRun, step: int, children: Sequence[PlannedRun], rows: Sequence[Row]
) -> PointFidelity:
    """Compare at one point.

    Args:
        parent: a finished run that keeps a checkpoint of ``step``.
        step: of the point.
        children: finished, of this point.
        rows: of the study's table.

    Raises:
        CheckpointError: the state of the point cannot be read.
        RunError: a child has no losses, or the ledger cannot be read.
    """
    domains = tuple(parent.weights)
    found = read_children(rows, [run.key for run in children], domains)
    options = dict(parent.config.mixing.options)
    law = fit_dynamic_law(found.before, found.mixtures, found.after)
    state = read_bundle(checkpoint_at(parent, step))["planner"]["mixer"]
    lines = read_lines(parent.folder / MIXTURE, LineCount())
    point = Point(
        method=parent.method,
        options=options,
        state=state,
        ledger=[line for line in lines if int(line["step"]) <= step],
        domains=domains,
        measured=found.measured,
    )
    return PointFidelity(
        run=parent.name,
        label=str(parent.tags["label"]),
        seed=parent.seed,
        step=step,
        domains=domains,
        measured=found.measured,
        law=law,
        sums=row_weights(options, domains, found.measured) @ law.matrix,
        acted_on=acted_on(point),
    )


def read_children(rows: Sequence[Row], keys: Sequence[str], domains: Sequence[str]) -> Children:
    """Return what a table says of the children of one point.

    Args:
        rows: of a table.
        keys: of the children's folders.
        domains: that they train on.

    Raises:
        RunError: a child lacks a held-out loss before its first step or at its end.
    """
    ends: dict[str, dict[str, dict[str, Row]]] = defaultdict(lambda: {"before": {}, "after": {}})
    for row in rows:
        if row["split"] == "valid" and row["key"] in keys and tag(row, "role") == CHILD:
            when = "before" if row["step"] == 0 else "after" if row["last"] else None
            if when is not None:
                ends[row["key"]][when][row["domain"]] = row
    if not ends or set(keys) - ends.keys():
        raise RunError(
            "a child has no held-out losses; give the domains validation data, and eval_iters "
            "above 0"
        )
    measured = tuple(next(iter(ends.values()))["before"])
    for one in ends.values():
        for when, found in one.items():
            lost = [n for n in {*measured, *domains} if not _finite(found, n)]
            if lost:
                raise RunError(
                    f"a child has no held-out loss of '{sorted(lost)[0]}' {when} its steps; give "
                    "every domain validation data"
                )
    every = [ends[key] for key in keys]
    return Children(
        measured=measured,
        before=np.mean([_losses(one["before"], measured) for one in every], axis=0),
        mixtures=np.array([[one["after"][name]["share"] for name in domains] for one in every]),
        after=np.array([_losses(one["after"], measured) for one in every]),
    )


def mean_fidelity(points: Sequence[PointFidelity]) -> float:
    """Return the mean over the points that have an Ã, NaN if there is none."""
    known = [one.fidelity for one in points if one.acted_on is not None]
    return float(np.mean(known)) if known else math.nan


def facts(points: Sequence[PointFidelity], *, child_steps: int) -> dict[str, Any]:
    """Return all that was found, JSON-able."""
    methods = {}
    for label, mine in by_label(points).items():
        mean = mean_fidelity(mine)
        methods[label] = {
            "fidelity": None if math.isnan(mean) else mean,
            "points": len(mine),
            "with_estimate": sum(one.acted_on is not None for one in mine),
        }
    return {
        "law": "loss_i(after) = loss_i(before) - sum_j A_ij p_j",
        "child_steps": child_steps,
        "methods": methods,
        "points": [_point_facts(one) for one in points],
    }


def by_label(points: Sequence[PointFidelity]) -> dict[str, list[PointFidelity]]:
    """Return the points of every method, in order."""
    found: dict[str, list[PointFidelity]] = {}
    for one in points:
        found.setdefault(one.label, []).append(one)
    return found


def text(points: Sequence[PointFidelity], failed: Sequence[str], *, child_steps: int) -> str:
    """Return the summary in Markdown.

    Args:
        points: what was found.
        failed: runs that failed, each with the reason.
        child_steps: steps of a child.
    """
    lines = [
        "# fidelity",
        "",
        "How near the A that a method acts on (Ã) is to the measured one (A*): half the cosine, "
        "half Spearman's rank correlation of the column sums, from -1 to 1. A column sum of A* is "
        f"how far {child_steps} steps on that domain alone lower all losses together (nats per "
        "token); of Ã the direction alone counts. R² is the least of the linear law over the "
        "losses.",
        "",
        "| method | fidelity | points |",
        "|---|---|---|",
    ]
    for label, mine in by_label(points).items():
        compared = sum(one.acted_on is not None for one in mine)
        lines.append(f"| {label} | {_shown(mean_fidelity(mine))} | {compared} of {len(mine)} |")
    for label, mine in by_label(points).items():
        domains = mine[0].domains
        head = ["seed", "step", "fidelity", "R²", *(f"A* {d}" for d in domains)]
        head += [*(f"Ã {d}" for d in domains), "Ã is"]
        lines += ["", f"## {label}", "", _row(head), "|" + "---|" * len(head)]
        for one in mine:
            known = one.acted_on
            theirs = [""] * len(domains) if known is None else [f"{v:.4g}" for v in known.sums]
            own = [f"{value:.4g}" for value in one.sums]
            source = "none" if known is None else known.source
            cells = [str(one.seed), str(one.step), _shown(one.fidelity), _shown(one.r2)]
            lines.append(_row([*cells, *own, *theirs, source]))
    if failed:
        lines += ["", "Failed, and left out:", "", *(f"- {line}" for line in failed)]
    return "\n".join(lines) + "\n"


def _point_facts(one: PointFidelity) -> dict[str, Any]:
    known = one.acted_on
    return {
        "run": one.run,
        "method": one.label,
        "seed": one.seed,
        "step": one.step,
        "domains": list(one.domains),
        "measured": list(one.measured),
        "fidelity": None if known is None else one.fidelity,
        "before": one.law.parent.tolist(),
        "A_star": one.law.matrix.tolist(),
        "A_star_sums": one.sums.tolist(),
        "r2": None if math.isnan(one.r2) else one.law.r2.tolist(),
        "A_method": None if known is None or known.matrix is None else known.matrix.tolist(),
        "A_method_sums": None if known is None else known.sums.tolist(),
        "A_method_is": None if known is None else known.source,
    }


def _shown(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _finite(found: Mapping[str, Row], name: str) -> bool:
    return name in found and math.isfinite(found[name]["loss"])


def _losses(found: Mapping[str, Row], measured: Sequence[str]) -> list[float]:
    return [found[name]["loss"] for name in measured]
