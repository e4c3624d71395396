"""Runs of which the law of gains is known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from megatron.selection.budget_runs import Run
from megatron.selection.gain_law import gain

TOKENS = 1e9
SCORER = 7e9
RATES = {"random": 2.0, "bm25": 2.3, "ppl": 3.0, "less": 3.6}
COSTS = {
    "random": 0.0,
    "bm25": 0.0,
    "ppl": 2 * SCORER * TOKENS,
    "less": 6 * SCORER * TOKENS * 1.2,
}
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def gain_runs(
    *,
    rates=RATES,
    sizes=(7e9, 13e9),
    start=0.4,
    ceiling=0.6,
    noise=1e-3,
    seeds=2,
    seed=0,
    task="exam",
    tokens=TOKENS,
):
    """Return runs of every method and size at several shares of the corpus."""
    draw = np.random.default_rng(seed)
    runs = []
    for size in sizes:
        total = 6 * size * tokens
        for method, rate in rates.items():
            for share in SHARES:
                truth = float(gain(share, [start, rate, ceiling], 1.0))
                runs += [
                    Run(
                        method=method,
                        task=task,
                        size=size,
                        performance=truth + draw.normal(0, noise),
                        training=share * total,
                        choosing=COSTS.get(method, 0.0),
                        total=total,
                        seed=number,
                    )
                    for number in range(seeds)
                ]
    return runs


def write_csv(runs, path: Path) -> Path:
    """Write runs as a table."""
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(
            ["method", "task", "size", "performance", "flops", "selection_flops", "total_flops"]
        )
        for run in runs:
            writer.writerow(
                [
                    run.method,
                    run.task,
                    run.size,
                    run.performance,
                    run.flops,
                    run.choosing,
                    run.total,
                ]
            )
    return path
