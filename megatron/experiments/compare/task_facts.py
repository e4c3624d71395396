"""What a comparison found on one task: paired differences, regrets and bills."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from megatron.errors import ConfigError
from megatron.experiments.bounds import FloatArray
from megatron.experiments.compare.league import Entry, League, method_facts
from megatron.experiments.compare.measured import End, mean_charges, run_end
from megatron.experiments.compare.playing import OraclePoint, Played
from megatron.experiments.compare.study_parts import ORACLE, Task
from megatron.experiments.statistics import (
    PairedDifference,
    compare_paired,
    regret,
    seeds_needed,
    t_interval,
)
from megatron.experiments.table import Row

POWER: Final = 0.8

Facts = dict[str, Any]


class TaskFacts:
    """The results of one task.

    Args:
        league: who took part.
        played: what became of the runs.
        rows: of the table, by key of the run.
        task: the task.
    """

    def __init__(
        self, league: League, played: Played, rows: Mapping[str, Sequence[Row]], task: Task
    ) -> None:
        self._league, self._played, self._task = league, played, task
        self._file = league.file
        self._names = [method.name for method in self._file.methods]
        with_oracle = self._file.oracle is not None and any(
            key[:2] == (task.name, ORACLE) for key in played.finals
        )
        self._all = [*self._names, *([ORACLE] if with_oracle else [])]
        self._ends: dict[str, dict[int, End]] = {name: {} for name in self._all}
        self._left_out: dict[int, list[str]] = {}
        for name in self._all:
            for seed in task.seeds:
                self._take(name, seed, rows)
        self._seeds = [seed for seed in task.seeds if seed not in self._left_out]

    def facts(self) -> Facts:
        """Return them, JSON-able."""
        league, task = self._league, self._task
        objectives = self._objectives()
        compared = {name: self._compared(name) for name in objectives}
        config = league.configs[task.name]
        return {
            "kind": task.kind,
            "domains": list(league.domains[task.name]),
            "entropies": dict(task.entropies),
            "steps": config.training.train_iters,
            "budget": league.budgets[task.name],
            "seeds": self._seeds,
            "left_out": {str(seed): why for seed, why in sorted(self._left_out.items())},
            "objectives": objectives,
            "methods": {name: self._method(name, compared) for name in self._all},
            "oracle": self._oracle(),
        }

    def _take(self, name: str, seed: int, rows: Mapping[str, Sequence[Row]]) -> None:
        """Read the end of a chain, or note why its seed is left out of all methods."""
        key = (self._task.name, name, seed)
        if key not in self._played.finals:
            why = self._played.missing.get(key, "it has no run that counts")
            self._left_out.setdefault(seed, []).append(f"{name}: {why}")
            return
        end = run_end(rows, self._played.chains[key], self._file.measure)
        self._ends[name][seed] = end
        if not end.finite:
            self._left_out.setdefault(seed, []).append(f"{name}: its loss is not finite")

    def _objectives(self) -> list[str]:
        for ends in self._ends.values():
            for end in ends.values():
                return list(end.objectives(self._task.entropies))
        return []

    def _values(self, name: str, objective: str) -> FloatArray:
        """Return a method's results over the seeds that all methods have, [S]."""
        ends = self._ends[name]
        return np.array(
            [ends[seed].objectives(self._task.entropies)[objective] for seed in self._seeds]
        )

    def _compared(self, objective: str) -> Mapping[str, Facts]:
        """Return the paired comparison of every method; below two seeds without any test.

        The oracle is no contestant: it is compared alone, and Holm's correction knows nothing
        of it.
        """
        base = self._values(self._file.baseline, objective)
        others = [name for name in self._all if name != self._file.baseline]
        if len(self._seeds) < 2:
            return {
                name: _untested(self._values(name, objective) - base)
                for name in others
                if self._seeds
            }
        found: dict[str, Facts] = {}
        for family in ([name for name in others if name != ORACLE], [ORACLE] * (ORACLE in others)):
            tested = compare_paired(
                {name: self._values(name, objective) for name in family},
                base,
                confidence=self._file.confidence,
            )
            for name, one in tested.items():
                found[name] = {**vars(one), "seeds_needed": _needed(one.mean, one.sd)}
        if ORACLE in found:
            found[ORACLE] |= dict.fromkeys(("p_holm", "interval_holm", "bootstrap_holm"))
        return found

    def _method(self, name: str, compared: Mapping[str, Mapping[str, Facts]]) -> Facts:
        ends = [self._ends[name][seed] for seed in self._seeds]
        facts: Facts = {
            "by_seed": {
                str(seed): self._end(end) for seed, end in sorted(self._ends[name].items())
            },
            "mean": self._means(name, ends),
            "difference": {objective: found.get(name) for objective, found in compared.items()},
            "difference_by_domain": self._by_domain(name, ends),
            "regret": self._regret(name),
            "spent": mean_charges([end.charges for end in ends]) if ends else None,
        }
        facts |= self._time(name, ends)
        if name == ORACLE:
            return facts
        entry = self._league.entry(self._task.name, name)
        return facts | self._planned(entry, ends)

    def _planned(self, entry: Entry, ends: Sequence[End]) -> Facts:
        planned = method_facts(entry)
        step = entry.plan.final.charges.total / entry.plan.final.steps
        most = max((end.charges.total for end in ends), default=0.0)
        method = entry.method
        return {
            "method": method.mixing["method"],
            "stages": method.stages,
            "prior": method.prior,
            "share": None if method.stages == "none" else method.share,
            "budget": planned["budget"],
            "planned": planned["planned"],
            "legs": planned["legs"],
            "train_iters": entry.plan.final.steps,
            "uncharged": planned["uncharged"],
            "over_budget": self._file.budget.setting == "equal" and most > entry.plan.budget + step,
        }

    def _end(self, end: End) -> Facts:
        return {
            "run": end.run,
            "steps": end.steps,
            "tokens": end.tokens,
            "loss": dict(end.loss),
            "perplexity": {name: math.exp(min(loss, 50.0)) for name, loss in end.loss.items()},
            "weights": dict(end.weights),
            "worst_domain": max(end.loss, key=lambda name: end.loss[name]),
            "objectives": end.objectives(self._task.entropies),
            "flops": end.charges.total,
            "seconds_per_step": end.seconds_per_step,
        }

    def _means(self, name: str, ends: Sequence[End]) -> Facts | None:
        if not ends:
            return None
        domains = list(ends[0].loss)
        loss = {d: float(np.mean([end.loss[d] for end in ends])) for d in domains}
        mixed = list(ends[0].weights)
        objectives = {o: self._values(name, o) for o in self._objectives()}
        return {
            "loss": loss,
            "perplexity": {
                d: float(np.mean([math.exp(min(end.loss[d], 50.0)) for end in ends]))
                for d in domains
            },
            "objectives": {o: float(values.mean()) for o, values in objectives.items()},
            "sd": {
                o: float(values.std(ddof=1)) if len(values) > 1 else None
                for o, values in objectives.items()
            },
            "weights": {d: float(np.mean([end.weights[d] for end in ends])) for d in mixed},
        }

    def _by_domain(self, name: str, ends: Sequence[End]) -> Facts | None:
        """Return the difference of each domain's loss to the baseline's, not corrected."""
        if len(ends) < 2:
            return None
        base = [self._ends[self._file.baseline][seed] for seed in self._seeds]
        found = {}
        for domain in ends[0].loss:
            values = np.array(
                [
                    one.loss[domain] - other.loss[domain]
                    for one, other in zip(ends, base, strict=True)
                ]
            )
            found[domain] = {
                "mean": float(values.mean()),
                "interval": t_interval(values, confidence=self._file.confidence),
            }
        return found

    def _regret(self, name: str) -> Facts | None:
        if ORACLE not in self._all or len(self._seeds) < 2:
            return None
        return {
            objective: dataclasses.asdict(
                regret(
                    self._values(name, objective),
                    self._values(ORACLE, objective),
                    self._values(self._file.baseline, objective),
                    confidence=self._file.confidence,
                )
            )
            for objective in self._objectives()
        }

    def _time(self, name: str, ends: Sequence[End]) -> Facts:
        def pace(of: Sequence[End]) -> float:
            return float(np.mean([end.seconds_per_step for end in of])) if of else math.nan

        base = [self._ends[self._file.baseline][seed] for seed in self._seeds]
        own, theirs = pace(ends), pace(base)
        return {"seconds_per_step": own, "time_ratio": own / theirs if theirs else math.nan}

    def _oracle(self) -> Facts | None:
        sweep = self._played.sweeps.get(self._task.name)
        if ORACLE not in self._all or not sweep:
            return None
        return {
            "seeds": list(self._file.oracle.seeds) if self._file.oracle else [],
            "best": dict(_best(sweep).weights),
            "sweep": [
                {
                    "weights": dict(point.weights),
                    "loss": point.mean if point.by_seed else None,
                    "by_seed": {str(seed): loss for seed, loss in point.by_seed.items()},
                }
                for point in sweep
            ],
        }


def _best(sweep: Sequence[OraclePoint]) -> OraclePoint:
    most = max(len(point.by_seed) for point in sweep)
    return min(
        (point for point in sweep if len(point.by_seed) == most),
        key=lambda point: (math.isnan(point.mean), point.mean),
    )


def _untested(values: FloatArray) -> Facts:
    """Return a difference of one seed, of which nothing can be said but its size."""
    known: Facts = dict.fromkeys(one.name for one in dataclasses.fields(PairedDifference))
    return known | {
        "count": len(values),
        "mean": float(values.mean()),
        "wins": int((values < 0).sum()),
        "losses": int((values > 0).sum()),
        "seeds_needed": None,
    }


def _needed(effect: float, sd: float) -> int | None:
    """Return the seeds that would find an effect with 80 % power; None: no number would."""
    if effect == 0 or not sd:
        return None
    try:
        return seeds_needed(effect / sd, power=POWER)
    except ConfigError:
        return None
