"""Folders of studies as the commands leave them, made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron.experiments.study import PLAN
from megatron.experiments.table import COLUMNS, Row, write_table

STEPS = (0, 100, 200, 400, 600, 800, 1000)
TOKENS = 1024
FLOPS = 2.5e6


@dataclass(frozen=True, kw_only=True)
class MadeRun:
    """A run that never was.

    Attributes:
        name: of the run.
        weights: by domain; a function of the step for those that move.
        seed: of the run.
        method: that mixed.
        tags: of the run.
        end: its last step; less than the last of ``STEPS`` if it did not end.
    """

    name: str
    weights: Mapping[str, float]
    seed: int = 0
    method: str = "static"
    tags: Mapping[str, Any] = field(default_factory=dict)
    end: int = STEPS[-1]
    moving: Callable[[int], Mapping[str, float]] | None = None


def law(weights: Mapping[str, float], step: int, measured: Sequence[str]) -> dict[str, float]:
    """Return losses that fall with a domain's own weight and with the steps."""
    return {
        name: 2.0
        + 0.3 * k
        + (1.5 - 0.5 * k / len(measured))
        * np.exp(-(0.5 + 2.0 * weights.get(name, 0.0)) * step / STEPS[-1])
        for k, name in enumerate(measured)
    }


def rows_of(
    run: MadeRun, study: str, losses: Callable[..., Mapping[str, float]] = law
) -> list[Row]:
    """Return the rows of a run."""
    names = list(run.weights)
    noise = np.random.default_rng([run.seed, len(run.name)])
    rows: list[Row] = []
    for step in (step for step in STEPS if step <= run.end):
        mean = dict(run.moving(step)) if run.moving else dict(run.weights)
        found = losses(mean, step, names)
        for name in names:
            row = {column: kind() for column, kind in COLUMNS.items()}
            row |= {
                "study": study, "run": run.name, "key": f"key-{run.name}", "seed": run.seed,
                "method": run.method, "domain": name, "step": step, "split": "valid",
                "last": step == STEPS[-1], "loss": found[name] + noise.normal(0, 0.004),
                "start_weight": run.weights[name], "weight": mean[name],
                "tokens": step * TOKENS, "flops": step * TOKENS * FLOPS, "run_seconds": 61.5,
                "weights": json.dumps(mean, ensure_ascii=False),
                "tags": json.dumps(dict(run.tags), ensure_ascii=False),
                "extra_by_kind": "{}",
            }  # fmt: skip
            rows.append(row)
    return rows


def write_study(
    out: Path,
    runs: Sequence[MadeRun],
    *,
    study: str = "sweep",
    lost: Sequence[MadeRun] = (),
    losses: Callable[..., Mapping[str, float]] = law,
) -> list[Row]:
    """Write plan and table; return the rows.

    Args:
        out: the folder.
        runs: in the table.
        study: its name.
        lost: runs that are planned and not in the table.
        losses: of mean weights, step and domains.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [row for run in runs for row in rows_of(run, study, losses)]
    planned = [
        {
            "run": run.name, "key": f"key-{run.name}",
            "folder": str(out.parent / "runs" / f"key-{run.name}"), "method": run.method,
            "seed": run.seed, "tags": dict(run.tags), "weights": dict(run.weights),
            "steps": STEPS[-1], "tokens": STEPS[-1] * TOKENS,
            "flops": STEPS[-1] * TOKENS * FLOPS,
        }
        for run in [*runs, *lost]
    ]  # fmt: skip
    plan = {
        "study": study,
        "tokens": sum(run["tokens"] for run in planned),
        "flops": sum(run["flops"] for run in planned),
        "domain_tokens": dict.fromkeys(runs[0].weights, 10**6),
        "runs": planned,
    }
    (out / PLAN).write_text(json.dumps(plan), encoding="utf-8")
    write_table(rows, out)
    return rows


def sweep_runs(
    domains: Sequence[str], points: int, seeds: Sequence[int] = (0,), seed: int = 0
) -> list[MadeRun]:
    """Return the runs of a sweep; the first point is the even mixture."""
    draws = np.random.default_rng(seed).dirichlet(np.ones(len(domains)), points)
    draws[0] = 1 / len(domains)
    return [
        MadeRun(
            name=f"point-{index:02d}-seed-{one}",
            weights=dict(zip(domains, map(float, draw), strict=True)),
            seed=one,
            tags={"point": index},
        )
        for index, draw in enumerate(draws)
        for one in seeds
    ]
