"""Which of a study's mixtures is best: losses at the end of runs, averaged over seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron.errors import RunError
from megatron.experiments.study import Study
from megatron.experiments.table import Row, tag


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """A mixture and what its runs came to.

    Attributes:
        point: its number in the design.
        weights: by domain.
        losses: held-out loss by domain at the end, averaged over seeds.
        by_seed: the average over domains, by seed.
    """

    point: int
    weights: Mapping[str, float]
    losses: Mapping[str, float]
    by_seed: Mapping[int, float]

    @property
    def seeds(self) -> int:
        """How many seeds it was trained with."""
        return len(self.by_seed)

    @property
    def mean(self) -> float:
        """Mean over seeds of the average held-out loss."""
        return float(np.mean(list(self.by_seed.values())))

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds; NaN below two."""
        values = list(self.by_seed.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def point_results(rows: Sequence[Row]) -> list[PointResult]:
    """Return the points of a sweep's table, best first.

    The loss is that of the last validation; the average over domains is plain.

    Raises:
        RunError: a run has no held-out loss at its end.
    """
    runs: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    weights: dict[int, dict[str, float]] = defaultdict(dict)
    for row in rows:
        point = tag(row, "point")
        if point is None or row["split"] != "valid" or not row["last"]:
            continue
        runs[int(point), row["seed"]][row["domain"]] = row["loss"]
        weights[int(point)][row["domain"]] = row["start_weight"]
    expected = {
        (int(point), row["seed"]) for row in rows if (point := tag(row, "point")) is not None
    }
    if lost := sorted(expected - runs.keys()):
        raise RunError(
            f"point {lost[0][0]}, seed {lost[0][1]} has no held-out loss at its end; give the "
            "domains validation data, and eval_iters above 0"
        )
    results = []
    for point in sorted(weights):
        mine = {seed: losses for (number, seed), losses in runs.items() if number == point}
        results.append(
            PointResult(
                point=point,
                weights=weights[point],
                losses={
                    name: float(np.mean([losses[name] for losses in mine.values()]))
                    for name in weights[point]
                },
                by_seed={seed: float(np.mean(list(ls.values()))) for seed, ls in mine.items()},
            )
        )
    return sorted(results, key=lambda result: (math.isnan(result.mean), result.mean, result.point))


def summary(study: Study, results: Sequence[PointResult], failed: Sequence[str] = ()) -> str:
    """Return the summary of a sweep in Markdown, best point first.

    Args:
        study: the runs.
        results: from :func:`point_results`.
        failed: runs that failed, each with the reason.
    """
    domains = list(study.domains)
    measured = list(results[0].losses) if results else []
    head = ["point", *domains, "average loss", "sd", "seeds", *(f"loss {m}" for m in measured)]
    lines = [
        f"# {study.name}",
        "",
        f"{len(study.distinct)} runs of {study.runs[0].steps} steps, {study.tokens:,} tokens, "
        f"{study.flops:.3g} training FLOPs in all. Held-out losses (nats per token) at the end "
        "of each run, means over seeds; sd is over seeds.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for result in results:
        cells = [
            str(result.point),
            *(f"{result.weights.get(name, 0.0):.4g}" for name in domains),
            f"{result.mean:.4f}",
            "" if math.isnan(result.deviation) else f"{result.deviation:.4f}",
            str(result.seeds),
            *(f"{result.losses[name]:.4f}" for name in measured),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if failed:
        lines += ["", "Failed, and left out of the choice of the best:", ""]
        lines += [f"- {line}" for line in failed]
    return "\n".join(lines) + "\n"
