"""A comparison's folder as ``tools/mix.py compare`` leaves it, made up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from support.study_files import STEPS, MadeRun, law, write_study

from megatron.experiments.compare.results import write_compare
from megatron.experiments.statistics import compare_paired, regret
from megatron.experiments.table import Row

BUDGET = 4.2e13
OBJECTIVES = ("average", "worst", "average_perplexity")


def write_comparison(
    out: Path,
    tasks: Mapping[str, Sequence[str]],
    methods: Sequence[str],
    seeds: Sequence[int] = (11, 12, 13, 14, 15),
) -> dict[str, Any]:
    """Write plan, table and ``compare.json``; return what the last holds.

    Args:
        out: the folder.
        tasks: domains by task.
        methods: the baseline first.
        seeds: of every method.
    """
    runs = []
    for place, (task, domains) in enumerate(tasks.items()):
        for rank, method in enumerate([*methods, "oracle"]):
            drift = np.random.default_rng([place, rank]).normal(0, 0.5, len(domains)) * (rank > 0)
            runs += [_run(task, method, domains, drift, seed) for seed in seeds]
    rows = write_study(out, runs, study="bench", losses=law)
    facts = {
        "format": 1, "study": "bench", "baseline": methods[0], "measure": "valid",
        "confidence": 0.95, "power": 0.8, "attention": "causal", "methods": list(methods),
        "budget": {"setting": "equal", "extra": 0.0}, "failed": [],
        "tasks": {
            task: _task(task, domains, methods, seeds, rows) for task, domains in tasks.items()
        },
    }  # fmt: skip
    write_compare(facts, out)
    return json.loads((out / "compare.json").read_text())


def _run(task: str, method: str, domains: Sequence[str], drift: Any, seed: int) -> MadeRun:
    def weights(step: int) -> dict[str, float]:
        raw = np.exp(drift * step / STEPS[-1])
        return dict(zip(domains, map(float, raw / raw.sum()), strict=True))

    return MadeRun(
        name=f"{task}-{method}-seed-{seed}",
        weights=weights(0),
        seed=seed,
        method="static" if method in ("uniform", "oracle") else method,
        tags={"task": task, "contestant": method, "role": "final", "number": 0},
        moving=weights,
    )


def _task(
    task: str, domains: Sequence[str], methods: Sequence[str], seeds: Sequence[int], rows: list[Row]
) -> dict[str, Any]:
    ends = {
        (name, seed): {
            row["domain"]: row
            for row in rows
            if row["run"] == f"{task}-{name}-seed-{seed}" and row["last"]
        }
        for name in (*methods, "oracle")
        for seed in seeds
    }
    losses = {
        name: np.array([[row["loss"] for row in ends[name, seed].values()] for seed in seeds])
        for name in (*methods, "oracle")
    }
    of = {
        "average": np.mean,
        "worst": np.max,
        "average_perplexity": lambda x, axis: np.exp(x).mean(axis),
    }
    values = {o: {n: of[o](x, axis=1) for n, x in losses.items()} for o in OBJECTIVES}
    compared = {
        o: compare_paired({n: values[o][n] for n in methods[1:]}, values[o][methods[0]])
        for o in OBJECTIVES
    }
    facts = {}
    for rank, name in enumerate((*methods, "oracle")):
        weights = json.loads(next(iter(ends[name, seeds[0]].values()))["weights"])
        gaps = losses[name] - losses[methods[0]]
        facts[name] = {
            "by_seed": {str(s): {"run": f"{task}-{name}-seed-{s}"} for s in seeds},
            "mean": {
                "loss": dict(zip(domains, losses[name].mean(axis=0), strict=True)),
                "objectives": {o: values[o][name].mean() for o in OBJECTIVES},
                "weights": weights,
            },
            "difference": {
                o: {**vars(found[name]), "seeds_needed": 7} if name in found else None
                for o, found in compared.items()
            },
            "difference_by_domain": {
                d: {"mean": gap, "interval": [gap - 0.01, gap + 0.01]}
                for d, gap in zip(domains, gaps.mean(axis=0), strict=True)
            },
            "regret": {
                o: dataclasses.asdict(
                    regret(values[o][name], values[o]["oracle"], values[o][methods[0]])
                )
                for o in OBJECTIVES
            },
            "spent": _spent(rank),
            "time_ratio": 1 + 0.02 * rank,
        }
        if name != "oracle":
            facts[name] |= {
                "method": name, "planned": {"total": BUDGET}, "train_iters": 1000 - 20 * rank,
                "uncharged": [], "over_budget": False,
            }  # fmt: skip
    sweep = np.random.default_rng(1).dirichlet(np.ones(len(domains)), 15)
    points = [dict(zip(domains, map(float, point), strict=True)) for point in sweep]
    average = [float(np.mean(list(law(point, STEPS[-1], domains).values()))) for point in points]
    return {
        "kind": "room", "domains": list(domains), "entropies": {}, "steps": 1000,
        "budget": BUDGET, "seeds": list(seeds), "left_out": {}, "objectives": list(OBJECTIVES),
        "methods": facts,
        "oracle": {
            "seeds": [1], "best": points[int(np.argmin(average))],
            "sweep": [
                {"weights": point, "loss": loss, "by_seed": {"1": loss}}
                for point, loss in zip(points, average, strict=True)
            ],
        },
    }  # fmt: skip


def _spent(rank: int) -> dict[str, float]:
    beside = {
        "validation": 0.02 * rank, "reference": 0.0, "foresight": 0.01 * (rank % 3),
        "proxies": 0.1 * (rank == 5), "references": 0.1 * (rank == 6),
    }  # fmt: skip
    training = 1 - sum(beside.values())
    shares = {
        "training": training,
        **beside,
        "probes": 0.05 * (rank % 2),
        "total": 1.0,
        "most": 1.01,
    }
    return {kind: share * BUDGET for kind, share in shares.items()}
